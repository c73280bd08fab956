"""Fetches COCO 2014 into data/coco/{train2014,val2014,annotations}: 20 GB, 34 GB on the way.

Stopped or killed at any moment, the same command resumes: downloads continue by HTTP Range, an
archive counts once its size and every checksum in it are right, unpacking skips the files that are
there. Run again when everything is there, it looks at every file's size and returns.
"""

import json
import shutil
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import requests
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dalle2 import cli  # noqa: E402

BASE_URL = "http://images.cocodataset.org"


class Archive(NamedTuple):
    path: str        # below the base URL
    num_bytes: int
    num_files: int
    suffix: str      # of its files


ARCHIVES = {  # by the folder that an archive unpacks to
    "annotations": Archive("annotations/annotations_trainval2014.zip", 252_872_794, 6, ".json"),
    "train2014": Archive("zips/train2014.zip", 13_510_573_713, 82_783, ".jpg"),
    "val2014": Archive("zips/val2014.zip", 6_645_013_297, 40_504, ".jpg"),
}
TRIES = 8         # in a row without a single byte
MAX_PAUSE = 60.0  # seconds
WORKERS = 16      # photos fetched at a time by --max_images


class DownloadError(Exception):
    """What went wrong, in one line."""


class Retry(Exception):
    """Something that may be better the next time."""


# ----------------------------------------------------------------------------------------------
# one file


def download(url, path, num_bytes=None, pause=2.0, show=True):
    """Streams `url` to `path` by way of `<path>.part`, continuing a part file that is there, and
    trying again, with growing pauses, when the connection breaks or the server is in trouble.

    num_bytes: the size that the file must have; None is whatever the server says. Raises
    DownloadError, naming the URL, on any other HTTP error and after `TRIES` failed tries.
    """
    part = path.with_name(path.name + ".part")
    tries = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _download_rest(url, part, num_bytes, show)
            break
        except (requests.RequestException, Retry) as error:
            moved = part.exists() and part.stat().st_size > before
            tries = 1 if moved else tries + 1
            if tries == TRIES:
                raise DownloadError(f"{url}: gave up after {TRIES} tries ({error}); run the same "
                                    "command again to resume") from error
            seconds = min(MAX_PAUSE, pause * 2 ** (tries - 1))
            print(f"{url}: {error}; trying again in {seconds:.0f} s", flush=True)
            time.sleep(seconds)
    part.replace(path)
    _version_path(part).unlink(missing_ok=True)


def _download_rest(url, part, num_bytes, show):
    version_path = _version_path(part)
    have = part.stat().st_size if part.exists() else 0
    version = json.loads(version_path.read_text()) if version_path.exists() else {}
    if have and version.get("url") != url:
        have = 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version["validator"]:
            headers["If-Range"] = version["validator"]
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        status = response.status_code
        if status == 416:  # nothing is left, or the file became shorter
            if response.headers.get("Content-Range") == f"bytes */{have}" \
                    and num_bytes in (None, have):
                return
            part.unlink()
            raise Retry("the part file did not fit the server's file")
        if status == 429 or status >= 500:
            raise Retry(f"HTTP {status}")
        if status not in (200, 206):
            raise DownloadError(f"{url}: HTTP {status}")
        validator = _read_validator(response)
        goes_on = status == 206 and validator == version["validator"] and \
            response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 206 and not goes_on:  # the file changed on the server
            part.unlink()
            raise Retry("the file changed on the server")
        start = have if goes_on else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else num_bytes
        if num_bytes and total != num_bytes:
            part.unlink(missing_ok=True)
            raise DownloadError(f"{url}: {total} bytes, {num_bytes} are expected")
        if total:
            check_disk(part.parent, total - start, f"download {url}")
        if not goes_on:
            part.unlink(missing_ok=True)
            _write(version_path, json.dumps({"url": url, "validator": validator}).encode())
        with open(part, "ab") as file, tqdm(
                total=total, initial=start, desc=part.stem, unit="B", unit_scale=True,
                disable=None if show else True) as progress:
            for block in response.iter_content(1 << 16):
                file.write(block)
                progress.update(len(block))
    have = part.stat().st_size
    if total and have > total:
        part.unlink()
    if total and have != total:
        raise Retry(f"connection closed at {have} of {total} bytes")


def _version_path(part):
    return part.with_name(part.name + ".json")


def _read_validator(response):
    """What tells this version of a file from another one: its strong ETag, or its date."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _write(path, content):
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def check_disk(folder, needed, purpose):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(f"{folder}: {needed / 1e9:.1f} GB are needed to {purpose}, "
                            f"{free / 1e9:.1f} GB are free")


# ----------------------------------------------------------------------------------------------
# archives


def verify(archive, data_dir):
    """Reads every member of `archive` against its checksum. Raises Retry on damage, DownloadError
    on a member that would leave `data_dir`."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = list_members(file, archive, data_dir)
            with _show_bytes(members, f"checking {archive.name}") as progress:
                for member in members:
                    with file.open(member) as source:
                        while block := source.read(1 << 20):
                            progress.update(len(block))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise Retry(f"{archive.name} is damaged: {error}") from error


def list_members(file, archive, data_dir):
    """Files of an open archive; DownloadError where one would land outside of `data_dir`."""
    root = data_dir.resolve()
    members = [member for member in file.infolist() if not member.is_dir()]
    for member in members:
        is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
        inside = (root / member.filename).resolve().is_relative_to(root)
        if is_link or not inside or "\\" in member.filename:
            raise DownloadError(f"{archive}: member {member.filename!r} would leave {data_dir}")
    return members


def unpack(archive, data_dir):
    """Unpacks a verified archive below `data_dir`, skipping the files that are there in full.
    Returns {file name: size} of its members."""
    with zipfile.ZipFile(archive) as file:
        members = list_members(file, archive, data_dir)
        missing = [m for m in members if _size(data_dir / m.filename) != m.file_size]
        check_disk(data_dir, sum(m.file_size for m in missing), f"unpack {archive.name}")
        with _show_bytes(missing, f"unpacking {archive.name}") as progress:
            for member in missing:
                target = data_dir / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                with file.open(member) as source, open(part, "wb") as sink:
                    shutil.copyfileobj(source, sink)
                part.replace(target)
                progress.update(member.file_size)
    return {Path(m.filename).name: m.file_size for m in members}


def _show_bytes(members, what):
    return tqdm(total=sum(m.file_size for m in members), desc=what, unit="B", unit_scale=True,
                disable=None)


def _size(path):
    return path.stat().st_size if path.is_file() else None


def fetch_archive(folder, data_dir, base_url):
    """Path of the verified archive of `folder`, downloaded where it is not there."""
    wanted = ARCHIVES[folder]
    archive = data_dir / Path(wanted.path).name
    if archive.exists():  # it got this name after it was verified
        return archive
    fresh = archive.with_name(archive.name + ".unverified")
    for _ in range(3):
        if not fresh.exists():
            download(f"{base_url}/{wanted.path}", fresh,
                     wanted.num_bytes if base_url == BASE_URL else None)
        try:
            verify(fresh, data_dir)
            fresh.replace(archive)
            return archive
        except Retry as error:
            fresh.unlink()
            print(f"{error}; fetching it again", flush=True)
            problem = error
    raise DownloadError(f"{base_url}/{wanted.path}: {problem}, three times")


def fetch_folder(folder, data_dir, base_url, keep_zips):
    """Brings `<data_dir>/<folder>` to all the files of its archive."""
    wanted = ARCHIVES[folder]
    listing = data_dir / f".{folder}.json"  # {file name: size}, once everything is there
    if listing.exists():
        sizes = json.loads(listing.read_text())
        if all(_size(data_dir / folder / name) == size for name, size in sizes.items()):
            print(f"{data_dir / folder}: complete, {len(sizes)} files", flush=True)
            return
    elif len(list((data_dir / folder).glob(f"*{wanted.suffix}"))) == wanted.num_files \
            and not (data_dir / f".{folder}.cut").exists():
        print(f"{data_dir / folder}: complete, {wanted.num_files} files, not fetched by this "
              "script: their sizes are not checked", flush=True)
        return
    archive = fetch_archive(folder, data_dir, base_url)
    try:
        sizes = unpack(archive, data_dir)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise DownloadError(f"{archive} was damaged ({error}) and is removed; run the same command "
                            "again to fetch it anew") from error
    if len(sizes) != wanted.num_files:
        message = f"{archive.name}: {len(sizes)} files, COCO 2014 has {wanted.num_files}"
        if base_url == BASE_URL:
            raise DownloadError(message)
        print(f"warning: {message}", flush=True)
    _write(listing, json.dumps(sizes).encode())
    (data_dir / f".{folder}.cut").unlink(missing_ok=True)
    if not keep_zips:
        archive.unlink()
    print(f"{data_dir / folder}: complete, {len(sizes)} files", flush=True)


# ----------------------------------------------------------------------------------------------
# a small real set


def fetch_some(split, data_dir, base_url, num_images):
    """The first `num_images` photos of a split, and its captions file cut to them."""
    folder, name = f"{split}2014", f"annotations/captions_{split}2014.json"
    if (data_dir / f".{folder}.json").exists():
        print(f"{data_dir / folder}: the whole split is here already", flush=True)
        return
    with zipfile.ZipFile(fetch_archive("annotations", data_dir, base_url)) as file:
        captions = json.loads(file.read(name))
    images = captions["images"][:num_images]
    kept = {image["id"] for image in images}
    (data_dir / folder).mkdir(exist_ok=True)
    todo = [image["file_name"] for image in images
            if not (data_dir / folder / image["file_name"]).exists()]
    fetch = partial(_fetch_photo, f"{base_url}/{folder}", data_dir / folder)
    with ThreadPoolExecutor(WORKERS) as pool, tqdm(
            total=len(images), initial=len(images) - len(todo), desc=folder, unit=" photos",
            disable=None) as progress:
        try:
            for _ in pool.map(fetch, todo):
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    cut = {**captions, "images": images,
           "annotations": [a for a in captions["annotations"] if a["image_id"] in kept]}
    (data_dir / "annotations").mkdir(exist_ok=True)
    for cut_folder in ("annotations", folder):
        _write(data_dir / f".{cut_folder}.cut", b"")
    (data_dir / ".annotations.json").unlink(missing_ok=True)
    _write(data_dir / name, json.dumps(cut).encode())
    print(f"{data_dir / folder}: {len(images)} of {len(captions['images'])} photos, "
          f"{len(cut['annotations'])} captions in {data_dir / name}", flush=True)


def _fetch_photo(url, folder, name):
    """Fetches one photo; a JPEG must begin and end as one, or it is fetched again."""
    path = folder / name
    fresh = folder / f".{name}.unverified"
    for _ in range(3):
        download(f"{url}/{name}", fresh, show=False)
        content = fresh.read_bytes()
        if content[:2] == b"\xff\xd8" and content.rstrip(b"\0")[-2:] == b"\xff\xd9":
            fresh.replace(path)
            return
        fresh.unlink()
    raise DownloadError(f"{url}/{name}: what the server sends is no whole JPEG")


# ----------------------------------------------------------------------------------------------
# the command line


def check_total_disk(folders, data_dir):
    """DownloadError where the disk cannot hold what is still to be fetched; every archive is
    removed before the next one comes."""
    missing = [ARCHIVES[folder].num_bytes for folder in folders
               if not (data_dir / f".{folder}.json").exists()
               and not (data_dir / folder).exists()
               and not list(data_dir.glob(f"{Path(ARCHIVES[folder].path).name}*"))]
    if missing:
        check_disk(data_dir, sum(missing) + max(missing), "download and unpack COCO 2014 "
                   "(--max_images fetches less)")


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data/coco", help="where the folders go")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train", "val"])
    parser.add_argument("--base_url", default=BASE_URL, help="server, or a mirror of it; sizes and "
                        "counts of COCO 2014 are demanded of the original only")
    parser.add_argument("--keep_zips", action="store_true", help="keep the archives")
    parser.add_argument("--max_images", type=cli.at_least(1), help="a small set: this many photos "
                        "a split, one by one, and the captions file cut to them (None: everything)")
    return parser.parse_args()


def main():
    args = parse_args()
    data_dir, base_url = Path(args.data_dir), args.base_url.rstrip("/")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if args.max_images:
            for split in args.splits:
                fetch_some(split, data_dir, base_url, args.max_images)
            return
        folders = ["annotations", *(f"{split}2014" for split in args.splits)]
        if base_url == BASE_URL:
            check_total_disk(folders, data_dir)
        for folder in folders:
            fetch_folder(folder, data_dir, base_url, args.keep_zips)
    except (DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
