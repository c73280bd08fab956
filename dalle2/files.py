"""Files that a process killed at any moment leaves whole: renamed into place, or grown by steps."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout


def replace_file(path, write):
    """Calls `write(temporary path)`, then renames what it wrote to `path`, durably."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def build_once(folder, source, build, wait=True):
    """Makes `folder` by `build(part folder)`, unless it was made from the same `source` before.

    `source` is what the folder is made from, as JSON; it is recorded in `<folder>/source.json`. A
    part folder that an interrupted build from the same source left is handed to `build` again. Of
    several processes the first builds; the others wait for it, or, without `wait`, get None.
    Returns `folder`.
    """
    folder = Path(folder)
    if read_source(folder) == source:
        return folder
    message = f"waiting for another process that makes {folder}" if wait else None
    with hold_lock(folder.with_name(f".{folder.name}.lock"), message) as held:
        if not held:
            return None
        if read_source(folder) != source:
            part = folder.with_name(folder.name + ".part")
            if read_source(part) != source:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                replace_file(part / "source.json", lambda path: path.write_text(json.dumps(source)))
            build(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.replace(folder)
    return folder


def share_out(items, make):
    """make(item, wait) for each of `items`, which several processes may do at the same time: first
    for those that no other process is at, where it returns False, then, with `wait`, for the
    rest."""
    for item in [item for item in items if not make(item, False)]:
        make(item, True)


def compute_digest(path):
    """First 16 hexadecimal digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def hold_lock(path, message):
    """Holds the lock file `path`, which dying gives back. Where another process holds it: prints
    `message` and waits, or raises it at once if it is an error, or yields False if it is None;
    otherwise True."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if message is None:
            yield False
            return
        if isinstance(message, Exception):
            raise message from None
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(message, flush=True)
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def read_source(folder):
    """What `build_once` made `folder` from; None where it did not."""
    path = folder / "source.json"
    return json.loads(path.read_text()) if path.is_file() else None


class GrowingFiles:
    """Files of one folder that grow together, a step at a time, with a note on each step.

    Opened again after a kill, it drops what the last step did not finish: `notes` lists the steps
    that are there. `names` are the files; `<folder>/journal.jsonl` records their sizes.
    """

    def __init__(self, folder, names):
        folder = Path(folder)
        journal = folder / "journal.jsonl"
        self.notes, ends, size = [], dict.fromkeys(names, 0), 0
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None or any(os.path.getsize(folder / name) < row["ends"][name]
                                  for name in names):
                break
            self.notes.append(row["note"])
            ends, size = row["ends"], size + len(line)
        for name, end in {**ends, journal.name: size}.items():
            with open(folder / name, "ab") as file:
                file.truncate(end)
        self.folder, self.ends, self.journal = folder, ends, journal

    def append(self, blocks, note):
        """blocks: {name: bytes} for every file; note: anything as JSON."""
        for name, block in blocks.items():
            self.ends[name] = _append(self.folder / name, block)
        _append(self.journal, json.dumps({"ends": self.ends, "note": note}).encode() + b"\n")


def _append(path, block):
    """Writes `block` through to the disk. Returns the file's new size."""
    with open(path, "ab") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()
