"""What the entry scripts share: flags, one-line errors, and opening data and CLIP by flag."""

import argparse
import math
import os
import sys
from dataclasses import replace

from dalle2.config import PRESETS, UserError, config_to_dict, validate_config

DATA_DIR, STORE_DIR = "data/coco", "data/prepared"
MAX_INT = 2 ** 63 - 1  # what torch takes as a seed


class Parser(argparse.ArgumentParser):
    """Names every flag with its default in --help; a bad flag is one line and exit code 2. A flag
    of type int or float takes no nan, no infinity and nothing beyond 64 bits."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.register("type", int, at_least(-MAX_INT))
        self.register("type", float, at_least(-math.inf))

    def error(self, message):
        self.exit(2, f"error: {message.removeprefix('argument ')} (--help names every flag)\n")


def at_least(least):
    """The `type=` of a flag that takes a finite number from `least` on: whole numbers if `least` is
    one."""
    kind, name = (int, "whole number") if isinstance(least, int) else (float, "number")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {name}") from None
        if not abs(value) <= (MAX_INT if kind is int else sys.float_info.max):
            raise argparse.ArgumentTypeError(f"{text} is not finite, or too large")
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least:g}")
        return value
    return parse


def run(main):
    """Runs an entry script: a UserError becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def add_data_flags(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--train_img_path", default=f"{DATA_DIR}/train2014", help="picture folder")
    data.add_argument("--train_annot_path", help="COCO captions file",
                      default=f"{DATA_DIR}/annotations/captions_train2014.json")
    data.add_argument("--val_img_path", default=f"{DATA_DIR}/val2014", help="picture folder")
    data.add_argument("--val_annot_path", help="COCO captions file; an empty string: no validation",
                      default=f"{DATA_DIR}/annotations/captions_val2014.json")
    data.add_argument("--num_val_images", type=at_least(1), default=512,
                      help="validate on the first so many pictures")
    data.add_argument("--store_dir", default=STORE_DIR,
                      help="where pictures and embeddings are kept, prepared once")


def add_clip_flags(parser):
    clip = parser.add_argument_group("CLIP")
    clip.add_argument("--clip_model", default="ViT-L-14-quickgelu",
                      help="open_clip model name, of those with CLIP's own tokenizer "
                      "(docs/clips.md lists them)")
    clip.add_argument("--clip_pretrained", default="openai",
                      help="open_clip's tag of published weights, or a file (one that "
                      "train_clip.py wrote brings its architecture along)")


def add_train_flags(parser, output_dir, split=True):
    train = parser.add_argument_group("training (None: what the preset says)")
    train.add_argument("--output_dir", default=output_dir, help="run folder; resumes what is there")
    train.add_argument("--preset", default="base", choices=list(PRESETS),
                       help="sizes and hyper-parameters, a row of dalle2/config.py")
    train.add_argument("--num_steps", type=int, help="optimizer updates")
    train.add_argument("--batch_size", type=int, help="of all processes together")
    train.add_argument("--lr", type=float, help="peak learning rate")
    if split:
        train.add_argument("--device_batch_size", type=int,
                           help="rows that a device computes at a time (None: the preset's, 0: "
                           "all of its share); halved by itself where memory runs out")
    train.add_argument("--seed", type=int, help="of noise, crops, captions and data order")
    train.add_argument("--mixed_precision", choices=["auto", "no", "bf16", "fp16"],
                       help="auto: bf16 on a GPU that has it, fp16 on an older one, none on a CPU")
    train.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=None,
                       help="convolutions with channels innermost: try it on a GPU")
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="the network by torch.compile, after a minute or two at the start")
    if split:
        train.add_argument("--fsdp", action=argparse.BooleanOptionalAction, default=None,
                           help="share weights, average and optimizer out among the processes, for "
                           "a network that one GPU does not hold")
    train.add_argument("--save_every", type=int, help="steps between checkpoints")
    train.add_argument("--save_minutes", type=float, help="and minutes between them; 0: no such")
    train.add_argument("--validate_every", type=int, help="steps between validations")
    if split:
        train.add_argument("--snapshot_every", type=int, help="steps between snapshots of two "
                           "averages of the weights, for dalle2.choose; 0: none")
    train.add_argument("--log_with", choices=["tensorboard", "wandb", "none"],
                       default="tensorboard", help="beside metrics.jsonl and curves.png")
    train.add_argument("--dry_run", action="store_true",
                       help="check flags and data, print the plan, write nothing")


def override_train(config, args):
    """`config` (with a field `train`), validated, with the training flags that were given."""
    given = {name: value for name in ("num_steps", "batch_size", "lr", "seed", "mixed_precision",
                                      "device_batch_size", "channels_last", "compile", "fsdp",
                                      "save_every", "save_minutes", "validate_every",
                                      "snapshot_every")
             if (value := getattr(args, name, None)) is not None}
    return validate_config(replace(config, train=replace(config.train, **given)))


def check_data(args):
    """Raises UserError where the data that the flags name is not there; reads nothing large."""
    for split in ("train", "val"):
        annot, images = (getattr(args, f"{split}_{kind}_path") for kind in ("annot", "img"))
        if split == "val" and not annot:
            continue
        if not os.path.isdir(images):
            raise UserError(f"--{split}_img_path: no such folder: {images} "
                            "(python data/coco_download.py fetches COCO)")
        if not os.path.isfile(annot):
            raise UserError(f"--{split}_annot_path: no such file: {annot}")


def open_stores(args, clip_source=None, **options):
    """(train Store, val Store or None), prepared now where they are not there yet; `options` are
    those of prepare_store."""
    from dalle2.prepare import prepare_store
    if clip_source:
        options |= dict(clip=clip_source.load, fingerprint=clip_source.fingerprint)
    train = prepare_store(args.train_img_path, args.train_annot_path, args.store_dir, **options)
    val = None
    if args.val_annot_path:
        val = prepare_store(args.val_img_path, args.val_annot_path, args.store_dir, split="val",
                            max_images=args.num_val_images, **options)
    return train, val


def describe_data(store):
    """What a run is trained on, to compare on resuming: its captions file and how many pictures."""
    return {"annotations": store.source["annotations"][:16], "num_images": len(store)}


class ClipSource:
    """The CLIP that the flags name: loaded once, and how an export describes it."""

    def __init__(self, clip_model, clip_pretrained):
        from dalle2.clip import compute_fingerprint, load_clip
        self.clip_model, self.clip_pretrained = clip_model, clip_pretrained
        self._clip = load_clip(clip_model, clip_pretrained, pick_device())
        self.fingerprint = compute_fingerprint(self._clip)

    def load(self):
        return self._clip

    def describe(self, output_dir):
        """What an export records of its CLIP; a file is named relative to the run folder too."""
        is_file = os.path.isfile(self.clip_pretrained)
        relative = os.path.relpath(self.clip_pretrained, output_dir) if is_file else ""
        return {"clip_model": self.clip_model, "clip_pretrained": self.clip_pretrained,
                "relative_path": relative, "fingerprint": self.fingerprint}


def pick_device():
    import torch
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) \
        if torch.cuda.is_available() else torch.device("cpu")


def resolve_precision(mixed_precision):
    """"no", "bf16" or "fp16" for what --mixed_precision says; "auto": bf16 on a GPU that computes
    in it, fp16 on one that only emulates it (before Ampere), "no" without a GPU. UserError on fp16
    without one."""
    import torch
    if not torch.cuda.is_available():
        if mixed_precision == "fp16":
            raise UserError("--mixed_precision: fp16 needs a GPU; give no or bf16")
        return "no" if mixed_precision == "auto" else mixed_precision
    if mixed_precision == "auto":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return mixed_precision


def add_precision_flag(parser):
    parser.add_argument("--mixed_precision", choices=["auto", "no", "bf16", "fp16"], default="auto",
                        help="of the networks; auto: bf16 on a GPU that has it, fp16 on an older "
                        "one, none on a CPU")


def build_accelerator(mixed_precision):
    """accelerate.Accelerator for the devices of this launch and `resolve_precision`."""
    import torch
    from accelerate import Accelerator, DistributedType
    mixed_precision = resolve_precision(mixed_precision)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
        torch.backends.cudnn.benchmark = True  # the fastest convolution of each shape
    accelerator = Accelerator(mixed_precision=mixed_precision, step_scheduler_with_optimizer=False,
                              cpu=not torch.cuda.is_available())
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError("LAUNCH_ARGS: accelerate's FSDP and DeepSpeed are not used here; --fsdp "
                        "shares the network out among the processes of any other launch")
    return accelerator


def print_plan(title, config, module, store_sizes):
    """What a --dry_run tells: sizes, steps, data."""
    params = sum(p.numel() for p in module.parameters())
    print(f"{title}: {params / 1e6:.2f} M parameters, {config.train.num_steps} steps of "
          f"{config.train.batch_size}, {store_sizes}")
    for name, value in config_to_dict(config).items():
        print(f"  {name}: {value}")
