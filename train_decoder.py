"""Trains the cascaded decoder: CLIP image embedding -> 64 px -> 256 px. Ramesh et al. 2022, 2.1."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dalle2 import cli
from dalle2.config import PRESETS, DecoderConfig, UserError, config_to_dict
from dalle2.data import draw_indexes, load_captions, load_pictures, read_crops, resize
from dalle2.diffusion import build_diffusion
from dalle2.images import arrange
from dalle2.losses import compute_unet_loss, crop
from dalle2.models import (
    build_unet,
    list_blocks,
    load_decoder,
    load_prior,
    save_decoder_stage,
)
from dalle2.rng import BatchRandom
from dalle2.sampling import sample_image_embed, sample_images
from dalle2.train_loop import train
from dalle2.validation import compute_fixed_timesteps, map_rows, summarize_by_quartile

NUM_SAMPLES = 8  # pictures a row of the sample grids


def parse_args():
    parser = cli.Parser(__doc__)
    parser.add_argument("--unet_number", type=cli.at_least(0), default=0,
                        help="train this stage alone, 1 is the first; 0: every stage in turn")
    parser.add_argument("--prior_ckpt", help="what train_prior.py exported: the sample pictures "
                        "then show its embeddings as well")
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    cli.add_train_flags(parser, "output/decoder")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction,
                        default=None, help="compute blocks again in the backward pass: less "
                        "memory, a third more time (None: what the preset says)")
    return parser.parse_args()


def main():
    args = parse_args()
    unets = PRESETS[args.preset].decoder.unets
    if not 0 <= args.unet_number <= len(unets):
        raise UserError(f"--unet_number: {args.unet_number} is not one of 0 to {len(unets)}")
    numbers = [args.unet_number] if args.unet_number else range(1, len(unets) + 1)
    if args.gradient_checkpointing is not None:
        unets = [replace(unet, gradient_checkpointing=args.gradient_checkpointing)
                 for unet in unets]
    config = DecoderConfig(unets=tuple(
        cli.override_train(unet, args) if number in numbers else unet
        for number, unet in enumerate(unets, start=1)))
    cli.check_data(args)
    clip = cli.ClipSource(args.clip_model, args.clip_pretrained)
    if args.dry_run:
        records = load_captions(args.train_annot_path, args.train_img_path)
        for number in numbers:
            unet = build_unet(config.unets[number - 1], number, clip.load().embed_dim)
            cli.print_plan(f"unet {number}", config.unets[number - 1], unet,
                           f"{len(records)} pictures")
        return

    stores = cli.open_stores(args, clip)
    header = {"embed_dim": clip.load().embed_dim, "clip": clip.describe(args.output_dir)}
    accelerator = cli.build_accelerator(config.unets[numbers[0] - 1].train.mixed_precision)
    sample_embeds = collect_sample_embeds(stores[1], args.prior_ckpt, clip.fingerprint,
                                          accelerator.device)
    del clip  # its work is done, and its memory free
    for number in numbers:
        train_unet(number, config, stores, sample_embeds, header, args.output_dir, accelerator,
                   args.log_with)


def train_unet(number, config, stores, sample_embeds, header, output_dir, accelerator, log_with):
    """Trains stage `number` of the cascade; `decoder.safetensors` gains or renews that stage."""
    unet_config = config.unets[number - 1]
    lowres_size = config.unets[number - 2].image_size if number > 1 else 0
    crop_size = unet_config.crop_size or unet_config.image_size
    torch.manual_seed(unet_config.train.seed)
    unet = build_unet(unet_config, number, header["embed_dim"])
    diffusion = build_diffusion(unet_config, accelerator.device)
    train_store, val_store = stores

    # ---- data: uint8 pictures of this stage's own size, and of the stage before it
    sizes = {"image": unet_config.image_size}
    if lowres_size:
        sizes["lowres_cond_img"] = lowres_size
    pictures = {(store, name): load_pictures(store, size, accelerator.device)
                for store in stores if store for name, size in sizes.items()}

    def load_batch(store, indexes, random):
        """On the CPU: what is read from disk, and the indexes of what the GPU holds."""
        batch = {"index": torch.from_numpy(np.asarray(indexes))}
        if lowres_size:
            room = unet_config.image_size - crop_size + 1
            batch["corner"] = (random.rand(2) * room).long()                # (B, 2)
        else:
            batch["image_embed"] = torch.from_numpy(store.image_embed[indexes])
        for name in sizes:
            held = pictures[store, name]
            if torch.is_tensor(held):
                continue
            crops = name == "image" and lowres_size
            batch[name] = read_crops(held, indexes, batch["corner"], crop_size) if crops \
                else torch.from_numpy(held[indexes])
        return batch

    def draw_batch(step, rows, random):
        indexes = draw_indexes(len(train_store), unet_config.train.seed, step,
                               unet_config.train.batch_size)
        return load_batch(train_store, indexes[rows], random)

    # ---- loss
    def compute_loss(module, batch, random, store=train_store):
        for name in sizes.keys() - batch.keys():
            batch[name] = pictures[store, name][batch["index"]]
        if batch["image"].shape[-1] > crop_size:
            batch["image"] = crop(batch["image"], batch["corner"], crop_size)
        return compute_unet_loss(module, batch, random, unet_config, diffusion)

    # ---- validation: fixed crops, noise and timesteps
    num_val = len(val_store) if val_store else 0
    fixed_t = compute_fixed_timesteps(num_val, unet_config.timesteps) if num_val else None

    def validate(module, brief):
        @torch.no_grad()
        def compute_val_losses(rows):
            indexes = np.arange(num_val)[rows]
            key = dict(batch_size=len(indexes))
            batch = load_batch(val_store, indexes, BatchRandom("validate", rows.start, **key))
            batch["t"] = fixed_t[rows]
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            fixed = BatchRandom("validate", rows.start, device=accelerator.device, **key)
            with accelerator.autocast():
                return compute_loss(module, batch, fixed, val_store)
        losses = map_rows(compute_val_losses, num_val, accelerator)
        return summarize_by_quartile(losses, fixed_t, unet_config.timesteps)

    # ---- sample pictures, where the stages before this one are trained
    path = Path(output_dir) / "decoder.safetensors"
    stages, configs, _ = load_decoder(path, "--output_dir") if path.exists() else ({}, {}, None)
    earlier = [n for n in range(1, number) if n in stages]

    def sample(module):
        """A row of photos; below, what the stages so far make of each kind of embedding."""
        chain = [*(stages[n].to(accelerator.device) for n in earlier), module]
        chain_configs = [*(configs[n] for n in earlier), unet_config]
        rows = [torch.from_numpy(val_store.images[range(NUM_SAMPLES)[:len(val_store)]]) / 255]
        for embeds in sample_embeds:
            with accelerator.autocast():
                rows.append(sample_images(chain, chain_configs, embeds,
                                          range(len(embeds))).float().cpu())
        return arrange(torch.cat([resize(row, unet_config.image_size) for row in rows]),
                       columns=len(rows[0]))

    def export(state, step, last):
        save_decoder_stage(Path(output_dir) / f"decoder{'_last' if last else ''}.safetensors",
                           number, unet_config, state, header, step, len(config.unets))

    train(module=unet, compute_loss=compute_loss, draw_batch=draw_batch,
          train_config=unet_config.train, run_dir=Path(output_dir) / f"unet{number}",
          header={**header, "config": config_to_dict(unet_config), "lowres_size": lowres_size,
                  "data": cli.describe_data(train_store)},
          accelerator=accelerator, export=export,
          validate=val_store and validate, list_blocks=list_blocks, log_with=log_with,
          sample=sample if val_store and len(earlier) == number - 1 else None)


def collect_sample_embeds(val_store, prior_ckpt, fingerprint, device):
    """What the sample pictures are drawn from: image embeddings of the first validation pictures,
    true ones, text embeddings in their place, and, with a prior, what it makes of the captions."""
    if val_store is None:
        return []
    rows = val_store.caption_start[:-1][:NUM_SAMPLES]  # the first caption of each
    text_embed = torch.from_numpy(val_store.text_embed[rows]).float().to(device)
    image_embed = torch.from_numpy(np.array(val_store.image_embed[:NUM_SAMPLES])).float()
    embeds = [image_embed.to(device), text_embed]
    if prior_ckpt:
        prior, config, header = load_prior(prior_ckpt)
        if header["clip"]["fingerprint"] != fingerprint:
            raise UserError(f"--prior_ckpt: {prior_ckpt} was trained with another CLIP")
        text_encodings = val_store.load_text_encodings(rows, config.max_text_len).to(
            device, torch.float32)
        embeds.append(sample_image_embed(prior.to(device), config, text_embed, text_encodings,
                                         range(len(rows))))
    return embeds


if __name__ == "__main__":
    cli.run(main)
