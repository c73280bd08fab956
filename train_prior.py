"""Trains the diffusion prior: caption -> CLIP image embedding. Ramesh et al. 2022, sec. 2.2."""

from pathlib import Path

from dalle2 import cli
from dalle2.config import PRESETS, PriorConfig


def parse_args():
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    cli.add_train_flags(parser, PriorConfig, "output/prior")
    return parser.parse_args()


def main():
    args = parse_args()
    config, origins = cli.build_config(args, PRESETS[args.preset].prior)
    cli.check_data(args)
    with cli.import_late():
        import torch

        from dalle2.models import build_prior, list_blocks, load_prior
        from dalle2.tasks import PriorTask
        from dalle2.train_loop import train

    # ---- network
    clip = cli.load_clip(args)
    torch.manual_seed(config.train.seed)
    prior = build_prior(config, clip.embed_dim)
    if args.dry_run:
        return cli.print_plan("prior", config, origins, prior, cli.count_pictures(args))

    # ---- data: pictures and captions, embedded once
    accelerator = cli.build_accelerator(config.train.mixed_precision)
    train_store, val_store = cli.open_stores(args, clip)
    task = PriorTask(config, accelerator, train_store, val_store, args.output_dir,
                     header=cli.describe_clip(args, clip))
    del clip  # frees its memory

    # ---- training
    trained = train(task=task, module=prior, run_dir=args.output_dir, accelerator=accelerator,
                    list_blocks=list_blocks, log_with=args.log_with)
    has_card = (Path(args.output_dir) / "report_card.md").exists()
    if val_store and accelerator.is_main_process and (trained or not has_card):
        best = load_prior(Path(args.output_dir) / "prior.safetensors")[0]
        task.write_report_card(best.to(accelerator.device))


if __name__ == "__main__":
    cli.run(main)
