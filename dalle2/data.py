"""COCO captions, the geometry of pictures, and the prepared store that training reads.

A store is a folder made once from a picture folder and a captions file: every picture decoded once
(short side resized to 256 with an antialiased filter, centre crop, uint8), and for one CLIP the
image embeddings, the caption tokens, the text embeddings and the text encodings without padding.
Training and sampling read it through memory maps. The only file that imports pycocotools.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from dalle2.config import UserError
from dalle2.rng import derive_seed

STORE_IMAGE_SIZE = 256


@dataclass(frozen=True)
class CaptionedImage:
    image_id: int
    path: str
    captions: tuple[str, ...]


def load_captions(annot_path, img_path, split="train", max_images=None):
    """list of CaptionedImage of a COCO captions file, in the order of image ids.

    Pictures without a caption are left out. Raises UserError, naming --<split>_annot_path or
    --<split>_img_path, where file or folder is absent or holds something else.
    """
    flag = f"--{split}_annot_path"
    if not os.path.isdir(img_path):
        raise UserError(f"--{split}_img_path: no such folder: {img_path}")
    if not os.path.isfile(annot_path):
        raise UserError(f"{flag}: no such file: {annot_path}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(annot_path)
        records = [CaptionedImage(image_id,
                                  os.path.join(img_path, coco.imgs[image_id]["file_name"]),
                                  tuple(c for a in coco.imgToAnns[image_id]
                                        if (c := a["caption"].strip())))
                   for image_id in sorted(coco.imgs)]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{flag}: {annot_path} is not a COCO captions file "
                        f"({type(error).__name__}: {error})") from error
    records = [record for record in records if record.captions][:max_images]
    if not records:
        raise UserError(f"{flag}: {annot_path} holds no captioned image")
    if not any(os.path.isfile(record.path) for record in records[:100]):
        raise UserError(f"--{split}_img_path: {img_path} holds none of the first pictures that "
                        f"{annot_path} names, such as {os.path.basename(records[0].path)}")
    return records


# ----------------------------------------------------------------------------------------------
# geometry


def load_image(path, size=STORE_IMAGE_SIZE):
    """A picture file as uint8 (3, size, size): turned as its EXIF says, RGB, short side resized to
    `size` with an antialiased filter, centre crop. Raises OSError or ValueError where it cannot."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    return resize_and_crop(torch.from_numpy(np.array(image)).permute(2, 0, 1), size)


def resize_and_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size): short side to `size` (bicubic, antialiased), centre."""
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    return TF.center_crop(resize(image, shape), [size, size])


def resize(image, size):
    """Resizes (..., 3, H, W) to `size`, a side or [height, width], bicubic with antialiasing."""
    size = [size, size] if isinstance(size, int) else list(size)
    if list(image.shape[-2:]) == size:
        return image
    return TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


# ----------------------------------------------------------------------------------------------
# preparation


class _Decoder(Dataset):
    """Pictures by index; None for one that cannot be read."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        try:
            return index, load_image(self.records[index].path), ""
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return index, None, f"{type(error).__name__}: {error}"


def prepare_images(records, folder, num_workers, progress=True):
    """Decodes `records` into `<folder>/images.npy`, (N, 3, 256, 256) uint8, with `images.json`
    (ids, captions) beside it. A picture that cannot be read is left out with a line."""
    shape = (len(records), 3, STORE_IMAGE_SIZE, STORE_IMAGE_SIZE)
    kept = []
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    loader = DataLoader(_Decoder(records), batch_size=None, num_workers=num_workers)
    for index, image, error in tqdm(loader, desc="decoding", unit=" pictures",
                                    disable=None if progress else True):
        if image is None:
            tqdm.write(f"warning: {records[index].path} is left out ({error})")
            continue
        images[len(kept)] = image.numpy()
        kept.append(records[index])
    if not kept:
        raise UserError(f"none of {len(records)} pictures could be read, such as {records[0].path}")
    images.flush()
    # the rows of pictures that were left out stay unused at the end of images.npy
    (folder / "images.json").write_text(json.dumps(
        [[r.image_id, os.path.basename(r.path), r.captions] for r in kept]))
    return len(kept)


def prepare_embeddings(images, captions_of, clip, folder, batch_size=256, progress=True):
    """Embeds `images` (N, 3, 256, 256) uint8 and their captions with a FrozenClip into `folder`:
    image_embed (N, D), text_tokens (M, L), text_embed (M, D) and text_encodings (sum of caption
    lengths, D), float16, with the lengths as token_start (M + 1,)."""
    captions = [caption for group in captions_of for caption in group]
    image_embed = [clip.embed_image(torch.from_numpy(images[i:i + batch_size].copy())).half().cpu()
                   for i in tqdm(range(0, len(images), batch_size), desc="embedding pictures",
                                 unit=f"x{batch_size}", disable=None if progress else True)]
    np.save(folder / "image_embed.npy", torch.cat(image_embed).numpy())
    text_tokens = clip.tokenize(captions)
    lengths = clip.compute_text_mask(text_tokens).sum(1)
    token_start = np.concatenate([[0], lengths.cumsum(0).numpy()])
    np.save(folder / "token_start.npy", token_start)
    np.save(folder / "text_tokens.npy", text_tokens.numpy().astype(np.uint16))
    text_embed = text_encodings = None
    for i in tqdm(range(0, len(captions), batch_size), desc="embedding captions",
                  unit=f"x{batch_size}", disable=None if progress else True):
        batch = text_tokens[i:i + batch_size]
        embed, encodings = clip.embed_text(batch)
        if text_embed is None:
            text_embed, text_encodings = (
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
                for name, shape in (("text_embed", (len(captions), embed.shape[-1])),
                                    ("text_encodings",
                                     (int(token_start[-1]), encodings.shape[-1]))))
        text_embed[i:i + len(batch)] = embed.half().cpu().numpy()
        kept = encodings[clip.compute_text_mask(batch.to(encodings.device))]  # (tokens, D)
        text_encodings[token_start[i]:token_start[i + len(batch)]] = kept.half().cpu().numpy()
    text_embed.flush()
    text_encodings.flush()


def build_once(folder, source, build):
    """Makes `folder` by `build(part folder)`, unless it was made from the same `source` before.

    `source` is what the folder is made from, as JSON; it is recorded in `<folder>/source.json`.
    Among the processes of one machine only the first builds; the others wait for it.
    """
    folder = Path(folder)
    while not _is_built(folder, source):
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(0.5)
            continue
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        build(part)
        (part / "source.json").write_text(json.dumps(source))
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    return folder


def _is_built(folder, source):
    path = folder / "source.json"
    return path.is_file() and json.loads(path.read_text()) == source


def prepare_store(img_path, annot_path, store_dir, *, split="train", clip=None, fingerprint="",
                  max_images=None, num_workers=None, progress=True):
    """The Store of a picture folder and its captions file, made where it is not there yet.

    clip, fingerprint: a function that loads the FrozenClip to embed with, and the hex digits that
    name its weights; None leaves the embeddings out. max_images: the first so many pictures only.
    """
    records = load_captions(annot_path, img_path, split, max_images)
    name = os.path.basename(os.path.normpath(img_path))
    source = {"img_path": os.path.abspath(img_path), "max_images": max_images,
              "annotations": hashlib.sha256(Path(annot_path).read_bytes()).hexdigest(),
              "image_size": STORE_IMAGE_SIZE}
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]
    folder = Path(store_dir) / f"{name}-{key}"
    num_workers = os.cpu_count() if num_workers is None else num_workers
    build_once(folder / "images", source,
               lambda part: prepare_images(records, part, num_workers, progress))
    if clip is None:
        return Store(folder)
    embed_folder = build_once(
        folder / f"clip-{fingerprint}", {"fingerprint": fingerprint},
        lambda part: prepare_embeddings(Store(folder).images, Store(folder).captions, clip(),
                                        part, progress=progress))
    return Store(folder, embed_folder)


# ----------------------------------------------------------------------------------------------
# reading


class Store:
    """A prepared data set of N pictures and M captions, memory-mapped.

    images (N, 3, 256, 256) uint8; image_ids, file_names, captions: lists of N; caption_start
    (N + 1,): captions of picture i are rows caption_start[i] to caption_start[i + 1] of text_tokens
    (M, L) and text_embed (M, D). image_embed (N, D). Embeddings are there if `embed_folder` is.
    """

    def __init__(self, folder, embed_folder=None):
        self.folder = Path(folder)
        rows = json.loads((self.folder / "images" / "images.json").read_text())
        self.image_ids, self.file_names, self.captions = map(list, zip(*rows))
        self.images = np.load(self.folder / "images" / "images.npy", mmap_mode="r")[:len(rows)]
        self.caption_start = np.cumsum([0] + [len(captions) for captions in self.captions])
        if embed_folder is not None:
            for name in ("image_embed", "text_tokens", "text_embed", "token_start",
                         "text_encodings"):
                setattr(self, name, np.load(embed_folder / f"{name}.npy", mmap_mode="r"))

    def __len__(self):
        return len(self.image_ids)

    def draw_captions(self, indexes, u):
        """One caption of each picture, chosen by u (B,) in [0, 1): (B,) rows of the text arrays."""
        start, end = self.caption_start[indexes], self.caption_start[np.asarray(indexes) + 1]
        return start + np.minimum((u.numpy() * (end - start)).astype(np.int64), end - start - 1)

    def load_text_encodings(self, rows, max_text_len):
        """(B, max_text_len, D) float32, zero after the end token. A caption that is longer keeps
        its first tokens and its end token."""
        out = torch.zeros(len(rows), max_text_len, self.text_encodings.shape[-1])
        for i, row in enumerate(rows):
            start, end = self.token_start[row], self.token_start[row + 1]
            length = min(end - start, max_text_len)
            out[i, :length] = torch.from_numpy(
                self.text_encodings[start:start + length].astype(np.float32))
            out[i, length - 1] = torch.from_numpy(self.text_encodings[end - 1].astype(np.float32))
        return out

    def load_small_images(self, size):
        """All pictures at `size` pixels, (N, 3, size, size) uint8, antialiased, derived once."""
        folder = self.folder / f"images-{size}"
        def build(part):
            small = np.lib.format.open_memmap(part / "images.npy", "w+", np.uint8,
                                              (len(self), 3, size, size))
            for i in range(0, len(self), 256):
                images = torch.from_numpy(self.images[i:i + 256].copy())
                small[i:i + 256] = resize(images, size).numpy()
            small.flush()
        build_once(folder, {"size": size, "num_images": len(self)}, build)
        return np.load(folder / "images.npy", mmap_mode="r")

    def load_small_image(self, index, size):
        """Picture `index` as float (3, size, size) in [0, 1]."""
        return resize(torch.from_numpy(self.images[index].copy()), size).float() / 255


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
