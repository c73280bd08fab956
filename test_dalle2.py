"""Renders captions to 256x256 JPEGs: caption -> prior -> CLIP image embedding -> decoder."""

import os
from pathlib import Path

import numpy as np
import torch

from dalle2 import cli
from dalle2.config import UserError
from dalle2.data import load_image
from dalle2.files import hold_lock
from dalle2.gallery import read_manifest, write_gallery, write_manifest
from dalle2.images import arrange, save_jpeg
from dalle2.pipeline import add_checkpoint_flags, load_pipeline
from dalle2.prepare import prepare_store
from dalle2.processes import join_processes
from dalle2.render import compute_digest, list_coco_jobs, render_jobs
from dalle2.rng import derive_seed
from dalle2.sampling import SAMPLER, SAMPLERS, THRESHOLDS


def parse_args():
    parser = cli.Parser(__doc__)
    add_checkpoint_flags(parser)
    what = parser.add_argument_group("what to render")
    what.add_argument("--test_annot_path", help="COCO captions file whose captions are rendered")
    what.add_argument("--test_img_path", help="its pictures, for the gallery; needed by "
                      "--init_from_true_embedding")
    what.add_argument("--prompt", action="append", help="render this; may be repeated")
    what.add_argument("--prompt_file", help="text file, a prompt a line")
    what.add_argument("--num_images", type=cli.at_least(1), default=50,
                      help="render the first so many captions of the COCO file, one a picture")
    what.add_argument("--samples_per_prompt", type=cli.at_least(1), default=1)
    what.add_argument("--rerank", action="store_true",
                      help="keep the one of --samples_per_prompt with the best CLIP score")
    what.add_argument("--init_from_true_embedding", action="store_true",
                      help="feed the decoder the true photo's embedding, to see it without prior")
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
    where.add_argument("--output_dir", default="result", help="goes on with what is there; "
                       "pictures of earlier calls stay in manifest, gallery and grid")
    where.add_argument("--train_img_path", help="with --train_annot_path: the gallery shows the "
                       "nearest training picture, to see what is memorised")
    where.add_argument("--train_annot_path")
    where.add_argument("--store_dir", default=cli.STORE_DIR, help="where it was prepared")
    return parser.parse_args()


def main():
    args = parse_args()
    check_flags(args)
    jobs = list_jobs(args)
    read_manifest(args.output_dir)  # a damaged one is told before anything is rendered
    pipeline = load_pipeline(args, cli.pick_device(), cli.resolve_precision(args.mixed_precision))
    prior_steps, *unet_steps = pipeline.resolve_timesteps(args.sample_timesteps)
    lowres_noise_level = pipeline.resolve_lowres_noise_level(args.lowres_noise_level)
    state, output_dir = join_processes(), Path(args.output_dir)
    settings = describe_settings(args, pipeline, [prior_steps, *unet_steps], lowres_noise_level)
    entries = render_jobs(
        pipeline, jobs, output_dir, settings, batch_size=args.batch_size,
        from_photos=args.init_from_true_embedding,
        prior_options={"prior_cond_scale": args.prior_cond_scale, "sampler": args.sampler,
                       "sample_timesteps": prior_steps, "num_candidates": args.num_candidates},
        options={"cond_scale": args.cond_scale, "sample_timesteps": unet_steps,
                 "lowres_noise_level": lowres_noise_level,
                 "sampler": args.sampler, "thresholding": args.thresholding})
    if not state.is_main_process:
        return
    entries = [entry if job["photo"] is None else
               {**entry, "photo": os.path.relpath(job["photo"], output_dir)}
               for entry, job in zip(entries, jobs)]
    files = {entry["file"] for entry in entries}
    if args.rerank:
        entries = pick_best(entries, args.samples_per_prompt)
    nearest = find_nearest(args, pipeline, output_dir, entries) if args.train_annot_path else []
    settings |= {"seed": args.seed, "rerank_of": args.samples_per_prompt if args.rerank else 1}
    with hold_lock(output_dir / ".manifest.lock",
                   told=f"waiting for another process that writes {output_dir}/manifest.json"):
        shown = write_manifest(output_dir, settings, entries, files)
        write_gallery(output_dir / "index.html", shown, settings, nearest)
        write_grid(output_dir, shown, 1 if args.rerank else args.samples_per_prompt)
    earlier = f" and {len(shown) - len(entries)} earlier ones" if len(shown) > len(entries) else ""
    print(f"{output_dir}: {len(entries)} pictures{earlier}, manifest.json, index.html, grid.jpg; "
          f"mean CLIP score {sum(e['clip_score'] for e in entries) / len(entries):.4f}")


def check_flags(args):
    if bool(args.train_img_path) != bool(args.train_annot_path):
        raise UserError("--train_img_path: needed with --train_annot_path, and the other way round")


def list_jobs(args):
    """What to render: list of {"caption", "image_id", "photo", "seed"}, one a picture."""
    prompts = [(prompt, "--prompt") for prompt in args.prompt or []]
    if args.prompt_file:
        if not os.path.isfile(args.prompt_file):
            raise UserError(f"--prompt_file: no such file: {args.prompt_file}")
        lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
        prompts += [(line, "--prompt_file") for line in lines if line.strip()]
    for prompt, flag in prompts:
        if not prompt.strip():
            raise UserError(f"{flag}: a prompt is empty")
    jobs = [{"caption": prompt.strip(), "image_id": None, "photo": None} for prompt, _ in prompts]
    if args.test_annot_path:
        if not args.test_img_path:
            raise UserError("--test_img_path: needed with --test_annot_path")
        jobs += list_coco_jobs(args.test_annot_path, args.test_img_path, args.seed, args.num_images)
    elif args.test_img_path:
        raise UserError("--test_annot_path: needed with --test_img_path")
    if not jobs:
        raise UserError("--prompt: nothing to render; give --prompt, --prompt_file or "
                        "--test_annot_path with --test_img_path")
    if args.init_from_true_embedding and any(job["photo"] is None for job in jobs):
        raise UserError("--init_from_true_embedding: a prompt has no photo; give --test_annot_path "
                        "and --test_img_path alone")
    jobs = [job for job in jobs for _ in range(args.samples_per_prompt)]
    return [{**job, "seed": derive_seed(args.seed, index) % 2 ** 31}
            for index, job in enumerate(jobs)]


def describe_settings(args, pipeline, sample_timesteps, lowres_noise_level):
    """What the pictures depend on besides captions and seeds, as JSON."""
    scales = {name: config.cond_scale if getattr(args, name) is None else getattr(args, name)
              for name, config in (("cond_scale", pipeline.unet_configs[0]),
                                   ("prior_cond_scale", pipeline.prior_config))}
    return {**scales, "sample_timesteps": sample_timesteps, "sampler": args.sampler,
            "num_candidates": args.num_candidates or pipeline.prior_config.num_candidates,
            "lowres_noise_level": lowres_noise_level, "thresholding": args.thresholding,
            "init_from_true_embedding": args.init_from_true_embedding,
            "prior_ckpt": args.prior_ckpt, "prior_sha256": compute_digest(args.prior_ckpt),
            "decoder_ckpt": args.decoder_ckpt, "decoder_sha256": compute_digest(args.decoder_ckpt),
            "clip": pipeline.header["clip"], "mixed_precision": pipeline.precision}


def pick_best(entries, count):
    """The entry of the best CLIP score of each `count` in a row."""
    return [max(entries[i:i + count], key=lambda entry: entry["clip_score"])
            for i in range(0, len(entries), count)]


def find_nearest(args, pipeline, output_dir, entries):
    """[(picture (3, 256, 256) uint8, cosine)]: the training picture whose CLIP embedding is nearest
    to that of each rendered picture. Puts file and cosine into the entries."""
    from dalle2.clip import compute_fingerprint
    store = prepare_store(args.train_img_path, args.train_annot_path, args.store_dir,
                          clip=lambda: pipeline.clip,
                          fingerprint=compute_fingerprint(pipeline.clip))
    embeds = torch.from_numpy(np.array(store.image_embed)).float().to(pipeline.clip.device)
    found = []
    for entry in entries:
        picture = load_image(output_dir / entry["file"])
        cosine, index = (embeds @ pipeline.clip.embed_image(picture[None])[0]).max(0)
        entry["nearest_train"] = {"file": store.file_names[index],
                                  "cosine": round(cosine.item(), 4)}
        found.append((torch.from_numpy(np.array(store.images[int(index)])), cosine.item()))
    return found


def write_grid(output_dir, entries, samples_per_prompt):
    """`grid.jpg` of the first 64 pictures at 128 px, the samples of this call's prompts in one row
    each."""
    pictures = [load_image(output_dir / entry["file"], 128) / 255 for entry in entries[:64]]
    columns = samples_per_prompt if samples_per_prompt > 1 else 8
    save_jpeg(arrange(torch.stack(pictures), columns), output_dir / "grid.jpg")


if __name__ == "__main__":
    cli.run(main)
