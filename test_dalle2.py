"""Renders captions to 256x256 JPEGs: caption -> prior -> CLIP image embedding -> decoder."""

from pathlib import Path

from accelerate import PartialState

from dalle2 import cli
from dalle2.errors import UserError
from dalle2.gallery import write_gallery, write_grid
from dalle2.pipeline import add_checkpoint_flags, load_pipeline
from dalle2.render import (
    add_caption_flags,
    describe_settings,
    find_nearest,
    list_captions,
    list_jobs,
    pick_best,
    render_jobs,
    save_manifest,
)
from dalle2.sampling import SAMPLER, SAMPLERS, THRESHOLDS

OPTIONS = ("cond_scale", "prior_cond_scale", "sample_timesteps", "num_candidates",
           "lowres_noise_level", "sampler", "thresholding")


def parse_args():
    parser = cli.Parser(__doc__)
    add_checkpoint_flags(parser)
    what = add_caption_flags(parser)
    what.add_argument("--samples_per_prompt", type=cli.at_least(1), default=1)
    what.add_argument("--rerank", action="store_true",
                      help="keep the one of --samples_per_prompt with the best CLIP score")
    how = parser.add_argument_group("how (None: what the checkpoints' configs say)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--cond_scale", type=cli.at_least(0.0),
                     help="guidance of the decoder, 1 is none")
    how.add_argument("--prior_cond_scale", type=cli.at_least(0.0),
                     help="guidance of the prior, 1 is none")
    how.add_argument("--sample_timesteps", type=cli.at_least(1), nargs="+",
                     help="sampling steps: one number, or the prior's and each stage's")
    how.add_argument("--num_candidates", type=cli.at_least(1), help="image embeddings that the "
                     "prior samples a caption, of which the nearest to it is kept")
    how.add_argument("--lowres_noise_level", type=cli.at_least(0), help="noise on the picture that "
                     "an upsampler enlarges, of 1000: the more, the more it invents")
    how.add_argument("--sampler", choices=SAMPLERS, default=SAMPLER)
    cli.add_precision_flag(how)
    how.add_argument("--thresholding", choices=THRESHOLDS, default="static",
                     help="of the decoder's estimates: clamped, or scaled a picture (Saharia 2022)")
    how.add_argument("--batch_size", type=cli.at_least(1),
                     help="pictures at a time (None: 16 on a CPU, what fits on a GPU)")
    where = parser.add_argument_group("where")
    where.add_argument("--output_dir", default="result", help="goes on with what is there")
    where.add_argument("--train_img_path", help="with --train_annot_path: the gallery shows the "
                       "nearest training picture, to see what is memorised")
    where.add_argument("--train_annot_path")
    where.add_argument("--store_dir", default=cli.STORE_DIR, help="where it was prepared")
    args = parser.parse_args()
    if bool(args.train_img_path) != bool(args.train_annot_path):
        raise UserError("needed with --train_annot_path, and the other way round", "train_img_path")
    return args


def main():
    args = parse_args()
    jobs = list_jobs(list_captions(args), args.seed, args.samples_per_prompt)
    pipeline = load_pipeline(args, cli.pick_device(), cli.resolve_precision(args.mixed_precision))
    options = pipeline.resolve_options(**{name: getattr(args, name) for name in OPTIONS})
    settings = describe_settings(args, pipeline, options) | {
        "init_from_true_embedding": args.init_from_true_embedding}
    entries = render_jobs(pipeline, jobs, args.output_dir, settings, options,
                          batch_size=args.batch_size, from_photos=args.init_from_true_embedding)
    if PartialState().is_main_process:
        save(args, pipeline.clip, settings, jobs, entries)


def save(args, clip, settings, jobs, entries):
    """Manifest, gallery and grid of the rendered jobs, with --rerank of the best of each caption."""
    output_dir, num_samples = Path(args.output_dir), args.samples_per_prompt
    settings |= {"seed": args.seed, "rerank_of": num_samples if args.rerank else 1}
    for kind in ("prior", "decoder"):
        settings[f"{kind}_sha256"] = settings[f"{kind}_ckpt"]
        settings[f"{kind}_ckpt"] = getattr(args, f"{kind}_ckpt")
    if args.rerank:
        (jobs, entries), num_samples = pick_best(jobs, entries, num_samples), 1
    nearest = find_nearest(args, clip, output_dir, entries)
    save_manifest(output_dir, settings, entries)
    write_gallery(output_dir / "index.html", entries, settings, [job.photo for job in jobs], nearest)
    write_grid(output_dir, entries, num_samples)
    print(f"{output_dir}: {len(entries)} pictures, manifest.json, index.html, grid.jpg; "
          f"mean CLIP score {sum(e['clip_score'] for e in entries) / len(entries):.4f}")


if __name__ == "__main__":
    cli.run(main)
