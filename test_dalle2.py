"""Renders captions to 256x256 JPEGs: caption -> prior -> CLIP image embedding -> decoder."""

import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from dalle2 import cli
from dalle2.clip import compute_fingerprint, load_clip
from dalle2.config import UserError
from dalle2.data import load_captions, load_image
from dalle2.files import replace_file
from dalle2.gallery import write_gallery
from dalle2.images import make_unique_stems, save_jpeg
from dalle2.models import load_decoder, load_prior
from dalle2.rng import derive_seed
from dalle2.sampling import sample_image_embed, sample_images


def parse_args():
    parser = cli.Parser(__doc__)
    parser.add_argument("--prior_ckpt", default="output/prior/prior.safetensors",
                        help="what train_prior.py exported")
    parser.add_argument("--decoder_ckpt", default="output/decoder/decoder.safetensors",
                        help="what train_decoder.py exported")
    parser.add_argument("--test_annot_path", help="COCO captions file whose captions are rendered")
    parser.add_argument("--test_img_path", help="its pictures, for the gallery; needed by "
                        "--init_from_true_embedding")
    parser.add_argument("--prompt", action="append", help="render this; may be repeated")
    parser.add_argument("--prompt_file", help="text file, a prompt a line")
    parser.add_argument("--output_dir", default="result", help="where the pictures go")
    parser.add_argument("--num_images", type=int, default=50,
                        help="render the first so many captions of the COCO file, one a picture")
    parser.add_argument("--samples_per_prompt", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cond_scale", type=float,
                        help="guidance of the decoder, 1 is none (None: what it was trained with)")
    parser.add_argument("--prior_cond_scale", type=float, help="guidance of the prior, likewise")
    parser.add_argument("--sample_timesteps", type=int,
                        help="sampling steps of prior and of every stage (None: the config's)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--init_from_true_embedding", action="store_true",
                        help="feed the decoder the true photo's embedding, to see it without prior")
    parser.add_argument("--clip_model", help="None: the CLIP that the checkpoint names")
    parser.add_argument("--clip_pretrained", help="None: the CLIP that the checkpoint names")
    return parser.parse_args()


def main():
    args = parse_args()
    for name in ("num_images", "samples_per_prompt", "batch_size", "sample_timesteps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)} must be at least 1")
    jobs = list_jobs(args)
    device = cli.pick_device()
    prior, prior_config, header = load_prior(args.prior_ckpt)
    unets, unet_configs, decoder_header = load_decoder(args.decoder_ckpt)
    missing = [n for n in range(1, len(decoder_header["stages"]) + 1) if n not in unets]
    if missing:
        raise UserError(f"--decoder_ckpt: stage {missing[0]} is not trained yet: "
                        f"sh scripts/train_decoder.sh --unet_number {missing[0]}")
    clip = load_matching_clip(args, header["clip"], decoder_header["clip"], device)
    prior.to(device)
    unets = [unets[n].to(device) for n in sorted(unets)]
    unet_configs = [unet_configs[n] for n in sorted(unet_configs)]

    entries, output_dir = [], Path(args.output_dir)
    stems = make_unique_stems([job["caption"] for job in jobs])
    for start in tqdm(range(0, len(jobs), args.batch_size), desc="rendering", unit="batch",
                      mininterval=0.1 if sys.stderr.isatty() else 10):
        batch = jobs[start:start + args.batch_size]
        seeds = [job["seed"] for job in batch]
        text_tokens = clip.tokenize([job["caption"] for job in batch])
        text_embed, text_encodings = clip.embed_text(text_tokens)
        if args.init_from_true_embedding:
            image_embed = clip.embed_image(torch.stack([load_image(job["photo"]) for job in batch]))
        else:
            image_embed = sample_image_embed(
                prior, prior_config, text_embed,
                fit_text_encodings(text_encodings, text_tokens, clip, prior_config.max_text_len),
                seeds, cond_scale=args.prior_cond_scale, sample_timesteps=args.sample_timesteps)
        images = sample_images(unets, unet_configs, image_embed, seeds, cond_scale=args.cond_scale,
                               sample_timesteps=args.sample_timesteps)
        scores = (clip.embed_image(images) * text_embed).sum(-1).tolist()
        for job, stem, image, score in zip(batch, stems[start:], images, scores):
            save_jpeg(image, output_dir / f"{stem}.jpg")
            entries.append({"file": f"{stem}.jpg", "caption": job["caption"],
                            "image_id": job["image_id"], "seed": job["seed"],
                            "clip_score": round(score, 4)})
    settings = {"cond_scale": args.cond_scale or unet_configs[0].cond_scale,
                "prior_cond_scale": args.prior_cond_scale or prior_config.cond_scale,
                "sample_timesteps": args.sample_timesteps or [
                    prior_config.sample_timesteps, *(c.sample_timesteps for c in unet_configs)],
                "seed": args.seed, "prior_ckpt": args.prior_ckpt,
                "decoder_ckpt": args.decoder_ckpt, "clip": header["clip"],
                "init_from_true_embedding": args.init_from_true_embedding}
    replace_file(output_dir / "manifest.json", lambda part: part.write_text(
        json.dumps({"settings": settings, "images": entries}, indent=1, ensure_ascii=False)))
    write_gallery(output_dir / "index.html", entries, settings, [job["photo"] for job in jobs])
    print(f"{output_dir}: {len(entries)} pictures, manifest.json, index.html; "
          f"mean CLIP score {sum(e['clip_score'] for e in entries) / len(entries):.4f}")


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
    sources = [{"caption": prompt.strip(), "image_id": None, "photo": None}
               for prompt, _ in prompts]
    if args.test_annot_path:
        if not args.test_img_path:
            raise UserError("--test_img_path: needed with --test_annot_path")
        records = load_captions(args.test_annot_path, args.test_img_path, "test", args.num_images)
        sources += [{"caption": record.captions[derive_seed("caption", record.image_id)
                                                % len(record.captions)],
                     "image_id": record.image_id, "photo": record.path} for record in records]
    elif args.test_img_path:
        raise UserError("--test_annot_path: needed with --test_img_path")
    if not sources:
        raise UserError("--prompt: nothing to render; give --prompt, --prompt_file or "
                        "--test_annot_path with --test_img_path")
    if args.init_from_true_embedding and any(source["photo"] is None for source in sources):
        raise UserError("--init_from_true_embedding: a prompt has no photo; give --test_annot_path "
                        "and --test_img_path alone")
    return [{**source, "seed": derive_seed(args.seed, index) % 2 ** 31}
            for index, source in enumerate(s for s in sources
                                           for _ in range(args.samples_per_prompt))]


def load_matching_clip(args, recorded, decoder_recorded, device):
    """The FrozenClip that both checkpoints were trained with; UserError where it is another."""
    if recorded["fingerprint"] != decoder_recorded["fingerprint"]:
        raise UserError("--decoder_ckpt: prior and decoder were trained with different CLIPs "
                        f"({recorded['clip_pretrained']} {recorded['fingerprint']}, "
                        f"{decoder_recorded['clip_pretrained']} {decoder_recorded['fingerprint']})")
    pretrained = args.clip_pretrained
    if pretrained is None:
        beside = Path(args.prior_ckpt).parent / recorded["relative_path"]
        use_beside = recorded["relative_path"] and beside.is_file()
        pretrained = os.path.normpath(beside) if use_beside else recorded["clip_pretrained"]
    clip = load_clip(args.clip_model or recorded["clip_model"], pretrained, device)
    fingerprint = compute_fingerprint(clip)
    if fingerprint != recorded["fingerprint"]:
        raise UserError(f"--clip_pretrained: {pretrained} ({fingerprint}) is not the CLIP that the "
                        f"checkpoints were trained with ({recorded['fingerprint']})")
    return clip


def fit_text_encodings(text_encodings, text_tokens, clip, max_text_len):
    """(B, L, D) -> (B, at most max_text_len, D), a longer caption keeping its end token: what
    Store.load_text_encodings does for training."""
    lengths = clip.compute_text_mask(text_tokens).sum(1)  # (B,)
    out = text_encodings[:, :max_text_len].clone()
    for i in (lengths > max_text_len).nonzero().flatten().tolist():
        out[i, -1] = text_encodings[i, lengths[i] - 1]
    return out


if __name__ == "__main__":
    cli.run(main)
