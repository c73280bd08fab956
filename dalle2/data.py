"""The prepared store that training reads.

`dalle2.prepare` makes a store; training and sampling read it here through memory maps.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from dalle2.files import build_once, read_source
from dalle2.images import STORE_IMAGE_SIZE, cut_jpeg, decode_jpeg, resize
from dalle2.rng import derive_seed

CROPS_AT_A_TIME = 8  # that a thread decodes


class Store:
    """A prepared data set of P photos, `num_views` pictures of each (N = P num_views in all), and M
    captions, memory-mapped.

    images (N, 3, 256, 256) uint8, those of photo i from i num_views on; image_ids, file_names,
    captions: lists of P; caption_start (P + 1,): captions of photo i are rows caption_start[i] to
    caption_start[i + 1] of text_tokens (M, L) and text_embed (M, D). image_embed (N, D).
    text_encodings (tokens, D): caption j is rows token_start[j] to token_start[j + 1]. Embeddings
    are there if `embed_folder` is.
    """

    num_views = 1

    def __init__(self, folder, embed_folder=None):
        self.folder = Path(folder)
        self.source = read_source(self.folder / "images")
        self.num_views = self.source.get("num_views", 1)
        rows = json.loads((self.folder / "images" / "images.json").read_text())
        self.image_ids, self.file_names, self.captions = map(list, zip(*rows))
        self.image_format = find_image_format(self.folder / "images")
        stream = np.memmap(self.folder / "images" / f"images.{self.image_format}", np.uint8, "r")
        if self.image_format == "jpeg":
            self.images = JpegImages(stream, np.load(self.folder / "images" / "image_start.npy"))
        else:
            self.images = stream.reshape(len(self), 3, STORE_IMAGE_SIZE, STORE_IMAGE_SIZE)
        self.caption_start = np.cumsum([0] + [len(captions) for captions in self.captions])
        if embed_folder is not None:
            for name in ("image_embed", "text_tokens", "text_embed", "token_start",
                         "text_encodings"):
                setattr(self, name, np.load(embed_folder / f"{name}.npy", mmap_mode="r"))

    def __len__(self):
        return len(self.image_ids) * self.num_views

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

    def load_small_images(self, size):
        """All pictures at `size` pixels, (N, 3, size, size) uint8, antialiased, memory-mapped;
        derived once."""
        def build(part):
            small = np.lib.format.open_memmap(part / "images.npy", "w+", np.uint8,
                                              (len(self), 3, size, size))
            for i in range(0, len(self), 256):
                small[i:i + 256] = resize(torch.from_numpy(self.images[i:i + 256].copy()), size)
            small.flush()
        folder = build_once(self.folder / f"images-{size}", {"size": size}, build)
        return np.load(folder / "images.npy", mmap_mode="r")


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
    """Pictures kept as JPEG files, one after the other in `stream`, picture i from start[i] to
    start[i + 1]; read like an array (N, 3, 256, 256) of uint8 along its first axis. Threads decode
    several at once."""

    def __init__(self, stream, start):
        self.stream, self.start = stream, start
        self.shape = (len(start) - 1, 3, STORE_IMAGE_SIZE, STORE_IMAGE_SIZE)
        self.pool = ThreadPoolExecutor(count_cores(), "decode")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if isinstance(index, (int, np.integer)):
            return decode_jpeg(self._read(index)).transpose(2, 0, 1)
        return np.stack(list(self.pool.map(self.__getitem__, np.arange(len(self))[index])))

    def read_crops(self, indexes, corners, size):
        """(B, 3, size, size) of pictures `indexes` (B,), cut out at corners [(top, left)]. Decodes
        only the rows that a crop needs; a thread does several, so that handing them out costs
        little."""
        crops = np.empty((len(indexes), 3, size, size), np.uint8)

        def read(part):
            for row in part:
                top, left = corners[row]
                content, skipped = cut_jpeg(self._read(indexes[row]), top, top + size)
                rows = decode_jpeg(content)[top - skipped:top - skipped + size]
                crops[row] = rows[:, left:left + size].transpose(2, 0, 1)
        list(self.pool.map(read, [range(start, min(start + CROPS_AT_A_TIME, len(crops)))
                                  for start in range(0, len(crops), CROPS_AT_A_TIME)]))
        return crops

    def _read(self, index):
        return self.stream[self.start[index]:self.start[index + 1]].tobytes()


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
    return torch.from_numpy(np.stack([pictures[index, :, top:top + size, left:left + size]
                                      for index, (top, left) in zip(indexes, corners)]))


@lru_cache(maxsize=2)
def _permutation(num_images, seed, epoch):
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return torch.randperm(num_images, generator=generator).numpy()


def draw_indexes(num_images, seed, step, batch_size):
    """Picture indexes of the global batch of `step` (from 0): epochs of shuffled pictures in a row,
    each picture once an epoch, as a pure function of its arguments."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(num_images, seed, p // num_images)[p % num_images]
                     for p in positions])
