"""Scores a prior and a decoder over a COCO captions file: `python -m dalle2.tools.evaluate`.

Renders one picture for each of up to 30,000 captions and compares the pictures with their captions
and with the photos. The pictures are saved as PNG, because JPEG would change what is measured. The
same command resumes. --sweep renders a few hundred pictures for every combination of the given
guidance scales and steps. Several processes share the work:
`torchrun --nproc_per_node 8 -m dalle2.tools.evaluate`.
"""

import argparse
import contextlib
import itertools
import json
import time
from pathlib import Path

import torch

from dalle2 import cli
from dalle2.captions import compute_captions_digest
from dalle2.config import SAMPLER_NAMES
from dalle2.errors import UserError
from dalle2.files import hold_lock, replace_file
from dalle2.pipeline import load_pipeline
from dalle2.processes import join_processes, share_errors
from dalle2.render import Job, list_coco_captions, render_jobs
from dalle2.rng import derive_seed
from dalle2.tools import metrics
from dalle2.tools.judge import Embedded, embed_captions, embed_photos, embed_train, load_judge
from dalle2.tools.plots import save_tradeoff

NUM_IMAGES, NUM_SWEEP_IMAGES, MIN_FID_IMAGES = 30_000, 200, 10_000
NUM_DIVERSITY_CAPTIONS = 16
COLUMNS = {  # of the tables: {name: (title, format)}
    "pictures": ("pictures", "{}"), "cond_scale": ("cond_scale", "{:g}"),
    "prior_cond_scale": ("prior_cond_scale", "{:g}"), "sample_timesteps": ("steps", "{}"),
    "clip_score": ("CLIP score", "{:.4f}"), "photo_clip_score": ("photos'", "{:.4f}"),
    "r_precision": ("R-precision", "{:.3f}"), "photo_r_precision": ("photos'", "{:.3f}"),
    "cmmd": ("CMMD", "{:.3f}"), "cmmd_error": ("± error", "{:.3f}"), "fid": ("FID", "{:.2f}"),
    "kid": ("KID", "{:.5f}"), "diversity": ("diversity", "{:.4f}"),
    "nearest_train_cosine": ("nearest train", "{:.4f}"),
    "photo_nearest_train_cosine": ("photos'", "{:.4f}"),
    "nearer_to_train": ("nearer to train", "{:.3f}"),
    "photo_nearer_to_train": ("photos'", "{:.3f}"),
    "seconds_a_picture": ("seconds a picture", "{:.3f}")}


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_checkpoint_flags(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--test_img_path", default=f"{cli.DATA_DIR}/val2014", help="picture folder")
    data.add_argument("--test_annot_path", help="COCO captions file",
                      default=f"{cli.DATA_DIR}/annotations/captions_val2014.json")
    data.add_argument("--num_images", type=int, help="pictures to render, the first ones by "
                      f"image id, one caption each (None: {NUM_IMAGES}; with --sweep "
                      f"{NUM_SWEEP_IMAGES})")
    data.add_argument("--num_reference_images", type=int,
                      help="photos to compare with, the first ones by image id (None: all)")
    data.add_argument("--train_img_path", help="photos of the training, to look for copies of "
                      "them; needs --train_annot_path")
    data.add_argument("--train_annot_path", help="COCO captions file of the training")
    data.add_argument("--store_dir", help="prepared store of the training photos, made if it "
                      "does not exist (None: they are embedded without a store)")
    sample = parser.add_argument_group("sampling")
    sample.add_argument("--cond_scale", type=float, nargs="+", help="guidance of the decoder, 1 is "
                        "none (None: the value of its config)")
    sample.add_argument("--prior_cond_scale", type=float, nargs="+", help="guidance of the "
                        "prior, likewise")
    sample.add_argument("--sample_timesteps", type=int, nargs="+", help="steps: one number for "
                        "all, or the prior's and each stage's (None: the configs')")
    sample.add_argument("--num_candidates", type=int, help="embeddings that the prior samples "
                        "for a caption; the nearest to it is kept (None: the config's)")
    sample.add_argument("--lowres_noise_level", type=int, help="noise, of 1000, on the input of "
                        "an upsampler (None: the configs')")
    sample.add_argument("--sampler", choices=SAMPLER_NAMES, default=SAMPLER_NAMES[0])
    cli.add_precision_flag(sample)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--batch_size", type=int, help="pictures at a time (None: 16 on a "
                        "CPU, as many as fit on a GPU)")
    sample.add_argument("--samples_for_diversity", type=int, default=4, help="pictures of each of "
                        f"the first {NUM_DIVERSITY_CAPTIONS} captions; 1: no diversity")
    judge = parser.add_argument_group("judges")
    judge.add_argument("--judge_clip_model", help="CLIP that scores (None: the checkpoints' own)")
    judge.add_argument("--judge_clip_pretrained", help="its open_clip tag, or a file")
    judge.add_argument("--fid", action=argparse.BooleanOptionalAction, default=True,
                       help="compute FID and KID, if Inception's weights can be loaded")
    judge.add_argument("--inception_weights", help="file of Inception's weights (None: torch's "
                       "cache, or a download)")
    parser.add_argument("--output_dir", default="evaluation", help="folder for pictures and "
                        "scores; a run that is in it is resumed")
    parser.add_argument("--sweep", action="store_true", help="try every combination of the numbers "
                        "given to --cond_scale, --prior_cond_scale and --sample_timesteps")
    return check_flags(parser.parse_args())


def check_flags(args):
    """`args` with --num_images filled in; UserError for a value that makes no sense."""
    if args.num_images is None:
        args.num_images = NUM_SWEEP_IMAGES if args.sweep else NUM_IMAGES
    for name, least in (("num_images", 2), ("num_reference_images", 2), ("batch_size", 1),
                        ("samples_for_diversity", 1), ("sample_timesteps", 1), ("cond_scale", 0),
                        ("prior_cond_scale", 0), ("num_candidates", 1),
                        ("lowres_noise_level", 0)):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(least <= value < float("inf") for value in values):
            raise UserError(f"{value} must be at least {least}", name)
        if "cond_scale" in name and len(values) > 1 and not args.sweep:
            raise UserError("several numbers need --sweep", name)
    for given, needed in (("train_img_path", "train_annot_path"), ("store_dir", "train_img_path"),
                          ("train_annot_path", "train_img_path"),
                          ("judge_clip_model", "judge_clip_pretrained")):
        if getattr(args, given) and not getattr(args, needed):
            raise UserError(f"needed with --{given}", needed)
    return args


def main():
    args, state, device, warnings = parse_args(), join_processes(), cli.pick_device(), Warnings()
    captions = list_coco_captions(args.test_annot_path, args.test_img_path)
    pipeline = load_pipeline(args, device, cli.resolve_precision(args.mixed_precision))
    output_dir = Path(args.output_dir)
    runs, judge = list_runs(args, pipeline), load_judge(args, pipeline, warnings, device)
    with contextlib.ExitStack() as stack:
        with share_errors():
            if state.is_main_process:
                stack.enter_context(hold_lock(output_dir / ".lock", UserError(
                    f"another process writes to {output_dir}", "output_dir")))
                for folder, settings, _ in runs:
                    claim_folder(folder, settings)
        photos = embed_photos(judge, [photo for _, _, photo in
                                      captions[:args.num_reference_images]], "test", warnings)
        jobs = list_jobs(captions[:args.num_images], args.seed, args.samples_for_diversity)
        captions = embed_captions(judge, [caption for caption, _, _ in captions], args.num_images)
        rows = []
        for folder, settings, options in runs:
            state.print(f"{folder}: {len(captions.own)} captions", flush=True)
            seconds = render(pipeline, jobs, folder, settings, options, args.batch_size)
            pictures = embed_pictures(judge, jobs, folder)
            if state.is_main_process:
                scores = score_pictures(pictures, jobs, folder, settings, captions, photos)
                rows.append(settings | scores | {"seconds_a_picture": seconds})
        train_embed = embed_train(args, judge, warnings) if args.train_img_path and not args.sweep \
            else None
        if not state.is_main_process:
            return
        result = {"flags": vars(args), "clip": judge.clips, "counts": {
            "reference_photos": len(photos.embed), "other_captions": captions.others.shape[1],
            "diversity_captions": min(NUM_DIVERSITY_CAPTIONS, len(captions.own))},
            "device": describe_device(device, state.num_processes), "warnings": warnings}
        if args.sweep:
            write_sweep(args, result, rows, captions, photos)
        else:
            write_evaluation(args, result, rows[0], captions, photos, train_embed)


class Warnings(list):
    """Printed at once by the first process, and recorded with the results."""

    def add(self, text):
        self.append(text)
        join_processes().print(f"warning: {text}", flush=True)


# ----------------------------------------------------------------------------------------------
# rendering


def list_jobs(captions, seed, samples_for_diversity):
    """A Job for each of `captions`, as list_coco_captions returns them, followed by the jobs of the
    additional samples of the first captions."""
    def build_job(index, file, *sample):
        return Job(*captions[index], file=file, seed=derive_seed(seed, index, *sample) % 2 ** 31)
    jobs = [build_job(index, f"images/{image_id}.png")
            for index, (_, image_id, _) in enumerate(captions)]
    return jobs + [build_job(index, f"diversity/{image_id}_{sample}.png", sample)
                   for index, (_, image_id, _) in enumerate(captions[:NUM_DIVERSITY_CAPTIONS])
                   for sample in range(1, samples_for_diversity)]


def list_runs(args, pipeline):
    """[(folder, settings, options)] to render: one, or with --sweep every point of the grid.
    settings: all that a picture depends on; options: what Pipeline.resolve_options returns."""
    annotations = compute_captions_digest(args.test_annot_path, args.test_img_path)[:16]
    steps = [[n] for n in args.sample_timesteps] if args.sweep and args.sample_timesteps \
        else [args.sample_timesteps]
    runs = {}
    for cond_scale, prior_cond_scale, sample_timesteps in itertools.product(
            args.cond_scale or [None], args.prior_cond_scale or [None], steps):
        options = pipeline.resolve_options(
            cond_scale=cond_scale, prior_cond_scale=prior_cond_scale,
            sample_timesteps=sample_timesteps, num_candidates=args.num_candidates,
            lowres_noise_level=args.lowres_noise_level, sampler=args.sampler)
        settings = {name.replace("_sha256", "_ckpt"): value  # named after its flag
                    for name, value in pipeline.describe_settings(options).items()}
        settings |= {"test_annot_path": annotations, "seed": args.seed}
        name = "cond_{cond_scale:g}_prior_{prior_cond_scale:g}".format(**settings)
        name = f"{name}_steps_{format_steps(settings)}"
        folder = Path(args.output_dir, "sweep", name) if args.sweep else Path(args.output_dir)
        runs[folder] = folder, settings, options
    return list(runs.values())


def claim_folder(folder, settings):
    """Records in `<folder>/settings.json` how its pictures are made. UserError, naming the first
    flag that differs, if the folder has pictures of other settings."""
    path = folder / "settings.json"
    recorded = json.loads(path.read_text()) if path.is_file() else settings
    for name, value in settings.items():
        if recorded.get(name, value) != value:
            raise UserError(f"the pictures in {folder} were made with {name} {recorded[name]}, "
                            f"not {value}; choose another --output_dir or delete this one", name)
    replace_file(path, lambda part: part.write_text(json.dumps(settings, indent=1)))


def render(pipeline, jobs, folder, settings, options, batch_size):
    """Renders the jobs that have no file in `folder` yet. Returns the seconds a picture of
    the last call that rendered any and finished; None if there was none, and in all processes but
    the first."""
    count, record = sum(not (folder / job.file).is_file() for job in jobs), folder / "seconds.json"
    start = time.perf_counter()
    render_jobs(pipeline, jobs, folder, settings, options, batch_size=batch_size)
    if not join_processes().is_main_process:
        return None
    if count:
        seconds = (time.perf_counter() - start) / count
        replace_file(record, lambda part: part.write_text(f"{seconds}"))
    return json.loads(record.read_text()) if record.is_file() else None


# ----------------------------------------------------------------------------------------------
# scoring


def embed_pictures(judge, jobs, folder):
    """Embedded of the rendered jobs in `folder`; UserError if one cannot be read."""
    pictures = judge.embed_files([folder / job.file for job in jobs], "pictures")
    for row in set(range(len(jobs))) - set(pictures.rows):
        raise UserError(f"{folder / jobs[row].file} cannot be read; delete it", "output_dir")
    return pictures


def score_pictures(pictures, jobs, folder, settings, captions, photos):
    """The metrics of `pictures`, the Embedded of all jobs; "rendered" is the Embedded without the
    additional samples. Writes manifest.json."""
    count = len(captions.own)
    first = min(NUM_DIVERSITY_CAPTIONS, count)
    embed, more = pictures.embed[:count], pictures.embed[count:]
    features = None if pictures.features is None else pictures.features[:count]
    cosine = (embed * captions.text_embed[captions.own]).sum(-1).tolist()
    images = [{**job.describe(), "clip_score": round(score, 4)} for job, score in zip(jobs, cosine)]
    replace_file(folder / "manifest.json", lambda part: part.write_text(json.dumps(
        {"settings": settings, "images": images}, indent=1, ensure_ascii=False)))
    cmmd, error = metrics.compute_cmmd(embed, photos.embed)
    diversity = metrics.compute_diversity(torch.cat(
        [embed[:first, None], more.view(first, -1, embed.shape[1])], 1)) if len(more) else None
    return {"pictures": count, **captions.compare(embed, range(count)), "cmmd": cmmd,
            "cmmd_error": error, "diversity": diversity,
            "rendered": Embedded(embed, features, range(count))}


# ----------------------------------------------------------------------------------------------
# results


def write_evaluation(args, result, row, captions, photos, train_embed):
    """evaluation.json and evaluation.md; the table is printed too. train_embed: (T, D) or None."""
    warnings = result["warnings"]
    rendered = row.pop("rendered")
    row |= captions.compare_photos(photos) | {"fid": None, "kid": None, "kid_std": None}
    if rendered.features is not None:
        row |= metrics.compute_fid_kid(photos.features, rendered.features)
        if row["pictures"] < MIN_FID_IMAGES:
            warnings.add(f"FID of {row['pictures']} pictures means nothing: with fewer than "
                         f"{MIN_FID_IMAGES} use CMMD or KID")
    if train_embed is not None:
        index = {row: i for i, row in enumerate(photos.rows)}
        row |= metrics.compute_memorization(
            rendered.embed, train_embed, photos.embed,
            torch.tensor([index.get(row, -1) for row in rendered.rows]))
        result["counts"]["train_photos"] = len(train_embed)
    names = list(row)[list(row).index("pictures"):]  # they follow the settings
    result["settings"] = {name: row[name] for name in row if name not in names}
    result["metrics"] = {name: row[name] for name in names}
    write_results(args.output_dir, "evaluation", result, format_table([row]))


def write_sweep(args, result, rows, captions, photos):
    """sweep.json, sweep.md and sweep.png; the table is printed too."""
    rows = [{name: row[name] for name in COLUMNS if name in row} | {"steps": format_steps(row)}
            for row in rows]
    best, true = min(rows, key=lambda row: row["cmmd"]), captions.compare_photos(photos)
    close = sum(row["cmmd"] - best["cmmd"] <= best["cmmd_error"] for row in rows) - 1
    result |= {"photos": true, "rows": rows, "best": best}
    varied = [name for name in ("cond_scale", "prior_cond_scale", "steps")
              if len({row[name] for row in rows}) > 1] or ["cond_scale"]
    save_tradeoff(rows, Path(args.output_dir) / "sweep.png", label=varied[0], best=best,
                  series=lambda row: ", ".join(f"{name} {row[name]}" for name in varied[1:]),
                  photos=true["photo_clip_score"])
    summary = (f"\nbest, by the lowest CMMD: cond_scale {best['cond_scale']:g}, prior_cond_scale "
            f"{best['prior_cond_scale']:g}, sample_timesteps {best['steps']}; {close} of the "
            f"{len(rows) - 1} others are within its standard error\n")
    write_results(args.output_dir, "sweep", result, format_table(rows) + summary)


def write_results(output_dir, name, result, table):
    """Writes <name>.json and <name>.md in output_dir; prints the latter."""
    output_dir, clip = Path(output_dir), result["clip"]["judge"]
    weights = clip["clip_pretrained"]  # a file may be of a model of any name
    model = weights if Path(weights).suffix else f"{clip['clip_model']} {weights}"
    footer = (f"\nCLIP {model} ({clip['fingerprint']}); "
              f"{result['counts']['reference_photos']} reference photos; R-precision against "
              f"{result['counts']['other_captions']} other captions; CMMD: unbiased estimate\n"
              + "".join(f"\nwarning: {warning}\n" for warning in result["warnings"]))
    for ending, text in ((".json", json.dumps(result, indent=1, ensure_ascii=False)),
                         (".md", table + footer)):
        replace_file(output_dir / f"{name}{ending}", lambda part: part.write_text(text))
    print(f"{table}{footer}\n{output_dir}: {name}.json, {name}.md")


def format_table(rows):
    """A Markdown table of those COLUMNS that the rows have; a dash stands for None."""
    names = [name for name in COLUMNS if name in rows[0]]
    lines = [[COLUMNS[name][0] for name in names], ["---:"] * len(names)]
    for row in rows:
        row = {**row, "sample_timesteps": format_steps(row)}
        lines.append(["–" if row[name] is None else COLUMNS[name][1].format(row[name])
                      for name in names])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ----------------------------------------------------------------------------------------------
# helpers


def format_steps(settings):
    """[5, 5, 5] -> "5"; [10, 10, 2] -> "10+10+2"."""
    steps = settings["sample_timesteps"]
    return str(steps[0]) if len(set(steps)) == 1 else "+".join(map(str, steps))


def describe_device(device, num_processes):
    """The device that was timed, such as "2 x CPU, 1 threads"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" \
        else f"CPU, {torch.get_num_threads()} threads"
    return name if num_processes == 1 else f"{num_processes} x {name}"


if __name__ == "__main__":
    cli.run(main)
