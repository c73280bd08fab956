"""Rendering many captions into a folder: what to render, batches, processes, resuming; the best
of several, the nearest training pictures, the manifest."""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from dalle2.captions import load_captions
from dalle2.errors import UserError, rename_argument
from dalle2.images import load_image, make_unique_stems, save_image
from dalle2.prepare import prepare_store
from dalle2.processes import join_processes, share_errors
from dalle2.rng import derive_seed


@dataclass(frozen=True)
class Job:
    """One picture to render. image_id and photo, a path, are those of the caption's picture, where
    it has one; file: its name in the output folder, .jpg or .png."""

    caption: str
    image_id: int | None
    photo: str | None
    seed: int
    file: str

    def describe(self):
        """What the manifest says of it."""
        return {"file": self.file, "caption": self.caption, "image_id": self.image_id,
                "seed": self.seed}


# ----------------------------------------------------------------------------------------------
# what to render, and how


def read_options(args, pipeline):
    """[SampleOptions of the prior, and of each stage], filled, as the flags say."""
    names = ("cond_scale", "prior_cond_scale", "sample_timesteps", "num_candidates",
             "lowres_noise_level", "sampler", "thresholding")
    return pipeline.resolve_options(**{name: getattr(args, name) for name in names})


def list_captions(args):
    """[(caption, image_id, photo)] of the prompts and of the COCO file that the flags name; a
    prompt has neither image_id nor photo."""
    captions = [(prompt, None, None) for prompt in list_prompts(args.prompt, args.prompt_file)]
    for given, needed in (("test_annot_path", "test_img_path"),
                          ("test_img_path", "test_annot_path")):
        if getattr(args, given) is not None and getattr(args, needed) is None:
            raise UserError(f"needed with --{given}", needed)
    if args.test_img_path is not None:
        captions += list_coco_captions(args.test_annot_path, args.test_img_path, args.num_images)
    if not captions:
        raise UserError("nothing to render; give --prompt, --prompt_file or "
                        "--test_annot_path with --test_img_path", "prompt")
    if args.init_from_true_embedding and any(photo is None for _, _, photo in captions):
        raise UserError("a prompt has no photo; give --test_annot_path "
                        "and --test_img_path alone", "init_from_true_embedding")
    return captions


def list_prompts(prompt, prompt_file):
    """The strings of --prompt, a list or None, and the non-empty lines of --prompt_file."""
    prompts, lines = prompt or [], []
    if prompt_file:
        if not os.path.isfile(prompt_file):
            raise UserError(f"no such file: {prompt_file}", "prompt_file")
        lines = Path(prompt_file).read_text(encoding="utf-8").splitlines()
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty", "prompt")
    return [text.strip() for text in [*prompts, *lines] if text.strip()]


def list_coco_captions(annot_path, img_path, num_images=None):
    """[(caption, image_id, photo)] of the first `num_images` pictures of a COCO captions file, in
    the order of their ids. The caption is one of the picture's, always the same one. Raises
    UserError naming --test_annot_path or --test_img_path."""
    with rename_argument(annot_path="test_annot_path", img_path="test_img_path"):
        records = load_captions(annot_path, img_path, num_images)
    return [(record.captions[derive_seed("caption", record.image_id) % len(record.captions)],
             record.image_id, record.path) for record in records]


def list_jobs(captions, seed, samples_per_prompt, output_dir):
    """A Job for each of the samples of each of `captions`, of `list_captions`: with a seed of its
    own, and named after the caption, unless `output_dir` holds another caption's picture of that
    name. The same list in every process."""
    (records,) = broadcast_object_list([read_records(output_dir)])
    rows = [row for row in captions for _ in range(samples_per_prompt)]
    stems = make_unique_stems([caption for caption, _, _ in rows], {
        Path(entry["file"]).stem: entry["caption"] for _, entry in records})
    return [Job(*row, seed=derive_seed(seed, index) % 2 ** 31, file=f"{stem}.jpg")
            for index, (row, stem) in enumerate(zip(rows, stems))]


# ----------------------------------------------------------------------------------------------
# rendering


def render_jobs(pipeline, jobs, output_dir, settings, options, *, batch_size=None,
                from_photos=False):
    """Renders what `output_dir` does not hold yet; the processes of a launch share the work. What
    it holds of other captions stays.

    settings: what the pictures depend on besides their Job, as JSON: pictures of other settings are
    rendered again; options: of Pipeline.resolve_options; batch_size: None: 16 on a CPU, 256 on a
    GPU, halved where its memory does not suffice; from_photos: from the embedding of the job's
    photo instead of its caption's. Returns a list of {"file", "caption", "image_id", "seed",
    "clip_score"} in the order of `jobs`, with the "photo" of the job, where it has one, relative to
    `output_dir`. Raises UserError, in all processes, where a picture is not finite; it is not
    saved.
    """
    state, output_dir = join_processes(), Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    # one process looks: another may look later, when some of the work is done
    (records,) = broadcast_object_list(
        [read_records(output_dir) if state.is_main_process else None])
    done = {get_key(entry): entry for made_with, entry in records if made_with == digest}
    todo = [job for job in jobs if get_key(job.describe()) not in done]
    if len(todo) < len(jobs):
        state.print(f"{output_dir}: {len(jobs) - len(todo)} of {len(jobs)} rendered already")
    share, entries = todo[state.process_index::state.num_processes], []
    size = batch_size or (16 if pipeline.clip.device.type == "cpu" else 256)
    with share_errors(), \
            open(output_dir / f".rendered-{state.process_index}.jsonl", "a") as file, \
            tqdm(total=len(share), desc="rendering", unit=" pictures",
                 disable=not state.is_main_process or not todo,
                 mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for batch, images, scores in render_batches(pipeline, share, size, options, from_photos):
            for job, image, score in zip(batch, images, scores):
                save_image(image, output_dir / job.file)
                entries.append({**job.describe(), "clip_score": score})
                file.write(json.dumps({"digest": digest, "time": time.time(), **entries[-1]})
                           + "\n")
            file.flush()
            bar.update(len(batch))
    done |= {get_key(entry): entry for entry in gather_object(entries)}
    return [done[get_key(job.describe())] | (
        {"photo": os.path.relpath(job.photo, output_dir)} if job.photo else {}) for job in jobs]


def render_batches(pipeline, jobs, size, options, from_photos):
    """Yields (jobs, image (B, 3, H, W) in [0, 1], list of B CLIP scores) for `size` jobs after the
    other; for half as many, from then on, where a GPU's memory does not suffice."""
    start = 0
    while start < len(jobs):
        batch, rendered = jobs[start:start + size], None
        try:
            with pipeline.use_precision():
                rendered = render_batch(pipeline, batch, options, from_photos)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        if rendered is None:  # only here is the memory free that the error held on to
            torch.cuda.empty_cache()
            size = -(-len(batch) // 2)
            continue
        yield batch, *rendered
        start += len(batch)


def render_batch(pipeline, batch, options, from_photos):
    """(image (B, 3, H, W) in [0, 1], list of B CLIP scores) of jobs."""
    photos = torch.stack([load_image(job.photo) for job in batch]) if from_photos else None
    sample = pipeline.sample([job.caption for job in batch], [job.seed for job in batch], options,
                             images=photos)
    scores = (pipeline.embed_images(sample.image) * sample.text_embed).sum(-1)
    for values, argument, name in (
            (sample.image_embed, *(("clip_pretrained", "CLIP") if from_photos
                                   else ("prior_ckpt", "prior"))),
            (sample.image, "decoder_ckpt", "decoder"), (scores, "clip_pretrained", "CLIP")):
        check_finite(values, batch, pipeline.precision, argument, name)
    return sample.image, [round(score, 4) for score in scores.tolist()]


def check_finite(values, batch, precision, argument, name):
    """Raises UserError where values (B, ...) of jobs, the output of network `name` in the file that
    the flag `argument` names, hold nan or infinity."""
    bad = (~values.isfinite()).reshape(len(batch), -1).any(1)  # (B,)
    if not bad.any():
        return
    job = batch[bad.nonzero()[0].item()]
    problem = f"the {name}'s output for {job.caption!r}, seed {job.seed}, is not finite"
    if precision == "fp16":
        raise UserError(f"{problem}: probably too large for fp16; give bf16 or no (should that "
                        f"not help, the file of --{argument} is damaged)", "mixed_precision")
    raise UserError(f"{problem}: the file is damaged, or its training diverged", argument)


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


# ----------------------------------------------------------------------------------------------
# afterwards


def pick_best(entries, count):
    """The entry of the best CLIP score of each `count` in a row."""
    return [max(entries[i:i + count], key=lambda entry: entry["clip_score"])
            for i in range(0, len(entries), count)]


def find_nearest(args, clip, output_dir, entries):
    """[(picture (3, 256, 256) uint8, cosine)]: the training picture whose CLIP embedding is nearest
    to that of each rendered one; empty where --train_annot_path is not given. Puts file and cosine
    into the entries."""
    if args.train_annot_path is None:
        return []
    with rename_argument(annot_path="train_annot_path", img_path="train_img_path"):
        store = prepare_store(args.train_img_path, args.train_annot_path, args.store_dir, clip=clip)
    embeds = torch.from_numpy(np.array(store.image_embed[:])).float().to(clip.device)
    found = []
    for entry in entries:
        picture = load_image(Path(output_dir) / entry["file"])
        cosine, index = (embeds @ clip.embed_image(picture[None])[0]).max(0)
        entry["nearest_train"] = {"file": store.records[int(index)].file_name,
                                  "cosine": round(cosine.item(), 4)}
        found.append((torch.from_numpy(np.array(store.images[int(index)])), cosine.item()))
    return found
