"""Trains a small CLIP, if none can be downloaded that fits the data. Radford et al. 2021."""

from dalle2 import cli
from dalle2.config import PRESETS, ClipConfig
from dalle2.errors import UserError


def parse_args():
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    parser.add_argument("--vision_weights", help="safetensors file of the weights that the tower "
                        "of --vision_timm begins with (None: timm downloads them)")
    cli.add_train_flags(parser, ClipConfig, "output/clip")
    return parser.parse_args()


def main():
    args = parse_args()
    config, origins = cli.build_config(args, PRESETS[args.preset].clip)
    if config.train.device_batch_size:
        raise UserError("the loss of a CLIP compares all pairs of a batch, which is not computed "
                        "in parts; choose a smaller --batch_size, or more devices",
                        "device_batch_size")
    if args.vision_weights and not config.vision_timm:
        raise UserError("goes with --vision_timm, the name of their network", "vision_weights")
    cli.check_data(args)
    with cli.import_late():
        import torch

        from dalle2.clip import build_clip, load_vision_weights
        from dalle2.tasks import ClipTask
        from dalle2.train_loop import train

    # ---- network
    torch.manual_seed(config.train.seed)
    model = build_clip(config)
    if args.dry_run:
        return cli.print_plan("clip", config, origins, model, cli.count_pictures(args))
    if config.vision_timm:
        load_vision_weights(model, config, args.vision_weights)
    accelerator = cli.build_accelerator(config.train.mixed_precision)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # statistics of the global batch
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)

    # ---- data and training
    train_store, val_store = cli.open_stores(args)
    task = ClipTask(config, accelerator, train_store, val_store, args.output_dir)
    train(task=task, module=model, run_dir=args.output_dir, accelerator=accelerator,
          log_with=args.log_with)


if __name__ == "__main__":
    cli.run(main)
