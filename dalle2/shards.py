"""Shards: the parts in which a data set is prepared, by one process or by several."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from dalle2.captions import (
    check_paths,
    compute_captions_digest,
    find_tars,
    load_captions,
    load_tar,
    try_tar,
)
from dalle2.errors import UserError
from dalle2.files import hold_lock, replace_file
from dalle2.images import STORE_IMAGE_SIZE

IMAGES_A_SHARD = 16_384  # of a folder of pictures; of tars, each is a shard
LAYOUT = 2  # of the files of a store; a store of another layout is prepared anew


@dataclass(frozen=True)
class Shard:
    """A part of a data set, with a folder of its own in the store."""

    name: str        # of the folder
    source: dict     # what it is made from, as JSON
    load: Callable   # () -> list of CaptionedImage
    count: int = 0   # of these; 0: not known before
    tar: str = ""    # the tar that it is


def list_shards(img_path, annot_path, store_dir, max_images=None, num_views=1, strict=False):
    """(folder of the store, list of its Shards). Raises UserError where data does not exist."""
    check_paths(annot_path, img_path)
    tars = find_tars(img_path, annot_path)
    source = {"max_images": max_images, "image_size": STORE_IMAGE_SIZE, "num_views": num_views,
              "layout": LAYOUT}
    whole = {**source, "img_path": os.path.abspath(img_path)}
    if not tars:  # one more tar does not make another store
        whole["annotations"] = compute_captions_digest(annot_path, img_path)
    key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.normpath(img_path))).strip("-")
    folder = Path(store_dir) / f"{name}-{key}"
    if tars:
        return folder, [build_tar_shard(tar, count, source, strict)
                        for tar, count in take_tars(tars, max_images)]

    load = lru_cache(partial(load_captions, annot_path, img_path, max_images))
    path = folder / "num_images.json"  # a store that is made is opened without the captions
    if not path.is_file():
        with hold_lock(folder / ".num_images.lock", f"waiting for the process that reads {folder}"):
            replace_file(path, lambda part: part.write_text(str(len(load()))))
    count, shards = int(path.read_text()), []
    for start in range(0, count, IMAGES_A_SHARD):
        rows = slice(start, min(start + IMAGES_A_SHARD, count))
        shards.append(Shard(f"{len(shards):05}", {**whole, "shard": len(shards)},
                            lambda rows=rows: load()[rows], rows.stop - rows.start))
    return folder, shards


def build_tar_shard(tar, count, source, strict):
    """The Shard of the first `count` pictures of a tar; None: of all."""
    def warn(line):
        if strict:
            raise UserError(line, "strict")
        tqdm.write(line)
    source = {**source, "max_images": count, "img_path": os.path.abspath(tar),
              "annotations": compute_captions_digest("", tar)}
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:12]
    return Shard(f"{Path(tar).stem}-{key}", source, lambda: load_tar(tar, warn)[:count], tar=tar)


def take_tars(tars, max_images):
    """[(tar, how many of its pictures; None: all)] for the first `max_images` of all. UserError
    where there are none."""
    if max_images is None:
        return [(tar, None) for tar in tars]
    taken = []
    for tar in tars:
        count = min(max_images, len(try_tar(tar, warn=lambda line: None)))
        taken += [(tar, count)] if count else []
        max_images -= count
        if not max_images:
            break
    if not taken:
        raise UserError(f"{tars[0]} and the tars after it hold no captioned image", "img_path")
    return taken
