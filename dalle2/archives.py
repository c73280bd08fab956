"""Tar archives read in place: nothing is unpacked.

A member is named by the path of its archive with its own name behind, `photos/00000.tar/0001.jpg`.
"""

import io
import os
import posixpath
import re
import tarfile
from functools import lru_cache

MEMBER = re.compile(r"(.*?\.tar)[/\\](.+)", re.DOTALL)


def index_tar(path):
    """({name: (offset, size)} of the files in an uncompressed tar, in their order, and what is
    wrong with it or ""). One that is cut off has those that are whole. Raises OSError where it is
    no tar."""
    state = os.stat(path)
    return _index_tar(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=16)
def _index_tar(path, end, changed):
    members, problem = {}, ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and member.offset_data + member.size <= end:
                    name = posixpath.normpath(member.name)
                    members[name] = member.offset_data, member.size
    except tarfile.TarError as error:
        if not members:
            raise OSError(f"{path} is no uncompressed tar archive ({error})") from error
        problem = f"cut off after {len(members)} files"
    return members, problem


def open_member(path):
    """The file `path`, or the member of an archive that it names, open for reading bytes."""
    found = MEMBER.fullmatch(os.fspath(path))
    if not found or os.path.isdir(found[1]):
        return open(path, "rb")
    name = posixpath.normpath(found[2].replace(os.sep, "/"))
    offset, size = index_tar(found[1])[0].get(name, (0, None))
    if size is None:
        raise FileNotFoundError(f"no such file: {path}")
    with open(found[1], "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(size))

