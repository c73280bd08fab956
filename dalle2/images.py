"""Pictures to bytes and names to files."""

import re
import unicodedata
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

MAX_NAME_BYTES = 120


def to_uint8(image):
    """float (..., H, W) in about [0, 1] -> uint8, clamped first so that nothing wraps around."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def save_jpeg(image, path, quality=95):
    """image (3, H, W), float in [0, 1] or uint8, as a JPEG file, its colors not subsampled."""
    _save(image, path, "JPEG", quality=quality, subsampling=0)


def save_image(image, path):
    """image (3, H, W), float in [0, 1] or uint8, as what the ending of `path` says: .png, which
    keeps every value, or .jpg."""
    if Path(path).suffix == ".png":  # level 1: a third of the default's time, 7 % larger
        _save(image, path, "PNG", compress_level=1)
    else:
        save_jpeg(image, path)


def _save(image, path, kind, **options):
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    TF.to_pil_image(image.cpu()).save(path, kind, **options)


def arrange(images, columns=8):
    """images (B, 3, H, W) in [0, 1] as one picture (3, H', W'), `columns` a row."""
    return make_grid(images.float().cpu().clamp(0, 1), nrow=columns, padding=2, pad_value=1.0)


def make_file_stem(caption):
    """A caption as a file name that every file system takes: no separators, control or reserved
    characters, no leading or trailing dot or space, at most 120 bytes of UTF-8."""
    text = unicodedata.normalize("NFC", caption)
    text = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]+', " ", text)
    text = re.sub(r"\s+", " ", text).strip(" .")
    text = text.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip(" .")
    if not text or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", text):
        text = f"_{text}"
    return text


def make_unique_stems(captions, taken=None):
    """`make_file_stem` of each caption, numbered where two would be the same but for case, or where
    `taken` {stem: caption} gives the name to another caption."""
    owners = {stem.casefold(): caption for stem, caption in (taken or {}).items()}
    used, numbers, stems = set(), {}, []
    for caption in captions:
        stem = candidate = make_file_stem(caption)
        while candidate.casefold() in used or owners.get(candidate.casefold(), caption) != caption:
            numbers[stem.casefold()] = numbers.get(stem.casefold(), 1) + 1
            candidate = f"{stem} ({numbers[stem.casefold()]})"
        used.add(candidate.casefold())
        stems.append(candidate)
    return stems
