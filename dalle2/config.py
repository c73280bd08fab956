"""The recipe: every size and hyper-parameter as a dataclass field, and the presets as one table.

A config is what an entry script trains from, what a run folder records in `config.json`, and what
an exported checkpoint carries in its header. Sources are named beside the numbers.
"""

import dataclasses
import typing
from dataclasses import dataclass, replace


class UserError(Exception):
    """Bad input. One line that names the flag, file or record; the exit code is 2."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one network is optimized: AdamW or Muon with decay on matrices only, EMA, clipping."""

    num_steps: int                   # optimizer updates
    batch_size: int                  # global batch: all processes and accumulation steps together
    lr: float                        # peak learning rate
    muon_lr: float = 0.0             # of matrices and kernels by Muon (dalle2.optimizer); 0: AdamW
    lr_schedule: str = "cosine"      # after the warm-up: "cosine" to zero, or "constant"
    warmup_steps: int = 1000         # steps of linear warm-up
    weight_decay: float = 0.0        # on parameters with two or more dimensions
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0       # gradients are clipped to this global norm
    ema_decay: float = 0.9999        # of the exported weights; warmed up over the first steps
    device_batch_size: int = 0       # rows that a device computes at a time, 0: all of its share;
                                     # halved where memory runs out, which changes no result
    seed: int = 0                    # noise, timesteps, crops, captions and order follow from it
    mixed_precision: str = "auto"    # "no", "bf16", "fp16"; "auto": bf16 where CUDA has it
    channels_last: bool = False      # convolution weights and feature maps with channels innermost
    compile: bool = False            # the network by torch.compile; on a CPU it does not pay
    fsdp: bool = False               # weights and optimizer shared out among the processes (FSDP2)
    save_every: int = 2500           # steps between checkpoints and exports
    save_minutes: float = 0.0        # and minutes between them; 0: steps alone
    validate_every: int = 2500       # steps between validations
    snapshot_every: int = 0          # steps between snapshots of two long averages of the weights,
                                     # to choose from afterwards (dalle2.choose); 0: none


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A small CLIP of one's own (open_clip's model class, ResNet image tower)."""

    embed_dim: int                   # D; also the width of the text tower, as the prior needs it
    image_size: int                  # input side, pixels
    vision_width: int
    vision_layers: tuple[int, ...]   # blocks in each of the four ResNet stages
    text_layers: int
    text_heads: int
    context_length: int              # L, start and end token included
    logit_scale: float = 0.0         # fixed inverse temperature; 0: learned from 1 / 0.07
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Caption -> CLIP image embedding. Width is that of the CLIP. Ramesh et al. 2022, sec. 2.2."""

    depth: int
    heads: int
    dim_head: int = 64
    max_text_len: int                # text positions (99.9 % of COCO's captions have at most 31
                                     # tokens); longer ones are cut, end token kept
    normformer: bool = False         # a norm more in each layer, as the public LAION prior has it
    discrete_time: bool = False      # one learned vector a timestep, likewise
    timesteps: int = 1000
    beta_schedule: str = "cosine"
    text_cond_drop_prob: float = 0.1
    sample_timesteps: int = 16
    num_candidates: int = 2          # embeddings sampled a caption; the nearest to it is kept
    cond_scale: float = 1.0          # guidance when sampling; 1 is none
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class UnetConfig:
    """One stage of the decoder; the first is conditioned on the image embedding, the following
    ones on the picture of the stage before. Ramesh et al. 2022, sec. 2.1; Ho et al. 2021."""

    image_size: int                  # side of its output, pixels
    dim: int
    dim_mults: tuple[int, ...]
    num_resnet_blocks: int = 2
    self_attn: tuple[bool, ...] = ()  # per resolution; () is none (the middle always attends)
    attn_heads: int = 8
    attn_dim_head: int = 64
    memory_efficient: bool = True    # down-sample before, not after, the blocks of a resolution
    cond_dim: int = 0                # of each image token; 0: dim
    num_image_tokens: int = 4        # that the image embedding is unfolded into (first stage)
    init_conv_kernel_size: int = 0   # 0: the library's cross-embedding of kernels 3, 7 and 15
    predict_x_start: bool = False    # both False: the network predicts the noise
    predict_v: bool = True           # Salimans and Ho 2022, appendix D
    timesteps: int = 1000
    beta_schedule: str = "cosine"
    min_snr_gamma: float = 5.0       # loss weight, Hang et al. 2023; 0 is none
    image_cond_drop_prob: float = 0.1   # first stage
    gradient_checkpointing: bool = False   # computes blocks again in the backward pass: a fraction
                                     # of the memory for about a third more time
    crop_size: int = 0               # later stages: side of the training crops; 0 is the whole
    lowres_noise_max_level: int = 400   # later stages: conditioning noise, of 1000, in training
    lowres_noise_level: int = 100       # and when sampling (Saharia et al. 2022, sec. 2.4)
    sample_timesteps: int = 25
    cond_scale: float = 1.0          # guidance when sampling (first stage); 1 is none
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    unets: tuple[UnetConfig, ...]


@dataclass(frozen=True, kw_only=True)
class Preset:
    clip: ClipConfig                 # what train_clip.py builds; the others take any CLIP
    prior: PriorConfig
    decoder: DecoderConfig


# ----------------------------------------------------------------------------------------------
# presets

_BASE_CLIP = ClipConfig(
    embed_dim=512, image_size=128, vision_width=64, vision_layers=(2, 2, 2, 2), text_layers=6,
    text_heads=8, context_length=64,
    train=TrainConfig(num_steps=40_000, batch_size=1024, lr=5e-4, warmup_steps=2000,
                      weight_decay=0.1, adam_beta2=0.98, ema_decay=0.999))

_TOY_CLIP = ClipConfig(
    embed_dim=128, image_size=48, vision_width=16, vision_layers=(1, 1, 1, 1), text_layers=2,
    text_heads=4, context_length=26, logit_scale=10.0,
    train=TrainConfig(num_steps=130, batch_size=256, lr=3e-3, muon_lr=0.02, warmup_steps=30,
                      weight_decay=0.05, adam_beta2=0.98, ema_decay=0.97, save_every=65,
                      validate_every=65))

_TOY_TRAIN = TrainConfig(num_steps=1000, batch_size=64, lr=1e-3, muon_lr=0.02, warmup_steps=50,
                         weight_decay=0.01, adam_beta2=0.99, ema_decay=0.99, save_every=500,
                         validate_every=500)

PRESETS = {
    # two CPU cores, minutes: 32 -> 256 px on the embedded data set
    "toy": Preset(
        clip=_TOY_CLIP,
        prior=PriorConfig(depth=4, heads=4, dim_head=32, max_text_len=26,
                          train=replace(_TOY_TRAIN, num_steps=190, batch_size=128)),
        decoder=DecoderConfig(unets=(
            UnetConfig(image_size=32, dim=16, dim_mults=(2, 4, 8, 8), num_resnet_blocks=0,
                       attn_heads=4, attn_dim_head=32, init_conv_kernel_size=3,
                       cond_dim=64, num_image_tokens=8,
                       predict_v=False, predict_x_start=True, beta_schedule="linear",
                       min_snr_gamma=0.0, sample_timesteps=5, cond_scale=1.5,
                       train=replace(_TOY_TRAIN, num_steps=1200, batch_size=32, lr=2e-3,
                                     muon_lr=0.015)),
            UnetConfig(image_size=256, dim=16, dim_mults=(1, 2, 4), num_resnet_blocks=0,
                       attn_heads=4, attn_dim_head=32, init_conv_kernel_size=3,
                       predict_v=False, predict_x_start=True, min_snr_gamma=0.0,
                       crop_size=64, lowres_noise_max_level=300, lowres_noise_level=50,
                       sample_timesteps=2,
                       train=replace(_TOY_TRAIN, num_steps=200, batch_size=16, lr=2e-3))))),
    # one GPU of 12 GB
    "small": Preset(
        clip=_BASE_CLIP,
        prior=PriorConfig(depth=6, heads=12, max_text_len=32,
                          train=TrainConfig(num_steps=100_000, batch_size=256, lr=1.1e-4,
                                            weight_decay=6e-2, adam_beta2=0.96, adam_eps=1e-6,
                                            snapshot_every=10_000)),
        decoder=DecoderConfig(unets=(
            UnetConfig(image_size=64, dim=96, dim_mults=(1, 2, 3, 4),
                       self_attn=(False, True, True, True), cond_scale=2.0,
                       train=TrainConfig(num_steps=200_000, batch_size=128, lr=1.2e-4,
                                         snapshot_every=20_000)),
            UnetConfig(image_size=256, dim=32, dim_mults=(1, 2, 4, 8), crop_size=64,
                       train=TrainConfig(num_steps=100_000, batch_size=128, lr=1.2e-4,
                                         snapshot_every=10_000))))),
    # one GPU of 80 GB, or several smaller; lr, decay, EMA: Ramesh et al. 2022, table 3
    "base": Preset(
        clip=_BASE_CLIP,
        prior=PriorConfig(depth=12, heads=12, max_text_len=32,
                          train=TrainConfig(num_steps=150_000, batch_size=1024, lr=1.1e-4,
                                            weight_decay=6e-2, adam_beta2=0.96, adam_eps=1e-6,
                                            snapshot_every=15_000)),
        decoder=DecoderConfig(unets=(
            UnetConfig(image_size=64, dim=128, dim_mults=(1, 2, 3, 4),
                       self_attn=(False, True, True, True), cond_scale=2.0,
                       train=TrainConfig(num_steps=300_000, batch_size=512, lr=1.2e-4,
                                         snapshot_every=30_000)),
            UnetConfig(image_size=256, dim=64, dim_mults=(1, 2, 4, 8), crop_size=64,
                       train=TrainConfig(num_steps=150_000, batch_size=512, lr=1.2e-4,
                                         snapshot_every=15_000))))),
    # the sizes of the older repositories, to compare with them
    "seed": Preset(
        clip=_BASE_CLIP,
        prior=PriorConfig(depth=12, heads=12, max_text_len=77,
                          train=TrainConfig(num_steps=150_000, batch_size=256, lr=1.1e-4,
                                            weight_decay=6e-2)),
        decoder=DecoderConfig(unets=(
            UnetConfig(image_size=128, dim=128, dim_mults=(1, 2, 4, 8), memory_efficient=False,
                       cond_scale=2.0,
                       train=TrainConfig(num_steps=300_000, batch_size=64, lr=1.2e-4)),
            UnetConfig(image_size=256, dim=16, dim_mults=(1, 2, 4, 8, 16), memory_efficient=False,
                       train=TrainConfig(num_steps=150_000, batch_size=64, lr=1.2e-4))))),
}


# ----------------------------------------------------------------------------------------------
# validation and JSON

_CHOICES = {"lr_schedule": ("cosine", "constant"), "beta_schedule": ("cosine", "linear"),
            "mixed_precision": ("auto", "no", "bf16", "fp16")}
_MAY_BE_ZERO = {"muon_lr", "device_batch_size", "snapshot_every", "save_minutes", "weight_decay",
                "warmup_steps", "seed", "logit_scale",
                "init_conv_kernel_size", "min_snr_gamma", "num_resnet_blocks", "cond_dim",
                "crop_size", "lowres_noise_max_level", "lowres_noise_level",
                "text_cond_drop_prob", "image_cond_drop_prob"}
_MOST = {"depth": 1000, "text_layers": 1000, "vision_layers": 1000, "num_resnet_blocks": 100,
         "timesteps": 10 ** 6}
_MOST_OF_ANY = 2 ** 63 - 1  # what a tensor's size or a seed can be


def validate_config(config):
    """Raises UserError naming the first field of `config` whose value makes no sense."""
    if getattr(config, "fsdp", False) and (config.compile or config.mixed_precision == "fp16"):
        raise UserError("--fsdp: goes with neither --compile nor --mixed_precision fp16")
    for item in dataclasses.fields(config):
        name, value = item.name, getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            validate_config(value)
        elif isinstance(value, tuple):
            for part in value:
                if dataclasses.is_dataclass(part):
                    validate_config(part)
                else:
                    _validate_number(name, part)
        elif name in _CHOICES and value not in _CHOICES[name]:
            raise UserError(f"--{name}: {value!r} is not one of {', '.join(_CHOICES[name])}")
        else:
            _validate_number(name, value)
    return config


def _validate_number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    most = _MOST.get(name, _MOST_OF_ANY)
    if not (value > 0 or (value == 0 and name in _MAY_BE_ZERO)):  # nan is neither
        raise UserError(f"--{name}: {value!r:.20} must be positive")
    if value > most:
        raise UserError(f"--{name}: {value!r:.20} must be at most {most}")
    if name.endswith(("_prob", "_decay", "beta2")) and value >= 1:
        raise UserError(f"--{name}: {value} must be below 1")


def config_to_dict(config):
    return dataclasses.asdict(config)


def config_from_dict(kind, values):
    """The dataclass `kind` from what `config_to_dict` made, possibly by way of JSON.

    Raises UserError on an unknown or a missing field and on a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{kind.__name__}: {values!r:.40} is no object with fields")
    known = typing.get_type_hints(kind)
    unknown = set(values) - set(known)
    missing = {item.name for item in dataclasses.fields(kind)
               if item.default is dataclasses.MISSING} - set(values)
    if unknown or missing:
        raise UserError(f"{kind.__name__}: unknown fields {sorted(unknown)}, "
                        f"missing fields {sorted(missing)}")
    return kind(**{name: _from_json(name, known[name], value) for name, value in values.items()})


def _from_json(name, hint, value):
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_json(name, typing.get_args(hint)[0], part) for part in value)
    kinds = typing.get_args(hint) or (hint,)  # those of `int | None` are two
    if type(value) in kinds or (float in kinds and type(value) is int):
        return value
    raise UserError(f"--{name}: {value!r:.40} is no {getattr(hint, '__name__', hint)}")
