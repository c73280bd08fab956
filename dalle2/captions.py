"""Pictures and their captions, in the forms in which people keep them. The only file that imports
pycocotools.

A form is a function (annotations, picture folder) -> a list of (picture id, path relative to the
folder, captions); `load_captions` finds out which one is there.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pycocotools.coco import COCO

from dalle2.errors import UserError

MAX_CAPTION = 100_000  # characters; a longer one is no caption
METADATA = "metadata.jsonl", "metadata.csv"


@dataclass(frozen=True)
class CaptionedImage:
    image_id: int
    path: str
    captions: tuple[str, ...]


def load_captions(annot_path, img_path, max_images=None):
    """list of CaptionedImage of the folder `img_path`; those without a caption are left out.

    annot_path: a COCO captions file, whose pictures come in the order of their ids; or an empty
    string, where the captions are with the pictures: in the folder's metadata.jsonl or
    metadata.csv, or in a text file beside each picture, by name. Raises UserError where file or
    folder is absent or holds something else.
    """
    if not os.path.isdir(img_path):
        raise UserError(f"no such folder: {img_path}", "img_path")
    if annot_path and not os.path.isfile(annot_path):
        raise UserError(f"no such file: {annot_path}", "annot_path")
    rows = read_coco(annot_path) if annot_path else read_folder(img_path)
    source = annot_path or img_path
    records = []
    for image_id, name, captions in rows:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{source} names {name!r:.80}, which leads out of the folder",
                            "annot_path" if annot_path else "img_path")
        captions = tuple(text for caption in captions if (text := caption.strip()))
        if any(len(caption) > MAX_CAPTION for caption in captions):
            raise UserError(f"{source}: a caption of {name} has more than {MAX_CAPTION} characters",
                            "annot_path" if annot_path else "img_path")
        if captions:
            records.append(CaptionedImage(image_id, os.path.join(img_path, name), captions))
    records = records[:max_images]
    if not records:
        raise UserError(f"{source} holds no captioned image",
                        "annot_path" if annot_path else "img_path")
    if not any(os.path.isfile(record.path) for record in records[:100]):
        where = annot_path or find_form(annot_path, img_path)
        raise UserError(f"{img_path} holds none of the first pictures that {where} names, "
                        f"such as {os.path.basename(records[0].path)}", "img_path")
    return records


def compute_captions_digest(annot_path, img_path):
    """SHA-256, hexadecimal, of what `load_captions` reads the captions from."""
    digest = hashlib.sha256()
    if annot_path:
        digest.update(Path(annot_path).read_bytes())
    else:
        digest.update(json.dumps(read_folder(img_path)).encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------
# the forms


def read_coco(annot_path):
    """A COCO captions file."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(annot_path)
        return [(image_id, os.fspath(coco.imgs[image_id]["file_name"]),
                 [annotation["caption"].strip() for annotation in coco.imgToAnns[image_id]])
                for image_id in sorted(coco.imgs)]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{annot_path} is not a COCO captions file "
                        f"({type(error).__name__}: {error})", "annot_path") from error


def find_form(annot_path, img_path):
    """Where the captions are: "COCO captions file", a name of METADATA, or "text files"."""
    if annot_path:
        return "COCO captions file"
    return next((name for name in METADATA if (Path(img_path) / name).is_file()), "text files")


def read_folder(img_path):
    """A folder that holds its own captions."""
    form = find_form("", img_path)
    return read_metadata(Path(img_path) / form) if form in METADATA else read_text_files(img_path)


def read_metadata(path):
    """metadata.jsonl or metadata.csv as Hugging Face's imagefolder has it: rows with file_name and
    text or caption (a string, or a list of strings). Rows of one picture are joined."""
    found = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if path.suffix == ".csv" else (
                json.loads(line) for line in file if line.strip())
            for number, row in enumerate(rows, start=1):
                caption = row.get("text", row.get("caption"))
                captions = [caption] if isinstance(caption, str) else caption
                if not isinstance(row.get("file_name"), str) or not isinstance(captions, list) \
                        or not all(isinstance(caption, str) for caption in captions):
                    raise ValueError(f"row {number} has no file_name with text or caption")
                found.setdefault(row["file_name"], []).extend(captions)
    except (ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: {error}", "img_path") from error
    return [(number, name, captions) for number, (name, captions) in enumerate(found.items())]


def read_text_files(img_path):
    """A text file of the same name beside each picture, one caption a line; subfolders too."""
    suffixes = Image.registered_extensions()
    names = sorted(path.relative_to(img_path) for path in Path(img_path).rglob("*")
                   if path.suffix.lower() in suffixes and path.with_suffix(".txt").is_file())
    if not names:
        raise UserError(f"{img_path} holds neither {' nor '.join(METADATA)} nor a .txt file beside "
                        "a picture; name the captions file", "annot_path")
    rows = []
    for number, name in enumerate(names):
        text_path = Path(img_path) / name.with_suffix(".txt")
        try:
            rows.append((number, str(name), text_path.read_text(encoding="utf-8").splitlines()))
        except UnicodeDecodeError as error:
            raise UserError(f"{text_path} is not UTF-8 text ({error})", "img_path") from error
    return rows
