"""Makes the prepared store: every photo decoded once, every photo and caption embedded once.

Killed at any moment, the same call resumes and ends with the same bytes.
"""

import contextlib
import io
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import UnidentifiedImageError
from tqdm import tqdm

from dalle2.archives import open_member
from dalle2.data import Store, count_cores, find_image_format
from dalle2.errors import UserError
from dalle2.files import GrowingFiles, build_once, read_source, share_out
from dalle2.images import STORE_IMAGE_SIZE, cut_view, encode_jpeg, read_pixels, resize_and_crop
from dalle2.shards import list_shards

BYTES_A_PICTURE = {"uint8": 3 * STORE_IMAGE_SIZE ** 2, "jpeg": 36_000}  # the latter: COCO's mean
IMAGES_A_STEP, CAPTIONS_A_STEP, BATCH_SIZE = 256, 4096, 256


def prepare_store(img_path, annot_path, store_dir, *, clip=None, max_images=None, num_views=1,
                  image_format=None, strict=False, num_workers=None, progress=True):
    """The Store of a picture folder and its captions file, or of tars, made if it does not exist.
    Processes that call this at the same time, on machines that share the disk too, divide the
    shards among themselves.

    clip: the FrozenClip to embed with; None leaves the embeddings out. max_images: how many of
    the pictures, the first ones; None: all.
    num_views: pictures that are made of each photo, the middle and random squares of it.
    image_format: "uint8", or "jpeg" for a small disk; None: the format it has, or uint8.
    strict: a picture that cannot be read is a UserError instead of being left out.
    """
    root, shards = list_shards(img_path, annot_path, store_dir, max_images, num_views, strict)
    image_format = check_format([root / shard.name for shard in shards], image_format)
    missing = sum(shard.count for shard in shards
                  if read_source(root / shard.name / "images") != shard.source)
    if missing:
        held = sum(file.stat().st_size for file in root.glob("*/images.part/images.*"))
        check_free(root, f"{missing} pictures",
                   missing * num_views * BYTES_A_PICTURE[image_format] - held)
    embed_name = clip and f"clip-{clip.fingerprint}"
    if clip and progress and not all((root / shard.name / embed_name).exists() for shard in shards):
        for line in clip.list_differences(STORE_IMAGE_SIZE):
            print(f"note: {line}", flush=True)

    def make(shard, wait):
        """Whether the shard is made, or left out; False: another process is at it."""
        folder = root / shard.name
        try:
            made = build_once(folder / "images", shard.source, lambda part: prepare_images(
                shard.load(), part, num_views=num_views, num_workers=num_workers or count_cores(),
                image_format=image_format, strict=strict, progress=progress), wait)
            if made and clip is not None:
                made = build_once(
                    folder / embed_name, {"fingerprint": clip.fingerprint},
                    lambda part: prepare_embeddings(Store([folder]), clip, part, progress), wait)
            return made is not None
        except UserError as error:
            error.is_local = True
            if strict or error.argument == "store_dir" or (error.argument and not shard.tar):
                raise
            problems[shard.name] = error
            tqdm.write(f"warning: {shard.tar or folder} is left out ({error.args[0]})")
            return True

    problems = {}
    share_out(shards, make)
    if len(problems) == len(shards):
        raise problems.popitem()[1]
    store = Store([root / shard.name for shard in shards if shard.name not in problems], embed_name)
    if strict:
        left_out = sum(shard.count or len(shard.load()) for shard in shards) - len(store.records)
        if left_out:
            raise UserError(f"{root} was made with {left_out} pictures left out; delete it and "
                            "mend them", "strict")
    return store


def check_format(folders, image_format):
    """How the pictures of a store are kept, or are to be; UserError where it holds another."""
    held = next(filter(None, (find_image_format(folder / name) for folder in folders
                              for name in ("images", "images.part"))), None)
    if held and image_format not in (None, held):
        raise UserError(f"{folders[0].parent} holds {held} already; delete it or choose another "
                        "--store_dir", "image_format")
    return held or image_format or "uint8"


# ----------------------------------------------------------------------------------------------
# pictures


def prepare_images(records, folder, *, num_workers, num_views=1, image_format=None, strict=False,
                   progress=True):
    """Decodes `records` into `<folder>/images.<image_format>`, the views of one photo after those
    of the other. Beside it `records.jsonl` has id, name and captions of each photo, and
    `image_start`, `record_start` and `caption_start` where each view, each photo's line and its
    captions begin. A photo that cannot be read is left out with a line.
    """
    image_format = find_image_format(folder) or image_format or "uint8"
    name = f"images.{image_format}"
    files = GrowingFiles(folder, [name])
    outcomes = [entry for note in files.notes for entry in note]  # views' sizes, or what is wrong
    views = f" in {num_views} views each" if num_views > 1 else ""
    announce(folder, f"{len(records)} pictures{views}", (len(records) - len(outcomes))
             * num_views * BYTES_A_PICTURE[image_format], progress)
    chunks = [records[i:i + IMAGES_A_STEP]
              for i in range(len(outcomes), len(records), IMAGES_A_STEP)]
    read = partial(_read_picture, image_format=image_format, num_views=num_views)
    with ThreadPoolExecutor(num_workers) as pool, _one_thread(), \
            _show(len(records), len(outcomes), "decoding", " pictures", progress) as bar:
        ahead = pool.map(read, chunks[0]) if chunks else None
        for number, chunk in enumerate(chunks, start=1):
            results = ahead
            ahead = pool.map(read, chunks[number]) if number < len(chunks) else None
            blocks, note = [], []
            for record, (views, reason) in zip(chunk, results):
                if reason and strict:
                    raise UserError(f"{record.path}: {reason}", "strict")
                if reason:
                    tqdm.write(f"warning: {record.path} is left out ({reason})")
                blocks += views
                note.append(reason or [len(view) for view in views])
                bar.update()
            files.append({name: b"".join(blocks)}, note)
            outcomes += note
    kept = [(record, sizes) for record, sizes in zip(records, outcomes) if isinstance(sizes, list)]
    if not kept:
        raise UserError(f"none of {len(records)} pictures could be read, such as "
                        f"{records[0].path} ({outcomes[0]})")
    if len(kept) < len(records):
        tqdm.write(f"warning: {len(records) - len(kept)} of {len(records)} pictures are left out")
    save_records(folder, kept)


def save_records(folder, kept):
    """Writes what a store says of its photos; kept: [(CaptionedImage, bytes of each view)]."""
    rows = [json.dumps([record.image_id, record.name, record.captions]).encode() + b"\n"
            for record, _ in kept]
    (folder / "records.jsonl").write_bytes(b"".join(rows))
    for name, lengths in (("record_start", map(len, rows)),
                          ("caption_start", (len(record.captions) for record, _ in kept)),
                          ("image_start", (size for _, sizes in kept for size in sizes))):
        np.save(folder / f"{name}.npy", np.cumsum([0, *lengths]))


def _read_picture(record, image_format, num_views):
    """(bytes of each view as the store keeps it, "") or ([], what is wrong with the file)."""
    try:
        pixels = read_pixels(record.path)
    except FileNotFoundError:
        return [], "no such file"
    except UnidentifiedImageError:
        with open_member(record.path) as file:
            return [], "not a picture" if file.read(1) else "an empty file"
    except (OSError, ValueError) as error:
        return [], str(error)
    # the same views whenever it is prepared
    chance = random.Random(os.fsencode(os.path.basename(record.path)))
    views = [resize_and_crop(pixels, STORE_IMAGE_SIZE)]
    for _ in range(num_views - 1):
        views.append(cut_view(pixels, [chance.random() for _ in range(4)], STORE_IMAGE_SIZE))
    return [encode_jpeg(view) if image_format == "jpeg" else view.numpy().tobytes()
            for view in views], ""


# ----------------------------------------------------------------------------------------------
# embeddings


def prepare_embeddings(store, clip, folder, progress=True):
    """Embeds the pictures of `store` (N) and their captions (M) with a FrozenClip into `folder`:
    image_embed (N, D), text_tokens (M, L), text_embed (M, D) and text_encodings (sum of caption
    lengths, D), float16, with the lengths as token_start (M + 1,)."""
    captions = [caption for record in store.records for caption in record.captions]
    text_tokens = clip.tokenize(captions)
    lengths = clip.compute_text_mask(text_tokens).sum(1)  # (M,)
    token_start = np.concatenate([[0], lengths.cumsum(0).numpy()])
    np.save(folder / "token_start.npy", token_start)
    np.save(folder / "text_tokens.npy", text_tokens.numpy().astype(np.uint16))
    shapes = {"image_embed.npy": (len(store), clip.embed_dim),
              "text_embed.npy": (len(captions), clip.embed_dim),
              "text_encodings.npy": (int(token_start[-1]), clip.embed_dim)}
    announce(folder, f"embeddings of {len(store)} pictures and {len(captions)} captions",
             2 * sum(a * b for a, b in shapes.values()), progress)
    files = GrowingFiles(folder, list(shapes))
    if not files.notes:
        files.append({name: _build_npy_header(shape) for name, shape in shapes.items()}, [0, 0])
    images_done, captions_done = (sum(note[kind] for note in files.notes) for kind in (0, 1))

    with _show(len(store), images_done, "embedding pictures", " pictures", progress) as bar:
        for start in range(images_done, len(store), BATCH_SIZE):
            batch = torch.from_numpy(store.images[start:start + BATCH_SIZE].copy())
            files.append({"image_embed.npy": _to_bytes(clip.embed_image(batch))}, [len(batch), 0])
            bar.update(len(batch))
    with _show(len(captions), captions_done, "embedding captions", " captions", progress) as bar:
        for start in range(captions_done, len(captions), CAPTIONS_A_STEP):
            window = slice(start, start + CAPTIONS_A_STEP)
            text_embed, text_encodings = _embed_captions(clip, text_tokens[window], lengths[window])
            files.append({"text_embed.npy": _to_bytes(text_embed),
                          "text_encodings.npy": _to_bytes(text_encodings)}, [0, len(text_embed)])
            bar.update(len(text_embed))


def _embed_captions(clip, text_tokens, lengths):
    """(B, D) and (sum of lengths, D), computed in batches of captions of about the same length."""
    order = lengths.argsort()
    embeds, encodings = [None] * len(order), [None] * len(order)
    for rows in order.split(BATCH_SIZE):
        text_embed, text_encodings = clip.embed_text(text_tokens[rows])
        for row, embed, encoding in zip(rows.tolist(), text_embed.half().cpu(),
                                        text_encodings.half().cpu()):
            embeds[row], encodings[row] = embed, encoding[:lengths[row]]
    return torch.stack(embeds), torch.cat(encodings)


def _to_bytes(array):
    return array.half().cpu().numpy().tobytes()


def _build_npy_header(shape):
    """What a float16 .npy file of `shape` begins with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return header.getvalue()


# ----------------------------------------------------------------------------------------------
# telling


def announce(folder, what, num_bytes, progress=True):
    """Says how much disk `what` will take; UserError where there is less."""
    check_free(folder.parent, what, num_bytes)
    if progress:
        print(f"preparing {folder.parent}: {what}, {num_bytes / 1e9:.2f} GB", flush=True)


def check_free(folder, what, num_bytes):
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(f"{what} need {num_bytes / 1e9:.1f} GB in {folder}, "
                        f"{free / 1e9:.1f} GB are free", "store_dir")


def _show(total, done, what, unit, progress):
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=None if progress else True)


@contextlib.contextmanager
def _one_thread():
    """One thread of torch in each worker; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
