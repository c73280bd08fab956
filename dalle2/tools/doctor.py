"""Checks data, CLIP and machine before a long training, in about a minute.

Takes the data and CLIP flags of the training scripts. Every line begins with ok, warning or error;
a warning or an error says what to do. Writes a picture of five random photos with their captions;
prepares and trains nothing.
"""

import math
import os
import random
import shutil
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import psutil
import torch
from PIL import Image, ImageDraw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2 import functional as TF

from dalle2 import cli
from dalle2.captions import TARS, find_form, load_captions
from dalle2.config import PRESETS
from dalle2.data import count_cores
from dalle2.errors import UserError, rename_argument
from dalle2.images import STORE_IMAGE_SIZE, load_image
from dalle2.models import build_prior, build_unet
from dalle2.optimizer import build_optimizers
from dalle2.prepare import BYTES_A_PICTURE
from dalle2.validation import compute_recall

NUM_PICTURES, NUM_CAPTIONS, NUM_PAIRS = 64, 2000, 5
SECONDS_A_NETWORK, REPEATS = 8.0, 3  # for timing a training step


class Report:
    """Prints the lines and counts the errors."""

    def __init__(self):
        self.errors = 0

    def ok(self, text):
        print(f"ok       {text}", flush=True)

    def warning(self, text):
        print(f"warning  {text}", flush=True)

    def error(self, text):
        self.errors += 1
        print(f"error    {text}", flush=True)

    def check(self, good, text, advice, level="warning"):
        """Prints `text` as ok if `good`, otherwise `text` and the advice as a `level`."""
        self.ok(text) if good else getattr(self, level)(f"{text}: {advice}")


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    parser.add_argument("--output_dir", default="output/doctor", help="folder for the five "
                        "photos with captions")
    parser.add_argument("--preset", default="base", choices=list(PRESETS),
                        help="preset whose training time is estimated")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing pictures")
    return parser.parse_args()


def main():
    args = parse_args()
    report = Report()
    preset = PRESETS[args.preset]
    records = check_captions(args, report)
    sample = random.Random(args.seed).sample(records, min(NUM_PICTURES, len(records)))
    pictures = check_pictures(sample, report)
    if not pictures:
        sys.exit(1)
    path = Path(args.output_dir) / "pairs.jpg"
    save_pairs(pictures[:NUM_PAIRS], path)
    report.ok(f"five random pairs to look at: {path}")
    clip = check_clip(args, records, pictures, preset, report)
    check_machine(args, records, clip, report)
    estimate_training(preset, clip.embed_dim if clip else 768, report)
    sys.exit(1 if report.errors else 0)


# ----------------------------------------------------------------------------------------------
# data


def check_captions(args, report):
    """Reports the counts of both splits. Returns the captioned images of the train split."""
    splits, found = cli.list_splits(args), []
    if all(split == "train" for split, *_ in splits):
        report.warning("no validation data, so over-training cannot be seen: give "
                       "--val_annot_path")
    for split, annot_path, img_path in reversed(splits):
        with rename_argument(annot_path=f"{split}_annot_path", img_path=f"{split}_img_path"):
            form = find_form(annot_path, img_path)
            records = load_captions(annot_path, img_path, warn=lambda line: report.warning(
                line.removeprefix("warning: ")))
        counts = [len(record.captions) for record in records]
        missing = [] if form == TARS else [r.path for r in records if not os.path.isfile(r.path)]
        report.check(not missing, f"{split}: {len(records)} pictures, {sum(counts)} captions, "
                     f"{min(counts)} to {max(counts)} a picture, {form}",
                     f"{len(missing)} pictures are missing, such as {missing[:1]}; they will be "
                     "left out")
        found += records if split == "train" else []
    return found


def check_pictures(sample, report):
    """[(record, image (3, 256, 256) uint8)] of the pictures that can be read."""
    pictures, start = [], time.perf_counter()
    for record in sample:
        try:
            pictures.append((record, load_image(record.path)))
        except (OSError, ValueError) as error:
            report.warning(f"{record.path}: {error}; it will be left out")
    rate = len(sample) / (time.perf_counter() - start)
    report.check(pictures, f"{len(pictures)} of {len(sample)} random pictures can be read, "
                 f"{rate:.0f} a second on one core", "check --train_img_path", "error")
    if pictures:
        pixels = torch.stack([image for _, image in pictures]).float()
        low, high, mean, flat = (pixels.min(), pixels.max(), pixels.mean(),
                                 (pixels.std((1, 2, 3)) < 2).sum())
        report.check(high > 200 and low < 55 and flat < len(pictures) / 4,
                     f"pixels from {low:.0f} to {high:.0f}, mean {mean:.0f}, {flat} pictures of "
                     "one color", "these do not look like photographs; check pairs.jpg")
    return pictures


def save_pairs(pairs, path):
    """One JPEG: each picture above its captions."""
    sheet = Image.new("RGB", ((STORE_IMAGE_SIZE + 8) * len(pairs), STORE_IMAGE_SIZE + 130), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (record, image) in enumerate(pairs):
        left = column * (STORE_IMAGE_SIZE + 8) + 4
        sheet.paste(TF.to_pil_image(image), (left, 4))
        text = "\n".join(textwrap.fill(f"- {caption}", 42) for caption in record.captions[:5])
        draw.multiline_text((left, STORE_IMAGE_SIZE + 8), text[:400], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


# ----------------------------------------------------------------------------------------------
# CLIP


def check_clip(args, records, pictures, preset, report):
    """The FrozenClip, or None if it cannot be loaded."""
    try:
        clip = cli.load_clip(args)
    except UserError as error:
        report.error(f"--{error}")  # an argument of load_clip is a flag of the same name
        return None
    report.ok(f"CLIP {args.clip_model} {args.clip_pretrained}: {clip.image_size} px, embedding "
              f"{clip.embed_dim}, text width {clip.text_width}")
    for line in clip.list_differences(STORE_IMAGE_SIZE):
        report.warning(line)
    captions = [caption for record in records for caption in record.captions]
    captions = random.Random(0).sample(captions, min(NUM_CAPTIONS, len(captions)))
    start = time.perf_counter()
    text_tokens = clip.tokenize(captions)  # raises if a start or end token is missing
    rate = len(captions) / (time.perf_counter() - start)
    lengths = clip.compute_text_mask(text_tokens).sum(1)
    limit = preset.prior.max_text_len
    longer = (lengths > limit).float().mean().item()
    report.check(longer < 0.01, f"tokens: start and end in each of {len(captions)} captions, "
                 f"{lengths.float().mean():.1f} on average, {int(lengths.max())} at most, "
                 f"{100 * longer:.2f} % longer than max_text_len {limit}, {rate:.0f} captions a "
                 "second", "longer captions are cut")
    check_embeddings(clip, pictures, report)
    return clip


def check_embeddings(clip, pictures, report):
    image_embed = torch.cat([clip.embed_image(image[None]) for _, image in pictures])  # (N, D)
    text_embed = clip.embed_text(clip.tokenize([r.captions[0] for r, _ in pictures]))[0]
    norms = image_embed.norm(dim=-1)
    mean = image_embed.mean(0).norm().item()
    report.check(abs(norms - 1).max() < 1e-3 and mean < 0.99,
                 f"image embeddings: norm {norms.min():.3f} to {norms.max():.3f}, norm of their "
                 f"mean {mean:.3f} (1: all alike), spread a dimension "
                 f"{image_embed.std(0, correction=0).mean() * clip.embed_dim ** 0.5:.3f}",
                 "the pictures look alike to this CLIP", "error")
    matching = (image_embed * text_embed).sum(-1).mean().item()
    shuffled = (image_embed * text_embed.roll(1, 0)).sum(-1).mean().item()
    recall = compute_recall(text_embed, image_embed, (1,))["recall@1"]
    report.check(len(pictures) < 8 or (matching > shuffled + 0.02 and recall > 3 / len(pictures)),
                 f"CLIP: cosine of picture and its caption {matching:.3f}, another caption "
                 f"{shuffled:.3f}, recall@1 among {len(pictures)}: {recall:.2f} (chance "
                 f"{1 / len(pictures):.2f})", "this CLIP does not tell these captions apart; train "
                 "it longer, or check that pictures and captions belong together")


# ----------------------------------------------------------------------------------------------
# machine


def check_machine(args, records, clip, report):
    folder = Path(args.store_dir)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    captions = sum(len(record.captions) for record in records)
    width = clip.embed_dim if clip else 768
    embeddings = 2 * width * (len(records) + captions * 15) / 1e9  # about 14 tokens a caption
    pixels, jpeg = (len(records) * size / 1e9 for size in BYTES_A_PICTURE.values())
    report.check(pixels + embeddings < free, f"disk: the store takes {pixels:.1f} GB of pictures "
                 f"and about {embeddings:.1f} GB of embeddings, {free:.0f} GB are free at {folder}",
                 f"coco_prepare.py --image_format jpeg takes {jpeg:.1f} GB for the pictures; or "
                 "another --store_dir")
    memory = psutil.virtual_memory().total / 1e9
    report.check(memory > 7, f"memory: {memory:.0f} GB", "8 GB are needed")
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        report.ok(f"{torch.cuda.device_count()} x {found.name}, {found.total_memory / 1e9:.0f} GB")
    else:
        report.warning(f"no GPU, {count_cores()} CPU cores: --preset toy is made "
                       "for that")


def estimate_training(preset, embed_dim, report):
    """Times a training step of each network of the preset on this machine: forward and backward
    pass at the number of rows that is cheapest, and the update of weights and average. Loading of
    data is not timed."""
    device = cli.pick_device()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as training does
    devices = max(1, torch.cuda.device_count())
    where = f"{devices} GPU" + "s" * (devices > 1) if device.type == "cuda" else "this CPU"
    jobs = [("prior", build_prior(preset.prior, embed_dim), preset.prior.train, partial(
        draw_prior_inputs, preset.prior, embed_dim, device))]
    for number, config in enumerate(preset.decoder.unets, start=1):
        jobs.append((f"unet {number}", build_unet(config, number, embed_dim), config.train, partial(
            draw_unet_inputs, config, number, embed_dim, device)))
    for name, network, train, draw_inputs in jobs:
        share = math.ceil(train.batch_size / devices)  # rows that one device computes in a step
        rows, seconds, update = time_step(
            network.to(device), train, draw_inputs, min(share, train.device_batch_size or share))
        hours = (seconds / rows * share + update) * train.num_steps / 3600
        duration = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
        report.check(hours < 24 * 30, f"{name}: about {duration} for {train.num_steps} steps of "
                     f"{train.batch_size} on {where} (timed: {rows} rows at a time, "
                     f"{1000 * seconds / rows:.3g} ms a row; optimizer and average "
                     f"{1000 * update:.3g} ms a step)", "choose a smaller --preset, more devices "
                     "or fewer --num_steps")


def draw_prior_inputs(config, embed_dim, device, rows):
    embed, drop = torch.randn(rows, embed_dim, device=device), torch.zeros(rows, device=device)
    text = torch.randn(rows, config.max_text_len, embed_dim, device=device)
    return (embed, drop.long()), dict(text_embed=embed, text_encodings=text,
                                      text_cond_drop_prob=drop)


def draw_unet_inputs(config, number, embed_dim, device, rows):
    side, drop = config.crop_size or config.image_size, torch.zeros(rows, device=device)
    image = torch.randn(rows, 3, side, side, device=device)
    condition = dict(image_embed=torch.randn(rows, embed_dim, device=device),
                     image_cond_drop_prob=drop) if number == 1 else \
        dict(image_embed=None, lowres_cond_img=image, lowres_noise_level=drop.long())
    return (image, drop.long()), condition


def time_step(network, train, draw_inputs, most):
    """(rows, seconds of a forward and backward pass of so many, seconds of an update). rows: the
    cheapest number for one row, at most `most`. train: TrainConfig."""
    device = next(network.parameters()).device
    precision = cli.resolve_precision(train.mixed_precision, training=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay))
    optimizers = build_optimizers(network, train)

    def compute_gradients(rows):
        inputs, condition = draw_inputs(rows)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = network(*inputs, **condition).float().square().mean()
        loss.backward()
        loss.item()  # waits for a GPU

    def update():
        torch.nn.utils.clip_grad_norm_(network.parameters(), train.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(network)
        next(network.parameters()).sum().item()

    rows, seconds = find_rows(compute_gradients, most)
    return rows, seconds, time_call(update)


def find_rows(compute, most, budget=SECONDS_A_NETWORK):
    """(rows, seconds of `compute(rows)`) where a row takes the least time. Rows are doubled up to
    `most`, until two doublings in a row make a row less than a tenth cheaper, CUDA's memory is
    full, or the next would exceed `budget` seconds."""
    rows, misses, seconds = 1, 0, time_call(partial(compute, 1))
    best, end = (rows, seconds), time.perf_counter() + budget
    while rows < most and misses < 2 and time.perf_counter() + 2 * REPEATS * seconds < end:
        rows = min(2 * rows, most)
        try:
            seconds = time_call(partial(compute, rows))
        except torch.cuda.OutOfMemoryError:
            break
        cost, least = seconds / rows, best[1] / best[0]
        misses = 0 if cost < 0.9 * least else misses + 1
        best = (rows, seconds) if cost < least else best
    return best


def time_call(call):
    """Seconds of the fastest of a few calls, or of a single one if that takes long. The first call
    may be slower, because it compiles or allocates."""
    seconds = []
    while len(seconds) < REPEATS and sum(seconds) < SECONDS_A_NETWORK / 4:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    cli.run(main)
