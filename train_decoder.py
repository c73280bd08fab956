"""Trains the cascaded decoder: CLIP image embedding -> 64 px -> 256 px. Ramesh et al. 2022, 2.1."""

from pathlib import Path

import torch

from dalle2 import cli
from dalle2.checkpoint import load_export, save_export
from dalle2.config import PRESETS, DecoderConfig, UserError, config_to_dict
from dalle2.data import draw_indexes, load_captions, resize
from dalle2.images import save_grid
from dalle2.models import build_unet, load_decoder
from dalle2.rng import BatchRandom
from dalle2.sampling import build_diffusion, noise_lowres, sample_images
from dalle2.train_loop import train


def parse_args():
    parser = cli.Parser(__doc__)
    parser.add_argument("--unet_number", type=int, default=0,
                        help="train this stage alone, 1 is the first; 0: every stage in turn")
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    cli.add_train_flags(parser, "output/decoder")
    return parser.parse_args()


def main():
    args = parse_args()
    unets = PRESETS[args.preset].decoder.unets
    if not 0 <= args.unet_number <= len(unets):
        raise UserError(f"--unet_number: {args.unet_number} is not one of 0 to {len(unets)}")
    numbers = [args.unet_number] if args.unet_number else range(1, len(unets) + 1)
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
    for number in numbers:
        train_unet(number, config, stores, header, args.output_dir, accelerator)


def train_unet(number, config, stores, header, output_dir, accelerator):
    """Trains stage `number` of the cascade; `decoder.safetensors` gains or renews that stage."""
    unet_config = config.unets[number - 1]
    lowres_size = config.unets[number - 2].image_size if number > 1 else 0
    crop_size = unet_config.crop_size or unet_config.image_size
    torch.manual_seed(unet_config.train.seed)
    unet = build_unet(unet_config, number, header["embed_dim"])
    diffusion = build_diffusion(unet_config, accelerator.device)
    train_store, val_store = stores

    # ---- data: uint8 pictures of this stage's own size, and of the stage before it
    pictures = {store: load_pictures(store, unet_config.image_size) for store in stores if store}
    lowres_pictures = {store: load_pictures(store, lowres_size)
                       for store in stores if store and lowres_size}

    def load_batch(store, indexes, random):
        if not lowres_size:
            return {"image": torch.from_numpy(pictures[store][indexes]),
                    "image_embed": torch.from_numpy(store.image_embed[indexes]).float()}
        room = unet_config.image_size - crop_size + 1
        corners = (random.rand(2) * room).long().tolist()
        lowres = torch.from_numpy(lowres_pictures[store][indexes])
        lowres = resize(lowres.float() / 255, unet_config.image_size)  # (B, 3, H, W), as sampled
        windows = [(..., slice(y, y + crop_size), slice(x, x + crop_size)) for y, x in corners]
        return {"image": torch.stack([torch.from_numpy(pictures[store][i][window].copy())
                                      for i, window in zip(indexes, windows)]),
                "lowres_cond_img": torch.stack([image[window]
                                                for image, window in zip(lowres, windows)])}

    def draw_batch(step, rows, random):
        indexes = draw_indexes(len(train_store), unet_config.train.seed, step,
                               unet_config.train.batch_size)
        return load_batch(train_store, indexes[rows], random)

    # ---- loss
    def compute_loss(module, batch, random):
        x_start = batch["image"].float() / 127.5 - 1
        t, noise = random.randint(unet_config.timesteps), random.randn(*x_start.shape[1:])
        if not lowres_size:
            drop = (random.rand() < unet_config.image_cond_drop_prob).float()  # (B,)
            condition = dict(image_embed=batch["image_embed"], image_cond_drop_prob=drop)
        else:
            level = random.randint(unet_config.lowres_noise_max_level + 1)
            lowres, level = noise_lowres(batch["lowres_cond_img"] * 2 - 1, level,
                                         random.randn(*x_start.shape[1:]))
            condition = dict(image_embed=None, lowres_cond_img=lowres, lowres_noise_level=level)
        return diffusion.loss(lambda x_t, t: module(x_t, t, **condition), x_start, t, noise)

    # ---- validation: fixed crops, noise and timesteps
    def validate(module):
        losses = []
        for start in range(0, len(val_store), unet_config.train.batch_size):
            indexes = list(range(start, min(len(val_store), start + unet_config.train.batch_size)))
            key = dict(batch_size=len(indexes))
            batch = load_batch(val_store, indexes, BatchRandom("validate", start, **key))
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            fixed = BatchRandom("validate", start, device=accelerator.device, **key)
            with torch.no_grad(), accelerator.autocast():
                losses.append(compute_loss(module, batch, fixed))
        return {"val_loss": torch.cat(losses).mean().item()}

    def sample(module, path):
        """Photos above, below what the stages so far make of their embeddings."""
        indexes = list(range(min(8, len(val_store))))
        photos = torch.from_numpy(val_store.images[indexes]).float() / 255
        embeds = torch.from_numpy(val_store.image_embed[indexes]).float().to(accelerator.device)
        stages, configs, _ = load_decoder(Path(output_dir) / "decoder.safetensors", "--output_dir")
        if set(range(1, number)) - set(stages):
            return  # a stage before this one is not trained yet
        stages = [*(stages[n].to(accelerator.device) for n in range(1, number)), module]
        with accelerator.autocast():
            images = sample_images(stages, [configs[n] for n in range(1, number + 1)], embeds,
                                   indexes)
        save_grid(torch.cat([resize(photos, unet_config.image_size), images.float().cpu()]), path,
                  columns=len(indexes))

    def export(state, step):
        path = Path(output_dir) / "decoder.safetensors"
        stages, weights = [None] * len(config.unets), {}
        if path.exists():
            before, weights = load_export(path, "decoder", "--output_dir")
            stages = before["stages"]
        prefix = f"unets.{number - 1}."
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        weights |= {prefix + name: value for name, value in state.items()}
        stages[number - 1] = {"config": config_to_dict(unet_config), "step": step}
        save_export(path, "decoder", {**header, "stages": stages}, weights)

    train(module=unet, compute_loss=compute_loss, draw_batch=draw_batch,
          train_config=unet_config.train, run_dir=Path(output_dir) / f"unet{number}",
          header={**header, "config": config_to_dict(unet_config), "lowres_size": lowres_size},
          accelerator=accelerator, export=export,
          validate=val_store and validate, sample=val_store and sample)


def load_pictures(store, size):
    """(N, 3, size, size) uint8 of a store, memory-mapped."""
    return store.images if size == store.images.shape[-1] else store.load_small_images(size)


if __name__ == "__main__":
    cli.run(main)
