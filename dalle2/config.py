"""The recipe: every size and hyper-parameter as a dataclass field, and the presets as one table.

A config is what an entry script trains from, what a run folder records in `config.json`, and what
an exported checkpoint carries in its header. A field knows its help text and its bounds: the flags
of the entry scripts are made from the fields. Sources are named beside the numbers.
"""

import dataclasses
import typing
from dataclasses import MISSING, dataclass, field, replace

from dalle2.errors import UserError

MAX_INT = 2 ** 63 - 1  # what a tensor's size or a seed can be
# how dalle2.sampling can sample; the first of each is the default (docs/results/sampling.md)
SAMPLER_NAMES = "dpmpp_2m", "ddim", "ddpm"
THRESHOLDS = "static", "dynamic"


def setting(default=MISSING, *, help, least=None, below=None, most=MAX_INT, choices=None):
    """A field of a config. A number is above 0, or at least `least`; at most `most`, below
    `below`. A text is one of `choices`."""
    return field(default=default, metadata=dict(help=help, least=least, below=below, most=most,
                                                choices=choices))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one network is optimized: AdamW or Muon with decay on matrices only, EMA, clipping."""

    num_steps: int = setting(help="optimizer updates")
    batch_size: int = setting(help="rows of the global batch, all processes together")
    device_batch_size: int = setting(0, least=0, help="rows that a device computes at a time, 0: "
                                     "all of its share; halved by itself where memory runs out")
    lr: float = setting(help="peak learning rate")
    muon_lr: float = setting(0.0, least=0, help="peak learning rate of matrices and kernels by "
                             "Muon; 0: AdamW for all")
    lr_schedule: str = setting("cosine", choices=("cosine", "constant"),
                               help="after the warm-up: cosine to zero, or constant")
    warmup_steps: int = setting(1000, least=0, help="steps of linear warm-up")
    weight_decay: float = setting(0.0, least=0, help="of weights with two or more dimensions")
    adam_beta2: float = setting(0.999, below=1, help="decay of AdamW's second moment")
    adam_eps: float = setting(1e-8, help="AdamW's epsilon")
    max_grad_norm: float = setting(1.0, help="gradients are clipped to this global norm")
    ema_decay: float = setting(0.9999, below=1, help="of the averaged weights that are exported; "
                               "warmed up over the first steps")
    seed: int = setting(0, least=0, help="of weights, noise, timesteps, crops, captions and order")
    mixed_precision: str = setting("auto", choices=("auto", "no", "bf16", "fp16"), help="auto: "
                                   "bf16 on a GPU or CPU that computes in it, fp16 on other GPUs")
    channels_last: bool = setting(False, help="feature maps with channels innermost: worth a try "
                                  "on a GPU")
    compile: bool = setting(False, help="compile the network with torch.compile, which takes a "
                            "minute or two at the start")
    cuda_graphs: bool = setting(True, help="launch a step's forward and backward pass as one CUDA "
                                "graph, where a process trains alone on one GPU that holds its "
                                "rows at once; not for a CLIP")
    fsdp: bool = setting(False, help="shard weights, average and optimizer among the processes "
                         "(FSDP2), for a network that one GPU does not hold")
    save_every: int = setting(2500, help="steps between checkpoints and exports")
    save_minutes: float = setting(0.0, least=0, help="and minutes between them; 0: steps alone")
    validate_every: int = setting(2500, help="steps between validations")
    snapshot_every: int = setting(0, least=0, help="steps between snapshots of two averages of the "
                                  "weights, for dalle2.tools.choose; 0: none")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A small CLIP that train_clip.py trains (open_clip's model class)."""

    embed_dim: int = setting(help="size D of an embedding, and width of the text tower: the prior "
                             "needs them equal")
    image_size: int = setting(help="input side, pixels")
    vision_width: int = setting(help="channels of the first ResNet stage")
    vision_layers: tuple[int, ...] = setting(most=1000, help="blocks of the four ResNet stages")
    vision_timm: str = setting("", help="timm's name of an image tower that begins with its "
                               "ImageNet weights, such as resnet50, in place of the ResNet")
    lock_vision: bool = setting(False, help="leave that tower as it is and train what is behind it "
                                "and the text tower (Zhai et al. 2022, LiT)")
    text_layers: int = setting(most=1000, help="layers of the text transformer")
    text_heads: int = setting(help="its attention heads")
    context_length: int = setting(help="text positions L, start and end token included")
    logit_scale: float = setting(0.0, least=0, help="fixed inverse temperature; 0: learned, "
                                 "starting at 1 / 0.07")
    min_crop_scale: float = setting(1.0, most=1, help="training sees random squares that hold this "
                                    "share of a picture or more, mirrored half of the time; 1: the "
                                    "picture as it is")
    color_jitter: float = setting(0.0, least=0, most=1, help="most by which brightness, contrast "
                                  "and saturation are changed there")
    word_dropout: float = setting(0.0, least=0, below=1, help="share of a caption's tokens that "
                                  "are blanked in training")
    swap_weight: float = setting(0.0, least=0, help="weight of a second loss: a picture has to be "
                                 "nearer to its caption than to the same one with two words "
                                 "swapped, so that it matters which thing has which color")
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Caption -> CLIP image embedding. Width is that of the CLIP. Ramesh et al. 2022, sec. 2.2."""

    depth: int = setting(most=1000, help="layers of the transformer")
    heads: int = setting(help="attention heads")
    dim_head: int = setting(64, help="channels of a head")
    max_text_len: int = setting(help="text positions (99.9 % of COCO's captions have at most 31 "
                                "tokens); longer captions are cut, their end token kept")
    normformer: bool = setting(False, help="one more norm in each layer, as in LAION's prior")
    discrete_time: bool = setting(False, help="a learned vector for each timestep, as in "
                                  "LAION's prior")
    timesteps: int = setting(1000, most=10 ** 6, help="timesteps of the diffusion process")
    beta_schedule: str = setting("cosine", choices=("cosine", "linear"), help="noise schedule")
    text_cond_drop_prob: float = setting(0.1, least=0, below=1, help="share of the captions that "
                                         "are dropped in training, so that guidance works")
    sample_timesteps: int = setting(25, help="sampling steps")
    num_candidates: int = setting(2, help="embeddings sampled for a caption; the nearest to it is "
                                  "kept (sec. 2.2)")
    cond_scale: float = setting(1.0, least=0, help="guidance when sampling; 1 is none")
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class UnetConfig:
    """One stage of the decoder; the first is conditioned on the image embedding, the following
    ones on the picture of the stage before. Ramesh et al. 2022, sec. 2.1; Ho et al. 2021."""

    image_size: int = setting(help="side of its pictures, pixels")
    dim: int = setting(help="channels at full resolution")
    dim_mults: tuple[int, ...] = setting(help="multiples of dim, one for each resolution")
    num_resnet_blocks: int = setting(2, least=0, most=100, help="blocks at each resolution")
    self_attn: tuple[bool, ...] = setting((), help="whether each resolution attends to itself; "
                                          "none given: none does (the middle always does)")
    attn_heads: int = setting(8, help="heads of self-attention")
    attn_dim_head: int = setting(64, help="channels of a head")
    memory_efficient: bool = setting(True, help="down-sample before, not after, the blocks of a "
                                     "resolution")
    cond_dim: int = setting(0, least=0, help="channels of an image token; 0: dim")
    num_image_tokens: int = setting(4, help="tokens that the image embedding becomes (first stage)")
    init_conv_kernel_size: int = setting(0, least=0, help="of the first convolution; 0: the "
                                         "library's three of 3, 7 and 15 pixels")
    objective: str = setting("v", choices=("x_start", "noise", "v"), help="what the network "
                             "predicts (v: Salimans and Ho 2022, appendix D)")
    timesteps: int = setting(1000, most=10 ** 6, help="timesteps of the diffusion process")
    beta_schedule: str = setting("cosine", choices=("cosine", "linear"), help="noise schedule")
    min_snr_gamma: float = setting(5.0, least=0, help="loss weight of Hang et al. 2023; 0 is none")
    last_timestep_share: float = setting(0.0, least=0, below=1, help="share of the rows trained at "
                                         "the last timestep, where sampling begins; the others at "
                                         "any (for a later stage that is drawn in one step)")
    image_cond_drop_prob: float = setting(0.1, least=0, below=1, help="share of the embeddings "
                                          "dropped in training, so that guidance works (first "
                                          "stage)")
    image_embed_noise: float = setting(0.0, least=0, help="norm of the noise added to the image "
                                       "embedding in training, whose own norm is 1 (first stage)")
    gradient_checkpointing: bool = setting(False, help="compute blocks again in the backward pass: "
                                           "less memory, about a third more time")
    crop_size: int = setting(0, least=0, help="side of the training crops (later stages); 0: the "
                             "whole picture")
    lowres_noise_max_level: int = setting(400, least=0, help="most noise, of 1000, on the picture "
                                          "that a later stage is conditioned on, in training")
    lowres_noise_level: int = setting(100, least=0, help="and when sampling (Saharia et al. 2022, "
                                      "sec. 2.4)")
    sample_timesteps: int = setting(25, help="sampling steps")
    cond_scale: float = setting(1.0, least=0, help="guidance when sampling (first stage); 1 is "
                                "none")
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
    text_heads=4, context_length=26, logit_scale=20.0, word_dropout=0.1,
    train=TrainConfig(num_steps=300, batch_size=256, lr=3e-3, muon_lr=0.02, warmup_steps=30,
                      weight_decay=0.05, adam_beta2=0.98, ema_decay=0.97, save_every=100,
                      validate_every=300))

_TOY_TRAIN = TrainConfig(num_steps=1000, batch_size=64, lr=1e-3, muon_lr=0.02, warmup_steps=50,
                         weight_decay=0.01, adam_beta2=0.99, ema_decay=0.99, save_every=500,
                         validate_every=500)

_PHOTO = Preset(
    clip=replace(_TOY_CLIP, embed_dim=192, image_size=64, text_heads=6, logit_scale=14.0,
                 min_crop_scale=0.3, color_jitter=0.4, word_dropout=0.2,
                 train=replace(_TOY_CLIP.train, num_steps=700, weight_decay=0.2,
                               ema_decay=0.995, save_every=100, validate_every=100)),
    prior=PriorConfig(depth=4, heads=6, dim_head=32, max_text_len=26, sample_timesteps=3,
                      cond_scale=2.0,
                      train=replace(_TOY_TRAIN, num_steps=1500, batch_size=128,
                                    weight_decay=0.05, save_every=250, validate_every=250)),
    decoder=DecoderConfig(unets=(
        UnetConfig(image_size=64, dim=16, dim_mults=(2, 3, 4, 8, 8), num_resnet_blocks=0,
                   attn_heads=4, attn_dim_head=32, init_conv_kernel_size=3,
                   cond_dim=64, num_image_tokens=8, min_snr_gamma=0.0, cond_scale=3.0,
                   train=replace(_TOY_TRAIN, num_steps=4800, batch_size=32, lr=2e-3,
                                 muon_lr=0.015, weight_decay=0.1, ema_decay=0.999,
                                 save_every=400, validate_every=400)),
        UnetConfig(image_size=256, dim=16, dim_mults=(1, 2, 4), num_resnet_blocks=0,
                   attn_heads=4, attn_dim_head=32, init_conv_kernel_size=3,
                   objective="x_start", beta_schedule="linear", min_snr_gamma=0.0,
                   crop_size=64, lowres_noise_max_level=50, lowres_noise_level=10,
                   sample_timesteps=2,
                   train=replace(_TOY_TRAIN, num_steps=1000, batch_size=16, lr=2e-3,
                                 ema_decay=0.999, validate_every=250)))))

PRESETS = {
    # two CPU cores, minutes: 32 -> 256 px on the embedded data set
    "toy": Preset(
        clip=replace(_TOY_CLIP, swap_weight=2.0),
        prior=PriorConfig(depth=2, heads=4, dim_head=32, max_text_len=26, cond_scale=2.0,
                          beta_schedule="linear",
                          train=replace(_TOY_TRAIN, num_steps=2000, weight_decay=0.3,
                                        save_every=1000, validate_every=1000)),
        decoder=DecoderConfig(unets=(
            UnetConfig(image_size=32, dim=16, dim_mults=(2, 4, 8, 8), num_resnet_blocks=0,
                       attn_heads=4, attn_dim_head=32, init_conv_kernel_size=3,
                       cond_dim=64, num_image_tokens=8,
                       objective="x_start", beta_schedule="linear",
                       min_snr_gamma=0.0, sample_timesteps=10, cond_scale=1.5,
                       train=replace(_TOY_TRAIN, num_steps=1100, batch_size=32, lr=2e-3,
                                     muon_lr=0.015, weight_decay=0.3, save_every=275,
                                     validate_every=550)),
            UnetConfig(image_size=256, dim=16, dim_mults=(1, 2, 4), num_resnet_blocks=0,
                       attn_heads=4, attn_dim_head=32, init_conv_kernel_size=3,
                       objective="x_start", beta_schedule="linear", min_snr_gamma=0.0,
                       crop_size=64, lowres_noise_max_level=50, lowres_noise_level=0,
                       last_timestep_share=0.5, sample_timesteps=1,
                       train=replace(_TOY_TRAIN, num_steps=600, batch_size=16, lr=2e-3,
                                     save_every=300, validate_every=600))))),
    # two CPU cores, an hour: 64 -> 256 px on some thousand photographs
    "photo": _PHOTO,
    # the same with a first stage of five times the size: five hours
    "photo-large": replace(_PHOTO, decoder=DecoderConfig(unets=(
        UnetConfig(image_size=64, dim=32, dim_mults=(2, 4, 6, 8), num_resnet_blocks=1,
                   self_attn=(False, True, True, True), cond_dim=128, num_image_tokens=8,
                   min_snr_gamma=0.0, cond_scale=3.0,
                   train=replace(_TOY_TRAIN, num_steps=2800, batch_size=32, muon_lr=0.015,
                                 warmup_steps=100, weight_decay=0.1, ema_decay=0.999,
                                 save_every=400, validate_every=400)),
        _PHOTO.decoder.unets[1]))),
    # one GPU; trained for minutes on one H200: docs/results/gpu.md
    "small": Preset(
        clip=replace(_TOY_CLIP, embed_dim=256, image_size=96, vision_width=32, text_layers=3,
                     text_heads=8, logit_scale=14.0, min_crop_scale=0.3, color_jitter=0.4,
                     word_dropout=0.2,
                     train=replace(_TOY_CLIP.train, num_steps=1600, batch_size=512,
                                   warmup_steps=50, weight_decay=0.2, ema_decay=0.99,
                                   save_every=100, validate_every=100)),
        prior=PriorConfig(depth=6, heads=12, max_text_len=32, cond_scale=2.0,
                          train=TrainConfig(num_steps=10_000, batch_size=256, lr=1e-3,
                                            muon_lr=0.02, warmup_steps=50, weight_decay=0.05,
                                            adam_beta2=0.99, adam_eps=1e-6, ema_decay=0.995,
                                            save_every=500, validate_every=500,
                                            snapshot_every=500)),
        decoder=DecoderConfig(unets=(
            UnetConfig(image_size=64, dim=64, dim_mults=(1, 2, 3, 4),
                       self_attn=(False, True, True, True), cond_dim=128, num_image_tokens=8,
                       min_snr_gamma=0.0, cond_scale=3.0,
                       train=TrainConfig(num_steps=30_000, batch_size=512, lr=1e-3, muon_lr=0.015,
                                         warmup_steps=100, weight_decay=0.3, adam_beta2=0.99,
                                         ema_decay=0.999, save_every=500, validate_every=500,
                                         snapshot_every=1500)),
            UnetConfig(image_size=256, dim=32, dim_mults=(1, 2, 4), objective="x_start",
                       beta_schedule="linear", min_snr_gamma=0.0, crop_size=64,
                       lowres_noise_max_level=50, lowres_noise_level=10, sample_timesteps=4,
                       train=TrainConfig(num_steps=20_000, batch_size=64, lr=1e-3, muon_lr=0.02,
                                         warmup_steps=100, weight_decay=0.01, adam_beta2=0.99,
                                         ema_decay=0.999, save_every=500, validate_every=500,
                                         snapshot_every=1000))))),
    # one GPU of 80 GB, or several smaller; lr, decay, EMA: Ramesh et al. 2022, table 3;
    # guidance, and what the upsampler learns: docs/results/photographs.md
    "base": Preset(
        clip=_BASE_CLIP,
        prior=PriorConfig(depth=12, heads=12, max_text_len=32, cond_scale=2.0,
                          train=TrainConfig(num_steps=150_000, batch_size=1024, lr=1.1e-4,
                                            weight_decay=6e-2, adam_beta2=0.96, adam_eps=1e-6,
                                            snapshot_every=7_500)),
        decoder=DecoderConfig(unets=(
            UnetConfig(image_size=64, dim=128, dim_mults=(1, 2, 3, 4),
                       self_attn=(False, True, True, True), cond_scale=2.0,
                       train=TrainConfig(num_steps=300_000, batch_size=512, lr=1.2e-4,
                                         snapshot_every=15_000)),
            UnetConfig(image_size=256, dim=64, dim_mults=(1, 2, 4, 8), objective="x_start",
                       beta_schedule="linear", min_snr_gamma=0.0, crop_size=64,
                       lowres_noise_max_level=50, lowres_noise_level=10, sample_timesteps=4,
                       train=TrainConfig(num_steps=150_000, batch_size=512, lr=1.2e-4,
                                         snapshot_every=7_500))))),
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


def validate_config(config):
    """Raises UserError naming the first field of `config` whose value makes no sense."""
    if getattr(config, "fsdp", False) and (config.compile or config.mixed_precision == "fp16"):
        raise UserError("goes with neither --compile nor --mixed_precision fp16", "fsdp")
    if getattr(config, "lock_vision", False) and not config.vision_timm:
        raise UserError("only a tower of --vision_timm has weights to keep", "lock_vision")
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                validate_config(part)
            else:
                _validate_value(item, part)
    return config


def _validate_value(item, value):
    bounds = item.metadata
    if bounds["choices"] and value not in bounds["choices"]:
        raise UserError(f"{value!r:.20} is not one of {', '.join(bounds['choices'])}", item.name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least, below, most = bounds["least"], bounds["below"], bounds["most"]
    if not (value > 0 if least is None else value >= least):  # nan is neither
        wanted = "positive" if least is None else f"at least {least}"
        raise UserError(f"{value!r:.20} must be {wanted}", item.name)
    if value > most:
        raise UserError(f"{value!r:.20} must be at most {most}", item.name)
    if below is not None and value >= below:
        raise UserError(f"{value} must be below {below}", item.name)


def get_default(name):
    """The default of the field `name` of any config; None where it has none. A field that is added
    later has what was done before as its default."""
    for kind in (TrainConfig, ClipConfig, PriorConfig, UnetConfig):
        for item in dataclasses.fields(kind):
            if item.name == name and item.default is not MISSING:
                return item.default
    return None


def config_to_dict(config):
    return dataclasses.asdict(config)


def config_from_dict(kind, values):
    """The dataclass `kind` from what `config_to_dict` made, possibly through JSON.

    Raises UserError on an unknown or a missing field and on a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{kind.__name__}: {values!r:.40} is no object with fields")
    known = typing.get_type_hints(kind)
    unknown = set(values) - set(known)
    missing = {item.name for item in dataclasses.fields(kind)
               if item.default is MISSING} - set(values)
    if unknown or missing:
        raise UserError(f"{kind.__name__}: unknown fields {sorted(unknown)}, "
                        f"missing fields {sorted(missing)}")
    return kind(**{name: _from_json(name, known[name], value) for name, value in values.items()})


def _from_json(name, hint, value):
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_json(name, typing.get_args(hint)[0], part) for part in value)
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    raise UserError(f"{value!r:.40} is no {getattr(hint, '__name__', hint)}", name)
