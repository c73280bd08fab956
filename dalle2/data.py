"""The prepared store that training reads.

`dalle2.prepare` makes a store; training and sampling read it here through memory maps.
"""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dalle2.arrays import ByteRows, allow_open_files, join_arrays, join_starts
from dalle2.errors import UserError
from dalle2.files import build_once, read_source, share_out
from dalle2.images import STORE_IMAGE_SIZE, cut_jpeg, decode_jpeg, resize
from dalle2.rng import shuffle

CROPS_AT_A_TIME = 8  # that a thread decodes


class Record(NamedTuple):
    """What a store keeps of a photo besides its pixels."""

    image_id: int
    file_name: str       # within its folder
    captions: list[str]


def map_embedding(name):
    """A property of a Store: the file `name` of its embeddings, opened when it is asked for."""
    return cached_property(lambda store: store._map(f"{store.embed_name}/{name}.npy"))


class Store:
    """A prepared data set of P photos, `num_views` pictures of each (N = P num_views in all), and M
    captions, in one or more shards, memory-mapped.

    images (N, 3, 256, 256) uint8, those of photo i from i num_views on; records: P of them.
    caption_start (P + 1,): captions of photo i are rows caption_start[i] to caption_start[i + 1] of
    text_tokens (M, L) and text_embed (M, D). image_embed (N, D). text_encodings (tokens, D):
    caption j is rows token_start[j] to token_start[j + 1]. Embeddings are there if `embed_name`,
    their folder in each shard, is.
    """

    def __init__(self, folders, embed_name=None):
        self.folders, self.embed_name = [Path(folder) for folder in folders], embed_name
        allow_open_files(10 * len(self.folders))  # each memory map holds one
        sources = [read_source(folder / "images") for folder in self.folders]
        self.num_views = sources[0]["num_views"]
        digests = [source["annotations"] for source in sources]
        self.digest = digests[0] if len(digests) == 1 else \
            hashlib.sha256("".join(digests).encode()).hexdigest()
        formats = {find_image_format(folder / "images"): folder for folder in self.folders}
        if len(formats) > 1:
            raise UserError(" and ".join(f"{folder} holds {kind}" for kind, folder in
                                         formats.items()) + "; prepare one of them again with "
                            "the --image_format of the other", "store_dir")
        (self.image_format,) = formats
        self.caption_start = join_starts(self._load("images/caption_start.npy"))

    def __len__(self):
        return (len(self.caption_start) - 1) * self.num_views

    @property
    def folder(self):
        return self.folders[0].parent

    # ---- what is in the files, opened when it is first asked for

    def _load(self, name, mmap_mode=None):
        return [np.load(folder / name, mmap_mode=mmap_mode) for folder in self.folders]

    def _map(self, name):
        return join_arrays(self._load(name, "r"))

    @cached_property
    def images(self):
        streams = [np.memmap(folder / "images" / f"images.{self.image_format}", np.uint8, "r")
                   for folder in self.folders]
        if self.image_format == "jpeg":
            starts = self._load("images/image_start.npy")
            return JpegImages(join_arrays([*map(ByteRows, streams, starts)]))
        shape = -1, 3, STORE_IMAGE_SIZE, STORE_IMAGE_SIZE
        return join_arrays([stream.reshape(shape) for stream in streams])

    @cached_property
    def records(self):
        return Records(join_arrays(
            [ByteRows(np.memmap(folder / "images" / "records.jsonl", np.uint8, "r"), start)
             for folder, start in zip(self.folders, self._load("images/record_start.npy"))]))

    image_embed, text_tokens, text_embed, text_encodings = map(
        map_embedding, ("image_embed", "text_tokens", "text_embed", "text_encodings"))

    @cached_property
    def token_start(self):
        return join_starts(self._load(f"{self.embed_name}/token_start.npy"))

    # ---- reading

    def draw_captions(self, indexes, u):
        """One caption of each picture, chosen by u (B,) in [0, 1): (B,) rows of the text arrays."""
        photos = np.asarray(indexes) // self.num_views
        start, end = self.caption_start[photos], self.caption_start[photos + 1]
        return start + np.minimum((u.numpy() * (end - start)).astype(np.int64), end - start - 1)

    def load_text_encodings(self, rows, max_text_len):
        """(B, max_text_len, D) as stored, zero after the end token."""
        rows = np.asarray(rows)
        out = np.zeros((len(rows), max_text_len, self.text_encodings.shape[-1]),
                       self.text_encodings.dtype)
        starts, ends = self.token_start[rows].tolist(), self.token_start[rows + 1].tolist()
        for row, start, end in zip(out, starts, ends):
            fit_text_encodings(self.text_encodings[start:end], row)
        return torch.from_numpy(out)

    def find_image_of_nearest_caption(self, text_embed):
        """text_embed (B, D) -> image_embed (B, D) of the pictures whose captions are nearest."""
        best = torch.full((len(text_embed),), -2.0, device=text_embed.device)
        rows = torch.zeros(len(text_embed), dtype=torch.long, device=text_embed.device)
        for start in range(0, len(self.text_embed), 1 << 16):
            part = torch.from_numpy(np.array(self.text_embed[start:start + (1 << 16)]))
            value, index = (text_embed @ part.to(text_embed).T).max(1)
            rows = torch.where(value > best, index + start, rows)
            best = torch.maximum(best, value)
        photos = np.searchsorted(self.caption_start, rows.cpu().numpy(), side="right") - 1
        return torch.from_numpy(self.image_embed[photos * self.num_views]).to(text_embed)

    # ---- derived once, shard by shard

    def load_small_images(self, size):
        """All pictures at `size` pixels, (N, 3, size, size) uint8, antialiased, memory-mapped."""
        def build(store, part):
            small = np.lib.format.open_memmap(part / "images.npy", "w+", np.uint8,
                                              (len(store), 3, size, size))
            for i in range(0, len(store), 256):
                small[i:i + 256] = resize(torch.from_numpy(store.images[i:i + 256].copy()), size)
            small.flush()
        return self._derive(f"images-{size}", {"size": size}, build, "images.npy")

    def load_tokens(self, tokenize, context_length):
        """text_tokens (M, context_length) uint16 of all captions for another CLIP than the store's,
        memory-mapped. tokenize: list of B strings -> (B, context_length)."""
        def build(store, part):
            captions = [caption for record in store.records for caption in record.captions]
            np.save(part / "text_tokens.npy", tokenize(captions).numpy().astype(np.uint16))
        return self._derive(f"tokens-{context_length}", {"context_length": context_length}, build,
                            "text_tokens.npy")

    def _derive(self, name, source, build, file):
        share_out(self.folders, lambda folder, wait: build_once(
            folder / name, source, lambda part: build(Store([folder]), part), wait))
        return self._map(f"{name}/{file}")


class Records:
    """The Record of each photo, read when it is asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Record(*json.loads(self.rows[index]))


def fit_text_encodings(text_encodings, row):
    """Copies text_encodings (L, D) of one caption into `row` (max_text_len, D). A caption that is
    longer keeps its first tokens and its end token."""
    kept = min(len(text_encodings), len(row))
    row[:kept] = text_encodings[:kept]
    row[kept - 1] = text_encodings[-1]


def find_image_format(folder):
    """"uint8" or "jpeg", how the pictures in `folder` of a store are kept; None: there are none."""
    return next((name for name in ("uint8", "jpeg") if (folder / f"images.{name}").exists()), None)


class JpegImages:
    """Pictures kept as JPEG files, `files` a sequence of bytes; read like an array (N, 3, 256, 256)
    of uint8 along its first axis. Threads decode several at once."""

    def __init__(self, files):
        self.files, self.shape = files, (len(files), 3, STORE_IMAGE_SIZE, STORE_IMAGE_SIZE)
        self.pool = ThreadPoolExecutor(count_cores(), "decode")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if isinstance(index, (int, np.integer)):
            return decode_jpeg(self.files[index]).transpose(2, 0, 1)
        indexes = range(len(self))[index] if isinstance(index, slice) else index
        return np.stack(list(self.pool.map(self.__getitem__, indexes)))

    def read_crops(self, indexes, corners, size):
        """(B, 3, size, size) of pictures `indexes` (B,), cut out at corners [(top, left)]. Decodes
        only the rows that a crop needs; a thread does several, so that handing them out costs
        little."""
        crops = np.empty((len(indexes), 3, size, size), np.uint8)

        def read(part):
            for row in part:
                top, left = corners[row]
                content, skipped = cut_jpeg(self.files[indexes[row]], top, top + size)
                rows = decode_jpeg(content)[top - skipped:top - skipped + size]
                crops[row] = rows[:, left:left + size].transpose(2, 0, 1)
        list(self.pool.map(read, [range(start, min(start + CROPS_AT_A_TIME, len(crops)))
                                  for start in range(0, len(crops), CROPS_AT_A_TIME)]))
        return crops


def count_cores():
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load_pictures(store, size, device):
    """(N, 3, size, size) uint8 of a store: a tensor on a GPU where that takes at most a quarter of
    its free memory, otherwise read from disk as they are needed."""
    pictures = store.images if size == STORE_IMAGE_SIZE else store.load_small_images(size)
    if device.type != "cuda" or math.prod(pictures.shape) > torch.cuda.mem_get_info(device)[0] / 4:
        return pictures
    whole = torch.empty(pictures.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pictures), 1024):
        whole[start:start + 1024] = torch.from_numpy(np.array(pictures[start:start + 1024]))
    return whole


def read_crops(pictures, indexes, corners, size):
    """(B, 3, size, size) uint8 of pictures that are not on a GPU, cut out at corners (B, 2) of top
    and left."""
    corners = corners.tolist()
    if isinstance(pictures, JpegImages):
        return torch.from_numpy(pictures.read_crops(indexes, corners, size))
    return torch.from_numpy(np.stack([pictures[index][:, top:top + size, left:left + size]
                                      for index, (top, left) in zip(indexes, corners)]))


def draw_indexes(num_images, seed, step, batch_size):
    """Picture indexes of the global batch of `step` (from 0): epochs of shuffled pictures in a row,
    each picture once an epoch, as a pure function of its arguments."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_images)
    return np.concatenate([shuffle(places[epochs == epoch], num_images, seed, "epoch", epoch)
                           for epoch in np.unique(epochs)])
