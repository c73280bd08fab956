"""Pictures and their captions, in the forms in which people keep them. The only file that imports
pycocotools.

A form is a function of the captions file, the picture folder or the tar -> a list of (picture id,
name within the folder, captions); `load_captions` finds out which one is there.
"""

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from braceexpand import braceexpand
from PIL import Image
from pycocotools.coco import COCO
from tqdm import tqdm

from dalle2.archives import index_tar, open_member
from dalle2.errors import UserError

MAX_CAPTION = 100_000  # characters; a longer one is no caption
METADATA, TARS = ("metadata.jsonl", "metadata.csv"), "tar archives"


@dataclass(frozen=True)
class CaptionedImage:
    image_id: int
    path: str  # a file, or a member of a tar
    name: str  # within the folder
    captions: tuple[str, ...]


def load_captions(annot_path, img_path, max_images=None, warn=tqdm.write):
    """list of CaptionedImage of the folder or the tars `img_path`; those without a caption are left
    out.

    annot_path: a COCO captions file, whose pictures come in the order of their ids; or an empty
    string, where the captions are with the pictures: in the folder's metadata.jsonl or
    metadata.csv, in a text file beside each picture, by name, or in the tars. warn: called with a
    line on each thing in a tar that is left out. Raises UserError where file or folder is absent or
    holds something else.
    """
    tars = find_tars(img_path, annot_path)
    if tars:
        records, load = [], load_tar if len(tars) == 1 else try_tar
        for tar in tars:
            records += load(tar, warn)
            if max_images is not None and len(records) >= max_images:
                break
        if not records:
            raise UserError(f"{img_path}: no tar holds a captioned image", "img_path")
        return [replace(record, image_id=number)
                for number, record in enumerate(records[:max_images])]
    check_paths(annot_path, img_path)
    source, blamed = (annot_path, "annot_path") if annot_path else (img_path, "img_path")
    rows = read_coco(annot_path) if annot_path else read_folder(img_path)
    records = [record for row in rows if (record := build_record(row, img_path, source, blamed))]
    records = records[:max_images]
    if not records:
        raise UserError(f"{source} holds no captioned image", blamed)
    if not any(os.path.isfile(record.path) for record in records[:100]):
        where = annot_path or find_form(annot_path, img_path)
        raise UserError(f"{img_path} holds none of the first pictures that {where} names, "
                        f"such as {os.path.basename(records[0].path)}", "img_path")
    return records


def check_paths(annot_path, img_path):
    """Raises UserError where one of them does not exist; reads nothing large."""
    if find_tars(img_path, annot_path):
        return
    if not os.path.isdir(img_path):
        raise UserError(f"no such folder: {img_path} (python data/coco_download.py fetches COCO)",
                        "img_path")
    if annot_path and not os.path.isfile(annot_path):
        raise UserError(f"no such file: {annot_path}", "annot_path")


def build_record(row, folder, source, blamed):
    """The CaptionedImage of what a form gives; None without a caption. UserError naming `source`,
    which the argument `blamed` named, where it cannot be meant."""
    image_id, name, captions = row
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{source} names {name!r:.80}, which leads out of the folder", blamed)
    captions = tuple(text for caption in captions if (text := caption.strip()))
    if any(len(caption) > MAX_CAPTION for caption in captions):
        raise UserError(f"{source}: a caption of {name} has more than {MAX_CAPTION} characters",
                        blamed)
    return CaptionedImage(image_id, os.path.join(folder, name), name, captions) if captions \
        else None


def compute_captions_digest(annot_path, img_path):
    """SHA-256, hexadecimal, of what `load_captions` reads the captions from; of tars, of their
    names and sizes."""
    tars = find_tars(img_path, annot_path)
    if tars:
        content = json.dumps([[os.path.basename(tar), os.path.getsize(tar)] for tar in tars])
    elif annot_path:
        return hashlib.sha256(Path(annot_path).read_bytes()).hexdigest()
    else:
        content = json.dumps(read_folder(img_path))
    return hashlib.sha256(content.encode()).hexdigest()


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
    """Where the captions are: "COCO captions file", TARS, a name of METADATA, or "text files"."""
    if annot_path:
        return "COCO captions file"
    if find_tars(img_path, annot_path):
        return TARS
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


def find_tars(img_path, annot_path=""):
    """The tars that `img_path` names, sorted: a folder of them without METADATA, a tar, a pattern
    (*, ?) or a range in braces ({00000..00009}). Empty where it is something else."""
    if annot_path:
        return []
    if os.path.isfile(img_path):
        return [str(img_path)] if str(img_path).endswith(".tar") else []
    if os.path.isdir(img_path):
        has_metadata = any((Path(img_path) / name).is_file() for name in METADATA)
        return [] if has_metadata else sorted(map(str, Path(img_path).glob("*.tar")))
    tars = []
    try:
        patterns = list(braceexpand(str(img_path), escape=False))
    except ValueError as error:
        raise UserError(f"{img_path}: {error}", "img_path") from error
    for pattern in patterns:
        found = glob.glob(pattern)
        if not found and pattern.endswith(".tar"):
            raise UserError(f"no such file: {pattern}", "img_path")
        tars += found
    return sorted(set(tars)) if all(tar.endswith(".tar") for tar in tars) else []


def load_tar(path, warn=tqdm.write):
    """list of CaptionedImage of one tar; what cannot be used is left out, with a line to `warn`."""
    records = []
    for row, problem in read_tar(path):
        try:
            record = None if problem else build_record(row, path, path, "img_path")
        except UserError as error:
            record, problem = None, error.args[0]
        if record:
            records.append(record)
        else:
            warn(f"warning: {problem or f'{path}/{row[1]}: an empty caption'}; left out")
    if not records:
        raise UserError(f"{path} holds no captioned image", "img_path")
    return records


def try_tar(path, warn=tqdm.write):
    """`load_tar`; of a tar with nothing that can be used an empty list, with a line to `warn`."""
    try:
        return load_tar(path, warn)
    except UserError as error:
        warn(f"warning: {path} is left out ({error.args[0]})")
        return []


def read_tar(path):
    """A WebDataset tar as img2dataset writes it: files with the same name up to the first dot of
    its last part belong together. One is the picture; the captions are the lines of the .txt, or
    "caption" or "text" of the .json. Yields (row, "") or (row, what is wrong with it)."""
    try:
        members, problem = index_tar(path)
    except OSError as error:
        raise UserError(str(error), "img_path") from error
    if problem:
        yield (0, "", ()), f"{path}: {problem}"
    suffixes, samples = Image.registered_extensions(), {}
    for name in members:
        folder, _, last = name.rpartition("/")
        if last.startswith("."):  # what macOS adds
            continue
        key, suffix = last.partition(".")[0], last.rpartition(".")[2].lower()
        kind = "picture" if f".{suffix}" in suffixes else suffix
        sample = samples.setdefault(f"{folder}/{key}", {})
        if kind in sample:
            yield (0, name, ()), f"{path}/{name}: a second {kind} of {key}"
        sample.setdefault(kind, name)
    for number, sample in enumerate(samples.values()):
        if "picture" not in sample:
            continue
        row = number, sample["picture"], ()
        try:
            yield (*row[:2], read_tar_captions(path, sample)), ""
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            reason = "no caption" if isinstance(error, KeyError) else f"captions: {error}"
            yield row, f"{path}/{sample['picture']}: {reason}"


def read_tar_captions(path, sample):
    """The captions of a sample, {kind of file: member}. KeyError where it has none."""
    kind = "txt" if "txt" in sample else "json"
    with open_member(f"{path}/{sample[kind]}") as file:
        content = file.read().decode()
    if kind == "txt":
        return content.splitlines()
    row = json.loads(content)
    captions = row["text"] if "text" in row else row["caption"]
    return [captions] if isinstance(captions, str) else [str.strip(text) for text in captions]
