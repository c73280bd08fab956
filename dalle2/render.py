"""Rendering many captions into a folder: batches, processes, and going on where it stopped."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from dalle2.data import load_captions
from dalle2.images import load_image, make_unique_stems, save_image
from dalle2.rng import derive_seed


def list_coco_jobs(annot_path, img_path, seed, num_images=None):
    """A job for each of the first `num_images` pictures of a COCO captions file, in the order of
    their ids: {"caption", "image_id", "photo", "seed"}. The caption is one of the picture's, always
    the same one. Raises UserError naming --test_annot_path or --test_img_path."""
    records = load_captions(annot_path, img_path, num_images)
    return [{"caption": record.captions[derive_seed("caption", record.image_id)
                                        % len(record.captions)],
             "image_id": record.image_id, "photo": record.path,
             "seed": derive_seed(seed, index) % 2 ** 31}
            for index, record in enumerate(records)]


def render_jobs(pipeline, jobs, output_dir, settings, *, batch_size=None, from_photos=False,
                prior_options=None, options=None):
    """Renders what `output_dir` does not hold yet; the processes of a launch share the work.

    jobs: list of {"caption", "image_id", "photo", "seed"}, and "file" where it is not to be named
    after its caption (.png or .jpg); settings: what the pictures depend on besides, as JSON:
    pictures of other settings are rendered again; batch_size: None: 16 on a CPU, 256 on a GPU,
    halved where its memory does not suffice; from_photos: from the embedding of the job's photo
    instead of its caption's; prior_options, options: of Pipeline.sample_image_embed and
    Pipeline.sample_images. Returns a list of {"file", "caption", "image_id", "seed",
    "clip_score"} in the order of `jobs`.
    """
    state, output_dir = PartialState(cpu=not torch.cuda.is_available()), Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    stems = make_unique_stems([job["caption"] for job in jobs])
    jobs = [{"file": f"{stem}.jpg", **job} for job, stem in zip(jobs, stems)]
    done = read_records(output_dir, digest)
    todo = [job for job in jobs if get_key(job) not in done]
    if len(todo) < len(jobs):
        state.print(f"{output_dir}: {len(jobs) - len(todo)} of {len(jobs)} rendered already")
    size = batch_size or (16 if pipeline.clip.device.type == "cpu" else 256)
    starts = range(0, len(todo), size)[state.process_index::state.num_processes]
    with open(output_dir / f".rendered-{state.process_index}.jsonl", "a") as file:
        for start in tqdm(starts, desc="rendering", unit="batch",
                          disable=not state.is_main_process or not todo,
                          mininterval=0.1 if sys.stderr.isatty() else 10):
            batch = todo[start:start + size]
            with pipeline.use_precision():
                images, scores = render_batch(pipeline, batch, from_photos, prior_options or {},
                                              options or {})
            for job, image, score in zip(batch, images, scores):
                save_image(image, output_dir / job["file"])
                entry = {name: job[name] for name in ("file", "caption", "image_id", "seed")}
                file.write(json.dumps({"digest": digest, **entry, "clip_score": score}) + "\n")
            file.flush()
    state.wait_for_everyone()
    done = read_records(output_dir, digest)
    return [done[get_key(job)] for job in jobs]


def render_batch(pipeline, batch, from_photos, prior_options, options):
    """(image (B, 3, H, W) in [0, 1], list of B CLIP scores) of jobs, in two halves where a GPU's
    memory does not suffice for all."""
    captions, seeds = ([job[name] for job in batch] for name in ("caption", "seed"))
    try:
        if from_photos:
            image_embed = pipeline.embed_images(torch.stack([load_image(job["photo"])
                                                             for job in batch]))
        else:
            image_embed = pipeline.sample_image_embed(captions, seeds, **prior_options)
        images = pipeline.sample_images(image_embed, seeds, **options)
        text_embed = pipeline.embed_captions(captions)[0]
        scores = (pipeline.embed_images(images) * text_embed).sum(-1).tolist()
        return images, [round(score, 4) for score in scores]
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    halves = [render_batch(pipeline, part, from_photos, prior_options, options)
              for part in (batch[:len(batch) // 2], batch[len(batch) // 2:])]
    return torch.cat([images for images, _ in halves]), [*halves[0][1], *halves[1][1]]


def read_records(output_dir, digest):
    """{key: entry} of the pictures in `output_dir` that were rendered with settings of `digest`."""
    done = {}
    for path in Path(output_dir).glob(".rendered-*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off
                continue
            if entry.pop("digest") == digest and os.path.isfile(Path(output_dir) / entry["file"]):
                done[get_key(entry)] = entry
    return done


def get_key(entry):
    return entry["file"], entry["caption"], entry["seed"]


def compute_digest(path):
    """First 16 hexadecimal digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]
