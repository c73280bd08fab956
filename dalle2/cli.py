"""What the entry scripts share: flags, one-line errors, and opening data and CLIP by flag."""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import sys
import typing
from pathlib import Path

from dalle2.config import (
    MAX_INT,
    PRESETS,
    SAMPLER_NAMES,
    THRESHOLDS,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    validate_config,
)
from dalle2.errors import UserError, rename_argument

DATA_DIR, STORE_DIR = "data/coco", "data/prepared"
VAL_IMG_PATH = f"{DATA_DIR}/val2014"
SIZES = "image_size", "dim", "dim_mults", "crop_size"  # in which the stages of a decoder differ


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
    """Runs an entry script: a UserError becomes one line, which names the flag, and exit code 2."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or error.is_local:
            print(f"error: {'--' if error.argument else ''}{error}", file=sys.stderr)
        sys.exit(2)
    # Gloo's threads may still hold Python objects of the last exchange: where they outlive the
    # interpreter, about 1 exit in 100 is an abort.
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def import_late():
    """For the imports of an entry script that take seconds: torch and what stands on it. They come
    after the flags, so that --help and a wrong flag are answered at once. The garbage collector
    does not look at the half million objects that they leave, now or later or at the end of
    the process: 1.7 s of 6. Numbers below 1e-38 become 0 on a CPU: the momentum of a unit that has
    fallen silent shrinks to such numbers within 2000 steps, and with them an Intel CPU computes
    40 times as slowly. The threads of torch inherit this from the one that starts them."""
    gc.disable()
    try:
        import torch
        torch.set_flush_denormal(True)
        yield
    finally:
        gc.enable()
        gc.freeze()


def add_data_flags(parser):
    data = parser.add_argument_group("data")
    pictures = "picture folder, or tars of pictures and captions"
    data.add_argument("--train_img_path", nargs="+", default=[f"{DATA_DIR}/train2014"],
                      help=f"{pictures}; several are trained on together")
    data.add_argument("--train_annot_path", nargs="+", help="COCO captions file, one for each of "
                      "--train_img_path; an empty string: the captions are with the pictures "
                      "(docs/data.md)", default=[f"{DATA_DIR}/annotations/captions_train2014.json"])
    data.add_argument("--val_img_path", nargs="+", default=[VAL_IMG_PATH], help=pictures)
    data.add_argument("--val_annot_path", nargs="+", help="COCO captions file; an empty string: "
                      "the captions are with the pictures that --val_img_path names, or no "
                      "validation", default=[f"{DATA_DIR}/annotations/captions_val2014.json"])
    data.add_argument("--num_val_images", type=at_least(1), default=512,
                      help="pictures of each --val_img_path to validate on, the first ones")
    data.add_argument("--num_views", type=at_least(1), default=1,
                      help="pictures to make of each training photo, each with an embedding of its "
                      "own: the middle, and random squares, mirrored half of the time")
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


def add_train_flags(parser, kind, output_dir):
    """The flags of a training script: where, from what, and a flag for every field of the config
    class `kind` and of its training."""
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default=output_dir,
                     help="run folder; a run that is in it is resumed")
    run.add_argument("--preset", default="base", choices=list(PRESETS),
                     help="sizes and hyper-parameters, a row of dalle2/config.py")
    run.add_argument("--config", help="start from this config.json of a run in place of the "
                     "preset's values")
    run.add_argument("--log_with", choices=["tensorboard", "wandb", "none"], default="tensorboard",
                     help="beside metrics.jsonl and curves.png")
    run.add_argument("--dry_run", action="store_true",
                     help="check flags and data, print the plan, write nothing")
    add_config_flags(parser.add_argument_group("training (None: what config or preset says)"),
                     TrainConfig)
    add_config_flags(parser.add_argument_group("network (None: what config or preset says)"), kind)


def add_config_flags(group, kind):
    """A flag for each field of the config class `kind`; None where it is not given."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if item.name == "train":
            continue
        hint, options = hints[item.name], {"help": item.metadata["help"].replace("%", "%%")}
        if typing.get_origin(hint) is tuple:
            (hint, _), options["nargs"] = typing.get_args(hint), "+"
        if hint is bool and "nargs" not in options:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = parse_bool if hint is bool else hint
            options["choices"] = item.metadata["choices"]
        group.add_argument(f"--{item.name}", default=None, **options)


def parse_bool(text):
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def add_checkpoint_flags(parser):
    """The flags that `pipeline.load_pipeline` reads."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--model", help="a folder that dalle2.tools.publish made, or a model's name "
                       "on the Hugging Face hub, in place of the files below")
    group.add_argument("--prior_ckpt", default="output/prior/prior.safetensors",
                       help="what train_prior.py exported")
    group.add_argument("--decoder_ckpt", default="output/decoder/decoder.safetensors",
                       help="what train_decoder.py exported")
    group.add_argument("--clip_model", help="None: the CLIP that the checkpoints name")
    group.add_argument("--clip_pretrained", help="None: the CLIP that the checkpoints name")
    group.add_argument("--compile", action="store_true",
                       help="the networks by torch.compile, after a minute or two at the start")


def add_caption_flags(parser):
    """The flags that `render.list_captions` and `render.list_jobs` read."""
    group = parser.add_argument_group("what to render")
    group.add_argument("--test_annot_path", help="COCO captions file whose captions are rendered; "
                       "an empty string: the captions are with the pictures")
    group.add_argument("--test_img_path", help="its pictures, for the gallery; needed by "
                       "--init_from_true_embedding")
    group.add_argument("--prompt", action="append", help="render this; may be repeated")
    group.add_argument("--prompt_file", help="text file, a prompt a line")
    group.add_argument("--num_images", type=at_least(1), default=50,
                       help="how many pictures of the COCO file, the first ones, one caption each")
    group.add_argument("--samples_per_prompt", type=at_least(1), default=1)
    group.add_argument("--rerank", action="store_true",
                       help="keep the one of --samples_per_prompt with the best CLIP score")
    group.add_argument("--init_from_true_embedding", action="store_true",
                       help="feed the decoder the true photo's embedding, to see it without prior")


def add_sample_flags(parser):
    """The flags that `render.read_options` reads, and more of how pictures are rendered."""
    group = parser.add_argument_group("how (None: what the checkpoints' configs say)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--cond_scale", type=at_least(0.0),
                       help="guidance of the decoder, 1 is none")
    group.add_argument("--prior_cond_scale", type=at_least(0.0),
                       help="guidance of the prior, 1 is none")
    group.add_argument("--sample_timesteps", type=at_least(1), nargs="+",
                       help="sampling steps: one number, or the prior's and each stage's")
    group.add_argument("--num_candidates", type=at_least(1), help="image embeddings that the "
                       "prior samples a caption, of which the nearest to it is kept")
    group.add_argument("--lowres_noise_level", type=at_least(0), help="noise on the picture that "
                       "an upsampler enlarges, of 1000: the more, the more it invents")
    group.add_argument("--sampler", choices=SAMPLER_NAMES, default=SAMPLER_NAMES[0])
    add_precision_flag(group)
    group.add_argument("--thresholding", choices=THRESHOLDS, default=THRESHOLDS[0],
                       help="of the decoder's estimates: clamped, or scaled a picture (Saharia "
                       "2022)")
    group.add_argument("--batch_size", type=at_least(1),
                       help="pictures at a time (None: 16 on a CPU, what fits on a GPU)")


def add_precision_flag(parser):
    parser.add_argument("--mixed_precision", choices=["auto", "no", "bf16", "fp16"], default="auto",
                        help="of the networks; auto: bf16 on a GPU that has it, fp16 on an older "
                        "one, none on a CPU")


def build_config(args, preset):
    """(config, origins): `preset`, a config with a field `train`, overridden by the file that
    --config names, overridden by flags; validated. origins {field: "preset", "file" or "flag"}."""
    kind, values, origins = type(preset), config_to_dict(preset), {}
    if args.config:
        file = read_config(args.config, kind)
        origins |= {name: "file" for part in (file, file["train"], values, values["train"])
                    for name in part}
        values = file
    for part in (values, values["train"]):
        for name in part.keys() - {"train"}:
            if getattr(args, name, None) is not None:
                part[name], origins[name] = getattr(args, name), "flag"
    return validate_config(config_from_dict(kind, values)), origins


def build_unet_configs(args, unets):
    """(tuple of UnetConfig, origins) of the decoder's stages: flags and --config for the stage that
    --unet_number names, flags of the training alone for all."""
    number = args.unet_number
    if number > len(unets):
        raise UserError(f"{number} is not one of 0 to {len(unets)}", "unet_number")
    if number:
        config, origins = build_config(args, unets[number - 1])
        return (*unets[:number - 1], config, *unets[number:]), origins
    for name in ("config", *SIZES):
        if getattr(args, name) is not None:
            raise UserError("each stage has its own; name one by --unet_number", name)
    built = [build_config(args, unet) for unet in unets]
    return tuple(config for config, _ in built), built[0][1]


def read_config(path, kind):
    """The config of class `kind` in a run's config.json, as a dict with every field."""
    if not os.path.isfile(path):
        raise UserError(f"no such file: {path}", "config")
    try:
        values = json.loads(Path(path).read_text())["config"]
        return config_to_dict(config_from_dict(kind, values))
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is no config.json of such a network: {error}", "config") from None


def print_plan(title, config, origins, module, pictures):
    """What a --dry_run says: sizes, steps, data, and where each value comes from."""
    params = sum(p.numel() for p in module.parameters())
    print(f"{title}: {params / 1e6:.2f} M parameters, {config.train.num_steps} steps of "
          f"{config.train.batch_size}, {pictures} pictures")
    values = config_to_dict(config)
    for name, value in {**values, **values.pop("train")}.items():
        if name != "train":
            print(f"  {name}: {value} ({origins.get(name, 'preset')})")


def list_splits(args):
    """[(split, captions file or "", picture folder)] of what the flags name: train, and val unless
    it is switched off. A split of several folders is there several times."""
    splits = []
    for split in ("train", "val"):
        annots, images = (getattr(args, f"{split}_{name}_path") for name in ("annot", "img"))
        if split == "val" and not any(annots) and images in ([""], [VAL_IMG_PATH]):
            continue
        annots = annots * len(images) if annots == [""] else annots
        if len(annots) != len(images):
            raise UserError(f"{len(annots)} captions files for {len(images)} picture folders; give "
                            "one for each, an empty string where the captions are with the "
                            "pictures", f"{split}_annot_path")
        splits += [(split, annot, image) for annot, image in zip(annots, images)]
    return splits


def check_data(args):
    """Raises UserError where the data that the flags name does not exist; reads nothing large."""
    from dalle2.captions import check_paths
    for split, annot, images in list_splits(args):
        with rename_argument(annot_path=f"{split}_annot_path", img_path=f"{split}_img_path"):
            check_paths(annot, images)


def count_pictures(args):
    """Captioned pictures to train on."""
    from dalle2.captions import load_captions
    with rename_argument(annot_path="train_annot_path", img_path="train_img_path"):
        return sum(len(load_captions(annot, images))
                   for split, annot, images in list_splits(args) if split == "train")


def open_stores(args, clip=None, **options):
    """(train Store, val Store or None), prepared now if they do not exist; `options` are those of
    prepare_store."""
    from dalle2.data import Store
    from dalle2.prepare import prepare_store
    found = {"train": [], "val": []}
    own = {"train": {"num_views": args.num_views}, "val": {"max_images": args.num_val_images}}
    for split, annot, images in list_splits(args):
        with rename_argument(annot_path=f"{split}_annot_path", img_path=f"{split}_img_path"):
            found[split].append(prepare_store(images, annot, args.store_dir, clip=clip,
                                              **own[split], **options))
    return [Store([folder for store in stores for folder in store.folders], stores[0].embed_name)
            if stores else None for stores in found.values()]


def load_clip(args):
    """The FrozenClip that the flags name, on this process's device."""
    from dalle2.clip import load_clip
    return load_clip(args.clip_model, args.clip_pretrained, pick_device())


def describe_clip(args, clip, output_dir=None):
    """What an export records of its CLIP; a file is named relative to the run folder too."""
    is_file = os.path.isfile(args.clip_pretrained)
    relative = os.path.relpath(args.clip_pretrained, output_dir or args.output_dir)
    return {"embed_dim": clip.embed_dim, "clip": {
        "clip_model": args.clip_model, "clip_pretrained": args.clip_pretrained,
        "relative_path": relative if is_file else "", "fingerprint": clip.fingerprint}}


def pick_device():
    """This process's GPU: of CUDA, or Apple's (mps); without one the CPU, which the environment
    variable ACCELERATE_USE_CPU=true chooses in any case."""
    import torch
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(mixed_precision, training=False):
    """"no", "bf16" or "fp16" for what --mixed_precision says; "auto": bf16 on a CUDA GPU that
    computes in it, fp16 on one that only emulates it (before Ampere); for `training` bf16 on a CPU
    that computes in it (AVX-512 BF16), while rendering there stays in fp32; "no" elsewhere.
    UserError on fp16 without a CUDA GPU."""
    import torch
    device = pick_device().type
    if mixed_precision == "fp16" and device != "cuda":
        raise UserError("fp16 needs a CUDA GPU; give no or bf16", "mixed_precision")
    if mixed_precision != "auto":
        return mixed_precision
    if device == "cpu":
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # older torch: False
        return "bf16" if training and has_bf16() else "no"
    if device != "cuda":
        return "no"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def build_accelerator(mixed_precision):
    """accelerate.Accelerator for the devices of this launch and `resolve_precision`."""
    import torch
    from accelerate import Accelerator, DistributedType
    device, mixed_precision = pick_device(), resolve_precision(mixed_precision, training=True)
    if device.type == "mps":
        print("note: on Apple's GPU (mps) in fp32, which this project has not been tested on; "
              "ACCELERATE_USE_CPU=true takes the CPU", flush=True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
        torch.backends.cudnn.benchmark = True  # the fastest convolution of each shape
    accelerator = Accelerator(mixed_precision=mixed_precision, step_scheduler_with_optimizer=False,
                              cpu=device.type == "cpu")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError("LAUNCH_ARGS: accelerate's FSDP and DeepSpeed plugins are not supported; "
                        "--fsdp shards the network among the processes of any other launch")
    return accelerator
