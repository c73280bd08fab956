"""Trains a small CLIP from zero, for work without downloaded weights. Radford et al. 2021."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dalle2 import cli
from dalle2.checkpoint import save_export
from dalle2.clip import ClipLoss, FrozenClip, build_clip, build_tokenizer, preprocess_image
from dalle2.config import PRESETS, config_to_dict
from dalle2.data import draw_indexes, load_captions
from dalle2.metrics import compute_recall
from dalle2.rng import BatchRandom
from dalle2.train_loop import train
from dalle2.validation import map_rows


def parse_args():
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_train_flags(parser, "output/clip", split=False)
    return parser.parse_args()


def main():
    args = parse_args()
    config = cli.override_train(PRESETS[args.preset].clip, args)
    cli.check_data(args)
    torch.manual_seed(config.train.seed)
    model, tokenizer = build_clip(config), build_tokenizer(config.context_length)
    if args.dry_run:
        records = load_captions(args.train_annot_path, args.train_img_path)
        return cli.print_plan("clip", config, model, f"{len(records)} pictures")

    # ---- data
    train_store, val_store = cli.open_stores(args)
    accelerator = cli.build_accelerator(config.train.mixed_precision)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # statistics of the global batch
    pictures = {store: store.load_small_images(config.image_size)
                for store in (train_store, val_store) if store}
    text_tokens = {store: tokenizer([c for group in store.captions for c in group])
                   for store in pictures}

    def load_batch(store, indexes, random):
        return {"image": torch.from_numpy(pictures[store][indexes]),
                "text_tokens": text_tokens[store][store.draw_captions(indexes, random.rand())]}

    def draw_batch(step, rows, random):
        indexes = draw_indexes(len(train_store), config.train.seed, step, config.train.batch_size)
        return load_batch(train_store, indexes[rows], random)

    # ---- loss
    clip_loss = ClipLoss(accelerator.process_index, accelerator.num_processes)

    def compute_loss(module, batch, random):
        return clip_loss(*module(preprocess_image(batch["image"], config.image_size),
                                 batch["text_tokens"]))

    # ---- validation: retrieval between val pictures and one caption of each
    def validate(module, brief):
        frozen = FrozenClip(module, tokenizer)
        batch = load_batch(val_store, np.arange(len(val_store)),
                           BatchRandom("validate", batch_size=len(val_store)))
        image_embed = map_rows(lambda rows: frozen.embed_image(batch["image"][rows]),
                               len(val_store), accelerator)
        text_embed = map_rows(lambda rows: frozen.embed_text(batch["text_tokens"][rows])[0],
                              len(val_store), accelerator)
        alone = ClipLoss(rank=0, world_size=1)  # every process has all the pairs
        loss = alone(image_embed, text_embed, module.logit_scale.exp().cpu()).item()
        if brief:
            return {"val_loss": loss}
        matching = F.cosine_similarity(image_embed, text_embed).mean().item()
        return {"val_loss": loss, "val_cosine": matching,
                **compute_recall(text_embed, image_embed, (1, 5, 10))}

    def export(state, step, last):
        save_export(Path(args.output_dir) / f"clip{'_last' if last else ''}.safetensors", "clip",
                    {"config": config_to_dict(config), "step": step}, state)

    train(module=model, compute_loss=compute_loss, draw_batch=draw_batch,
          train_config=config.train, run_dir=args.output_dir,
          header={"config": config_to_dict(config), "data": cli.describe_data(train_store)},
          accelerator=accelerator, export=export, validate=val_store and validate,
          can_split=False, log_with=args.log_with)  # each pair is set against the whole batch


if __name__ == "__main__":
    cli.run(main)
