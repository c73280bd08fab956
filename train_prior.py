"""Trains the diffusion prior: caption -> CLIP image embedding. Ramesh et al. 2022, sec. 2.2."""

from pathlib import Path

import torch
import torch.nn.functional as F

from dalle2 import cli
from dalle2.checkpoint import save_export
from dalle2.config import PRESETS, UserError, config_to_dict
from dalle2.data import draw_indexes, load_captions
from dalle2.diffusion import Diffusion
from dalle2.models import build_prior
from dalle2.rng import BatchRandom
from dalle2.sampling import sample_image_embed
from dalle2.train_loop import train


def parse_args():
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    cli.add_train_flags(parser, "output/prior")
    return parser.parse_args()


def main():
    args = parse_args()
    config = cli.override_train(PRESETS[args.preset].prior, args)
    cli.check_data(args)
    clip = cli.ClipSource(args.clip_model, args.clip_pretrained)
    embed_dim, text_width = clip.load().embed_dim, clip.load().text_width
    if embed_dim != text_width:
        raise UserError(f"--clip_model: the prior needs a CLIP whose text width ({text_width}) is "
                        f"its embedding size ({embed_dim})")
    torch.manual_seed(config.train.seed)
    prior = build_prior(config, embed_dim)
    if args.dry_run:
        records = load_captions(args.train_annot_path, args.train_img_path)
        return cli.print_plan("prior", config, prior, f"{len(records)} pictures")

    # ---- data: what the store holds, nothing is embedded here
    train_store, val_store = cli.open_stores(args, clip)
    header = {"config": config_to_dict(config), "embed_dim": embed_dim,
              "clip": clip.describe(args.output_dir)}
    accelerator = cli.build_accelerator(config.train.mixed_precision)

    def load_batch(store, indexes, random):
        rows = store.draw_captions(indexes, random.rand())
        return {"image_embed": torch.from_numpy(store.image_embed[indexes]).float(),
                "text_embed": torch.from_numpy(store.text_embed[rows]).float(),
                "text_encodings": store.load_text_encodings(rows, config.max_text_len)}

    def draw_batch(step, rows, random):
        indexes = draw_indexes(len(train_store), config.train.seed, step, config.train.batch_size)
        return load_batch(train_store, indexes[rows], random)

    # ---- loss: x_start, scaled to unit variance a dimension, from everything but a dropped text
    diffusion = Diffusion(config.timesteps, config.beta_schedule, predict_x_start=True,
                          device=accelerator.device)

    def compute_loss(module, batch, random):
        x_start = batch["image_embed"] * embed_dim ** 0.5
        t, noise = random.randint(config.timesteps), random.randn(embed_dim)
        drop = (random.rand() < config.text_cond_drop_prob).float()  # (B,)
        return diffusion.loss(
            lambda x_t, t: module(x_t, t, text_embed=batch["text_embed"],
                                  text_encodings=batch["text_encodings"],
                                  text_cond_drop_prob=drop),
            x_start, t, noise)

    # ---- validation: fixed captions, noise and timesteps
    def validate(module):
        random = BatchRandom("validate", batch_size=len(val_store))
        batch = load_batch(val_store, list(range(len(val_store))), random)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        fixed = BatchRandom("validate", batch_size=len(val_store), device=accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            loss = compute_loss(module, batch, fixed).mean()
            sampled = sample_image_embed(module, config, batch["text_embed"],
                                         batch["text_encodings"], range(len(val_store)))
        cosine = F.cosine_similarity(sampled.float(), batch["image_embed"]).mean()
        return {"val_loss": loss.item(), "val_cosine": cosine.item()}

    def export(state, step):
        save_export(Path(args.output_dir) / "prior.safetensors", "prior", {**header, "step": step},
                    {f"net.{name}": value for name, value in state.items()})

    train(module=prior, compute_loss=compute_loss, draw_batch=draw_batch,
          train_config=config.train, run_dir=args.output_dir, header=header,
          accelerator=accelerator, export=export, validate=val_store and validate)


if __name__ == "__main__":
    cli.run(main)
