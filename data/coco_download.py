"""Fetches COCO 2014 into data/coco/{train2014,val2014,annotations}: 19 GB, 20 GB unpacked.

Stopped at any moment, the same command goes on where it was: downloads continue by HTTP Range,
unpacking skips the files that are there. A split that is complete costs a second.
"""

import argparse
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import requests
from tqdm import tqdm

BASE_URL = "http://images.cocodataset.org"
ARCHIVES = {  # folder: (archive below the base URL, number of files, their suffix)
    "annotations": ("annotations/annotations_trainval2014.zip", 6, ".json"),
    "train2014": ("zips/train2014.zip", 82_783, ".jpg"),
    "val2014": ("zips/val2014.zip", 40_504, ".jpg"),
}
TRIES = 8


class DownloadError(Exception):
    """What went wrong, in one line."""


def download(url, path, pause=2.0):
    """Streams `url` to `path` by way of `<path>.part`, continuing a part file that is there, and
    trying again, with growing pauses, when the connection breaks."""
    part = path.with_name(path.name + ".part")
    for attempt in range(TRIES):
        try:
            _download_rest(url, part)
            part.replace(path)
            return
        except (requests.RequestException, DownloadError) as error:
            response = getattr(error, "response", None)
            if response is not None and 400 <= response.status_code < 500:
                raise DownloadError(f"{url}: HTTP {response.status_code}") from error
            if attempt == TRIES - 1:
                raise DownloadError(f"{url}: gave up after {TRIES} tries ({error}); run the same "
                                    "command again to go on") from error
            time.sleep(pause * 2 ** attempt)


def _download_rest(url, part):
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:  # nothing is left, or the file became shorter
            total = int(response.headers.get("Content-Range", "*/-1").rsplit("/", 1)[-1])
            if total == have:
                return
            part.unlink()
            raise DownloadError("the part file did not fit the server's file")
        response.raise_for_status()
        if response.status_code != 206:
            have = 0
        total = have + int(response.headers.get("Content-Length", 0))
        check_disk(part.parent, total - have, f"download {part.stem}")
        with open(part, "ab" if have else "wb") as file, tqdm(
                total=total, initial=have, desc=part.stem, unit="B", unit_scale=True,
                disable=None) as progress:
            for block in response.iter_content(1 << 16):
                file.write(block)
                progress.update(len(block))
    if total and part.stat().st_size != total:
        raise DownloadError(f"connection closed at {part.stat().st_size} of {total} bytes")


def check_disk(folder, needed, purpose):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(f"{folder}: {needed / 1e9:.1f} GB are needed to {purpose}, "
                            f"{free / 1e9:.1f} GB are free")


def unpack(archive, data_dir):
    """Unpacks `archive` below `data_dir`, skipping the files that are there in full; a member's CRC
    is checked as it is read. Refuses an archive with a member that would leave the folder."""
    root = data_dir.resolve()
    with zipfile.ZipFile(archive) as file:
        members = [m for m in file.infolist() if not m.is_dir()]
        for member in members:
            is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
            if is_link or not (root / member.filename).resolve().is_relative_to(root):
                raise DownloadError(f"{archive}: member {member.filename!r} would leave {data_dir}")
        check_disk(root, sum(m.file_size for m in members
                             if not (root / m.filename).exists()), f"unpack {archive.name}")
        for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files", disable=None):
            target = root / member.filename
            if target.exists() and target.stat().st_size == member.file_size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with file.open(member) as source, open(part, "wb") as sink:
                shutil.copyfileobj(source, sink)
            os.replace(part, target)


def fetch(folder, data_dir, base_url, keep_zips):
    """Brings `<data_dir>/<folder>` to its full count of files."""
    name, wanted, suffix = ARCHIVES[folder]

    def count():
        return sum(1 for entry in (data_dir / folder).glob(f"*{suffix}"))

    if count() == wanted:
        print(f"{data_dir / folder}: complete, {wanted} files")
        return
    archive = data_dir / Path(name).name
    if not archive.exists():
        download(f"{base_url}/{name}", archive)
    try:
        unpack(archive, data_dir)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise DownloadError(f"{archive} was damaged ({error}) and is removed; run the same command "
                            "again to fetch it anew") from error
    if count() != wanted:
        raise DownloadError(f"{data_dir / folder}: {count()} files, {wanted} are expected")
    if not keep_zips:
        archive.unlink()
    print(f"{data_dir / folder}: complete, {wanted} files")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_dir", default="data/coco", help="where the folders go")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train", "val"])
    parser.add_argument("--base_url", default=BASE_URL, help="server, or a mirror of it")
    parser.add_argument("--keep_zips", action="store_true", help="keep the archives")
    args = parser.parse_args()
    data_dir = Path(args.data_dir)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for folder in ("annotations", *(f"{split}2014" for split in args.splits)):
            fetch(folder, data_dir, args.base_url.rstrip("/"), args.keep_zips)
    except (DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
