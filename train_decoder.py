"""Trains the cascaded decoder: CLIP image embedding -> 64 px -> 256 px. Ramesh et al. 2022, 2.1."""

from pathlib import Path

from dalle2 import cli
from dalle2.config import PRESETS, DecoderConfig, UnetConfig


def parse_args():
    parser = cli.Parser(__doc__)
    parser.add_argument("--unet_number", type=cli.at_least(0), default=0,
                        help="train only this stage, 1 is the first; 0: all, one after another")
    parser.add_argument("--prior_ckpt", help="export of train_prior.py; the sample pictures then "
                        "also show what the decoder draws from its embeddings")
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    cli.add_train_flags(parser, UnetConfig, "output/decoder")
    return parser.parse_args()


def main():
    args = parse_args()
    unets, origins = cli.build_unet_configs(args, PRESETS[args.preset].decoder.unets)
    numbers = [args.unet_number] if args.unet_number else range(1, len(unets) + 1)
    cli.check_data(args)
    with cli.import_late():
        import torch

        from dalle2.models import build_unet, list_blocks
        from dalle2.tasks import UnetTask, collect_sample_embeds
        from dalle2.train_loop import train

    clip = cli.load_clip(args)
    if args.dry_run:
        for number in numbers:
            cli.print_plan(f"unet {number}", unets[number - 1], origins,
                           build_unet(unets[number - 1], number, clip.embed_dim),
                           cli.count_pictures(args))
        return

    # ---- data: pictures, embedded once
    accelerator = cli.build_accelerator(unets[numbers[0] - 1].train.mixed_precision)
    train_store, val_store = cli.open_stores(args, clip)
    header = cli.describe_clip(args, clip)
    sample_embeds = collect_sample_embeds(val_store, args.prior_ckpt, header["clip"],
                                          accelerator.device)
    del clip  # frees its memory

    # ---- training, one stage after another
    for number in numbers:
        torch.manual_seed(unets[number - 1].train.seed)
        unet = build_unet(unets[number - 1], number, header["embed_dim"])
        task = UnetTask(number, DecoderConfig(unets=unets), accelerator, train_store, val_store,
                        args.output_dir, header=header, sample_embeds=sample_embeds)
        train(task=task, module=unet, run_dir=Path(args.output_dir) / f"unet{number}",
              accelerator=accelerator, list_blocks=list_blocks, log_with=args.log_with)


if __name__ == "__main__":
    cli.run(main)
