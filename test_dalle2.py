"""Renders captions to 256x256 JPEGs: caption -> prior -> CLIP image embedding -> decoder."""

from pathlib import Path

from dalle2 import cli
from dalle2.errors import UserError


def parse_args():
    parser = cli.Parser(__doc__)
    cli.add_checkpoint_flags(parser)
    cli.add_caption_flags(parser)
    cli.add_sample_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="result", help="folder for the pictures; an "
                        "interrupted call is resumed, pictures of earlier calls are kept")
    output.add_argument("--train_img_path", help="picture folder of the training: the gallery then "
                        "shows the nearest training picture, to see what was memorised")
    output.add_argument("--train_annot_path", help="COCO captions file of the training")
    output.add_argument("--store_dir", default=cli.STORE_DIR, help="prepared store of the "
                        "training pictures")
    args = parser.parse_args()
    if (args.train_img_path is None) != (args.train_annot_path is None):
        raise UserError("give it together with --train_annot_path", "train_img_path")
    return args


def main():
    args = parse_args()
    with cli.import_late():
        from dalle2.gallery import read_manifest, write_folder
        from dalle2.pipeline import load_pipeline
        from dalle2.processes import join_processes
        from dalle2.render import (
            find_nearest,
            list_captions,
            list_jobs,
            pick_best,
            read_options,
            render_jobs,
        )

    join_processes()
    jobs = list_jobs(list_captions(args), args.seed, args.samples_per_prompt, args.output_dir)
    read_manifest(args.output_dir)  # raises, before anything is rendered, if it is damaged
    pipeline = load_pipeline(args, cli.pick_device(), cli.resolve_precision(args.mixed_precision))
    options = read_options(args, pipeline)
    settings = pipeline.describe_settings(options) | {
        "init_from_true_embedding": args.init_from_true_embedding}
    entries = render_jobs(pipeline, jobs, args.output_dir, settings, options,
                          batch_size=args.batch_size, from_photos=args.init_from_true_embedding)
    if not join_processes().is_main_process:
        return

    # ---- what the folder shows
    output_dir, num_samples = Path(args.output_dir), args.samples_per_prompt
    settings |= {"prior_ckpt": args.prior_ckpt, "decoder_ckpt": args.decoder_ckpt,
                 "seed": args.seed, "rerank_of": num_samples if args.rerank else 1}
    files = {entry["file"] for entry in entries}
    if args.rerank:
        entries, num_samples = pick_best(entries, num_samples), 1
    nearest = find_nearest(args, pipeline.clip, output_dir, entries)
    shown = write_folder(output_dir, settings, entries, files, nearest, num_samples)
    earlier = f" and {len(shown) - len(entries)} earlier ones" if len(shown) > len(entries) else ""
    print(f"{output_dir}: {len(entries)} pictures{earlier}, manifest.json, index.html, grid.jpg; "
          f"mean CLIP score {sum(e['clip_score'] for e in entries) / len(entries):.4f}")


if __name__ == "__main__":
    cli.run(main)
