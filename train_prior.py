"""Trains the diffusion prior: caption -> CLIP image embedding. Ramesh et al. 2022, sec. 2.2."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dalle2 import cli
from dalle2.checkpoint import save_export
from dalle2.config import PRESETS, config_to_dict
from dalle2.data import draw_indexes, load_captions
from dalle2.diffusion import Diffusion
from dalle2.files import replace_file
from dalle2.losses import compute_prior_loss
from dalle2.metrics import compute_prior_scores
from dalle2.models import build_prior, list_blocks, load_prior
from dalle2.rng import BatchRandom
from dalle2.sampling import sample_image_embed
from dalle2.train_loop import train
from dalle2.validation import compute_fixed_timesteps, map_rows, summarize_by_quartile


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
    embed_dim = clip.load().embed_dim
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
    del clip  # its work is done, and its memory free

    def load_batch(store, indexes, random):
        rows = store.draw_captions(indexes, random.rand())
        return {"image_embed": torch.from_numpy(store.image_embed[indexes]),
                "text_embed": torch.from_numpy(store.text_embed[rows]),
                "text_encodings": store.load_text_encodings(rows, config.max_text_len)}

    def draw_batch(step, rows, random):
        indexes = draw_indexes(len(train_store), config.train.seed, step, config.train.batch_size)
        return load_batch(train_store, indexes[rows], random)

    # ---- loss
    diffusion = Diffusion(config.timesteps, config.beta_schedule, predict_x_start=True,
                          device=accelerator.device)

    def compute_loss(module, batch, random):
        return compute_prior_loss(module, batch, random, config, diffusion)

    # ---- validation: fixed captions, noise and timesteps
    num_val = len(val_store) if val_store else 0
    fixed_t = compute_fixed_timesteps(num_val, config.timesteps) if num_val else None

    def load_val_batch(rows):
        indexes = range(num_val)[rows]
        batch = load_batch(val_store, list(indexes), BatchRandom("validate", rows.start,
                                                                 batch_size=len(indexes)))
        batch["t"] = fixed_t[rows]
        return {name: value.to(accelerator.device, torch.long if name == "t" else torch.float32)
                for name, value in batch.items()}

    @torch.no_grad()
    def compute_val_losses(module, rows):
        batch = load_val_batch(rows)
        fixed = BatchRandom("validate", rows.start, batch_size=len(batch["t"]),
                            device=accelerator.device)
        with accelerator.autocast():
            return compute_loss(module, batch, fixed)

    @torch.no_grad()
    def sample(module, rows):
        batch = load_val_batch(rows)
        with accelerator.autocast():
            return sample_image_embed(module, config, batch["text_embed"], batch["text_encodings"],
                                      range(num_val)[rows]).float()

    def load_val_embeds():
        return {name: map_rows(lambda rows: load_val_batch(rows)[name], num_val)
                for name in ("image_embed", "text_embed")}

    def validate(module, brief):
        losses = map_rows(lambda rows: compute_val_losses(module, rows), num_val, accelerator)
        row = summarize_by_quartile(losses, fixed_t, config.timesteps)
        if brief:
            return row
        predicted = map_rows(lambda rows: sample(module, rows), num_val, accelerator)
        return row | compute_prior_scores(predicted, **load_val_embeds())

    def export(state, step, last):
        save_export(Path(args.output_dir) / f"prior{'_last' if last else ''}.safetensors", "prior",
                    {**header, "step": step}, {f"net.{n}": value for n, value in state.items()})

    train(module=prior, compute_loss=compute_loss, draw_batch=draw_batch,
          train_config=config.train, run_dir=args.output_dir,
          header={**header, "data": cli.describe_data(train_store)},
          accelerator=accelerator, export=export, validate=val_store and validate,
          list_blocks=list_blocks, log_with=args.log_with)
    if val_store and accelerator.is_main_process:
        module = load_prior(Path(args.output_dir) / "prior.safetensors", "--output_dir")[0]
        module.to(accelerator.device)
        write_report_card(Path(args.output_dir) / "report_card.md", train_store,
                          map_rows(lambda rows: sample(module, rows), num_val),
                          **load_val_embeds())


def write_report_card(path, train_store, predicted, image_embed, text_embed):
    """A table of the prior beside what needs no prior: over the validation pictures, cosine to the
    true image embedding, to the own caption and to another one, and retrieval."""
    some = torch.from_numpy(np.array(train_store.image_embed[:20_000])).float()
    mean = F.normalize(some.mean(0), dim=0)
    candidates = {
        "the prior": predicted, "the text embedding itself": text_embed,
        "the mean image embedding": mean.to(image_embed).expand_as(image_embed),
        "the image of the nearest training caption":
            train_store.find_image_of_nearest_caption(text_embed),
        "the true image embedding": image_embed}
    scores = {name: compute_prior_scores(candidate, image_embed, text_embed)
              for name, candidate in candidates.items()}
    columns = list(scores["the prior"])
    lines = [f"| {len(image_embed)} validation pictures | " + " | ".join(columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |"
              for name, row in scores.items()]
    replace_file(path, lambda part: part.write_text("\n".join(lines) + "\n"))
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
