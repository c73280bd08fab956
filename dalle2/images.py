"""Pictures: read from files, resized and cropped, arranged, saved; and names for their files."""

import io
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

from dalle2.archives import open_member

STORE_IMAGE_SIZE = 256    # side of the pictures that are kept
MIN_VIEW_SIDE = 0.75      # of the short side: the smallest random square of a photo
MAX_PIXELS = 100_000_000  # of a photo; a larger one is taken for a decompression bomb
JPEG_QUALITY = 95
MAX_NAME_BYTES = 120
Image.MAX_IMAGE_PIXELS = None  # Pillow's own, smaller limit, which warns

# ----------------------------------------------------------------------------------------------
# geometry


def load_image(path, size=STORE_IMAGE_SIZE):
    """A picture file as uint8 (3, size, size): short side resized to `size` with an antialiased
    filter, centre crop. Raises what `read_pixels` raises."""
    return resize_and_crop(read_pixels(path), size)


def read_pixels(path):
    """A picture as uint8 (3, H, W): turned as its EXIF says, RGB. path: a file, or a member of a
    tar (dalle2/archives.py). Raises OSError or ValueError where it cannot be read."""
    try:
        with open_member(path) as file, Image.open(file) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
            return torch.from_numpy(pixels).permute(2, 0, 1)                # (3, H, W)
    except (OSError, ValueError):
        raise
    except Exception as error:  # Pillow raises struct.error and more where EXIF is damaged
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def resize_and_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size): short side to `size` (bicubic, antialiased), centre."""
    short = min(image.shape[-2:])
    image = TF.center_crop(image, [min(side, 8 * short) for side in image.shape[-2:]])
    shape = [size * side // short for side in image.shape[-2:]]  # as torchvision's Resize
    return TF.center_crop(resize(image, shape), [size, size])


def resize(image, size):
    """Resizes (..., 3, H, W) to `size`, a side or [height, width], bicubic with antialiasing."""
    size = [size, size] if isinstance(size, int) else list(size)
    if list(image.shape[-2:]) == size:
        return image
    return TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


def crop(image, corner, size):
    """(B, C, H, W), corner (B, 2) of top and left -> (B, C, size, size). The corners stay on the
    device: nothing waits for them."""
    if image.shape[-1] == size:
        return image
    side = torch.arange(size, device=image.device)
    rows, columns = (corner[:, :, None] + side).unbind(1)                   # (B, size) each
    batch, channel = (torch.arange(n, device=image.device) for n in image.shape[:2])
    return image[batch[:, None, None, None], channel[:, None, None],
                 rows[:, None, :, None], columns[:, None, None, :]]


def cut_view(image, u, size):
    """A random square of uint8 (3, H, W) -> (3, size, size), for u, four numbers in [0, 1): its
    side, MIN_VIEW_SIDE to 1 of the short side; its place, two of them; mirrored below 0.5."""
    height, width = image.shape[-2:]
    side = round(min(height, width) * (MIN_VIEW_SIDE + (1 - MIN_VIEW_SIDE) * u[0]))
    top, left = int(u[1] * (height - side + 1)), int(u[2] * (width - side + 1))
    square = resize(image[:, top:top + side, left:left + side], size)
    return square.flip(-1) if u[3] < 0.5 else square


def augment(image, size, random, min_scale, color_jitter):
    """image (B, 3, H, W) uint8 -> (B, 3, size, size) float in [0, 1]: of each a random square that
    holds min_scale to 1 of its area, mirrored half of the time; brightness, contrast and saturation
    multiplied by 1 - color_jitter to 1 + color_jitter. random: BatchRandom."""
    u = random.rand(7)                                                      # (B, 7)
    side = (min_scale + (1 - min_scale) * u[:, 0]).sqrt()
    theta = torch.zeros(len(u), 2, 3, device=image.device)
    theta[:, 0, 0], theta[:, 1, 1] = side * torch.where(u[:, 1] < 0.5, -1, 1), side
    theta[:, :, 2] = (1 - side)[:, None] * (2 * u[:, 2:4] - 1)
    grid = F.affine_grid(theta, (len(u), 3, size, size), align_corners=False)
    image = F.grid_sample(image.float() / 255, grid, align_corners=False)
    factors = 1 + color_jitter * (2 * u[:, 4:, None, None, None] - 1)       # (B, 3, 1, 1, 1)
    brightness, contrast, saturation = factors.unbind(1)
    image = image * brightness
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + (image - mean) * contrast
    gray = image.mean(1, keepdim=True)
    return (gray + (image - gray) * saturation).clamp(0, 1)


# ----------------------------------------------------------------------------------------------
# JPEG files that can be cut


def encode_jpeg(image):
    """image (3, H, W) uint8 -> bytes of a JPEG file that `cut_jpeg` can cut."""
    content = io.BytesIO()
    TF.to_pil_image(image).save(content, "JPEG", quality=JPEG_QUALITY, restart_marker_rows=1)
    return content.getvalue()


def decode_jpeg(content):
    """bytes of a JPEG file -> (H, W, 3) uint8."""
    import simplejpeg  # here, since a store of uint8 needs it not
    return simplejpeg.decode_jpeg(content)


RESTART_MARKER = re.compile(b"\xff[\xd0-\xd7]")


def cut_jpeg(content, top, bottom):
    """(bytes of a JPEG file of the rows that hold rows `top` to `bottom`, the rows above it).

    Where a restart marker ends each row of blocks, the file can be cut there without decoding it
    (ITU-T T.81, B.2.1): the height in its header changes, the markers are numbered anew. A row of
    pixels more on either side is kept, which smooths the colors of those within. A file without
    the markers comes back whole.
    """
    scan = content.index(b"\xff\xda")
    scan += 2 + int.from_bytes(content[scan + 2:scan + 4], "big")
    ends = [marker.end() for marker in RESTART_MARKER.finditer(content, scan)]
    if not ends:
        return content, 0
    bounds = [scan, *ends, len(content)]
    height = STORE_IMAGE_SIZE // (len(bounds) - 1)  # of a row of blocks, pixels
    first, last = max(0, top - 1) // height, min(bottom, STORE_IMAGE_SIZE - 1) // height
    frame = content.index(b"\xff\xc0") + 5  # where the height stands
    parts = [content[:frame], (height * (last - first + 1)).to_bytes(2, "big"),
             content[frame + 2:scan]]
    for number in range(first, last + 1):
        parts += [content[bounds[number]:bounds[number + 1] - 2],
                  b"\xff\xd9" if number == last else bytes((0xff, 0xd0 + (number - first) % 8))]
    return b"".join(parts), first * height


# ----------------------------------------------------------------------------------------------
# saving


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
