"""Rendering many captions into a folder: batches, processes, and going on where it stopped."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from dalle2.config import UserError
from dalle2.data import load_captions, load_image
from dalle2.images import make_unique_stems, save_image
from dalle2.processes import join_processes, share_errors
from dalle2.rng import derive_seed


def list_coco_jobs(annot_path, img_path, seed, num_images=None):
    """A job for each of the first `num_images` pictures of a COCO captions file, in the order of
    their ids: {"caption", "image_id", "photo", "seed"}. The caption is one of the picture's, always
    the same one. Raises UserError naming --test_annot_path or --test_img_path."""
    records = load_captions(annot_path, img_path, "test", num_images)
    return [{"caption": record.captions[derive_seed("caption", record.image_id)
                                        % len(record.captions)],
             "image_id": record.image_id, "photo": record.path,
             "seed": derive_seed(seed, index) % 2 ** 31}
            for index, record in enumerate(records)]


def render_jobs(pipeline, jobs, output_dir, settings, *, batch_size=None, from_photos=False,
                prior_options=None, options=None):
    """Renders what `output_dir` does not hold yet; the processes of a launch share the work. What
    it holds of other captions stays.

    jobs: list of {"caption", "image_id", "photo", "seed"}, and "file" where it is not to be named
    after its caption (.png or .jpg); settings: what the pictures depend on besides, as JSON:
    pictures of other settings are rendered again; batch_size: None: 16 on a CPU, 256 on a GPU,
    halved where its memory does not suffice; from_photos: from the embedding of the job's photo
    instead of its caption's; prior_options, options: of Pipeline.sample_image_embed and
    Pipeline.sample_images. Returns a list of {"file", "caption", "image_id", "seed",
    "clip_score"} in the order of `jobs`. Raises UserError, in all processes, where a picture is
    not finite; it is not saved.
    """
    state, output_dir = join_processes(), Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    # one process looks: another may look later, when some of the work is done
    (records,) = broadcast_object_list(
        [read_records(output_dir) if state.is_main_process else None])
    stems = make_unique_stems([job["caption"] for job in jobs], {
        Path(entry["file"]).stem: entry["caption"] for _, entry in records})
    jobs = [{"file": f"{stem}.jpg", **job} for job, stem in zip(jobs, stems)]
    done = {get_key(entry): entry for made_with, entry in records if made_with == digest}
    todo = [job for job in jobs if get_key(job) not in done]
    if len(todo) < len(jobs):
        state.print(f"{output_dir}: {len(jobs) - len(todo)} of {len(jobs)} rendered already")
    share, entries = todo[state.process_index::state.num_processes], []
    size = batch_size or (16 if pipeline.clip.device.type == "cpu" else 256)
    with share_errors(), \
            open(output_dir / f".rendered-{state.process_index}.jsonl", "a") as file, \
            tqdm(total=len(share), desc="rendering", unit=" pictures",
                 disable=not state.is_main_process or not todo,
                 mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for batch, images, scores in render_batches(pipeline, share, size, from_photos,
                                                    prior_options or {}, options or {}):
            for job, image, score in zip(batch, images, scores):
                save_image(image, output_dir / job["file"])
                entry = {name: job[name] for name in ("file", "caption", "image_id", "seed")}
                entries.append({**entry, "clip_score": score})
                file.write(json.dumps({"digest": digest, "time": time.time(), **entries[-1]})
                           + "\n")
            file.flush()
            bar.update(len(batch))
    done |= {get_key(entry): entry for entry in gather_object(entries)}
    return [done[get_key(job)] for job in jobs]


def render_batches(pipeline, jobs, size, from_photos, prior_options, options):
    """Yields (jobs, image (B, 3, H, W) in [0, 1], list of B CLIP scores) for `size` jobs after the
    other; for half as many, from then on, where a GPU's memory does not suffice."""
    start = 0
    while start < len(jobs):
        batch, drawn = jobs[start:start + size], None
        try:
            with pipeline.use_precision():
                drawn = render_batch(pipeline, batch, from_photos, prior_options, options)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        if drawn is None:  # only here is the memory free that the error held on to
            torch.cuda.empty_cache()
            size = -(-len(batch) // 2)
            continue
        yield batch, *drawn
        start += len(batch)


def render_batch(pipeline, batch, from_photos, prior_options, options):
    """(image (B, 3, H, W) in [0, 1], list of B CLIP scores) of jobs."""
    captions, seeds = ([job[name] for job in batch] for name in ("caption", "seed"))
    if from_photos:
        image_embed = pipeline.embed_images(torch.stack([load_image(job["photo"])
                                                         for job in batch]))
    else:
        image_embed = pipeline.sample_image_embed(captions, seeds, **prior_options)
    flag, name = ("--clip_pretrained", "CLIP") if from_photos else ("--prior_ckpt", "prior")
    check_finite(image_embed, batch, pipeline.precision, flag, name)
    images = pipeline.sample_images(image_embed, seeds, **options)
    check_finite(images, batch, pipeline.precision, "--decoder_ckpt", "decoder")
    text_embed = pipeline.embed_captions(captions)[0]
    scores = (pipeline.embed_images(images) * text_embed).sum(-1)
    check_finite(scores, batch, pipeline.precision, "--clip_pretrained", "CLIP")
    return images, [round(score, 4) for score in scores.tolist()]


def check_finite(values, batch, precision, flag, name):
    """Raises UserError where values (B, ...) of jobs, the output of network `name` in the file that
    `flag` names, hold nan or infinity."""
    bad = (~values.isfinite()).reshape(len(batch), -1).any(1)  # (B,)
    if not bad.any():
        return
    job = batch[bad.nonzero()[0].item()]
    told = f"the {name}'s output for {job['caption']!r}, seed {job['seed']}, is not finite"
    if precision == "fp16":
        raise UserError(f"--mixed_precision: {told}: probably too large for fp16; give bf16 or no "
                        f"(should that not help, the file of {flag} is damaged)")
    raise UserError(f"{flag}: {told}: the file is damaged, or its training diverged")


def read_records(output_dir):
    """[(digest of the settings, entry)] of the pictures in `output_dir`, as they were last
    rendered."""
    newest = {}
    for path in Path(output_dir).glob(".rendered-*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off
                continue
            moment, digest = entry.pop("time", 0), entry.pop("digest")
            if moment >= newest.get(entry["file"], (0,))[0]:
                newest[entry["file"]] = moment, digest, entry
    return [(digest, entry) for _, digest, entry in newest.values()
            if os.path.isfile(Path(output_dir) / entry["file"])]


def get_key(entry):
    return entry["file"], entry["caption"], entry["seed"]


def compute_digest(path):
    """First 16 hexadecimal digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]
