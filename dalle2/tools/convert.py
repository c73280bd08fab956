"""Weights to and from the stock classes of dalle2-pytorch: `python -m dalle2.tools.convert`.

An export becomes a state dict of the library's `DiffusionPrior` or `Decoder`, which they load with
`strict=True`. In the other direction, such a state dict becomes an export, and so does a file with
a network under `net.` or `ema_model.net.`, such as the public LAION prior. The sizes of a prior are
read from its weights; those of a decoder are given by `--preset`.
"""

from dataclasses import replace
from pathlib import Path

import torch

from dalle2 import cli
from dalle2.checkpoint import read_export_header, save_export
from dalle2.config import PRESETS, PriorConfig, config_to_dict
from dalle2.errors import UserError
from dalle2.fast_modules import library, restore_modules
from dalle2.files import replace_file
from dalle2.models import build_prior, build_unet, load_decoder, load_prior


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="an export of this project, or a file of "
                        "torch.save")
    parser.add_argument("--output", required=True, help=".pt for the library, .safetensors for an "
                        "export")
    parser.add_argument("--preset", default="base", choices=list(PRESETS),
                        help="sizes of a stock decoder's stages")
    cli.add_clip_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    header = read_export_header(args.input, None)
    if header is not None:
        state = convert_to_stock(args.input, header["kind"])
        replace_file(args.output, lambda part: torch.save(state, part))
        print(f"{args.output}: {len(state)} tensors for strict loading by dalle2-pytorch")
        return
    try:
        state = find_state(torch.load(args.input, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{args.input} is not a file of tensors "
                        f"({str(error).splitlines()[0]})", "input") from error
    header = cli.describe_clip(args, cli.load_clip(args), Path(args.output).parent or ".")
    kind, header, state = convert_from_stock(state, header, PRESETS[args.preset])
    save_export(args.output, kind, header, state)
    print(f"{args.output}: a {kind}, {len(state)} tensors")


def build_stock_prior(network, config, embed_dim):
    """dalle2_pytorch's DiffusionPrior around a network of `build_prior`, made stock again."""
    return library.DiffusionPrior(restore_modules(network), image_embed_dim=embed_dim,
                                  timesteps=config.timesteps, beta_schedule=config.beta_schedule,
                                  text_cond_drop_prob=config.text_cond_drop_prob)


def build_stock_decoder(unets, configs):
    """dalle2_pytorch's Decoder around networks of `build_unet`, made stock again, with their
    UnetConfigs."""
    return library.Decoder(
        tuple(map(restore_modules, unets)), image_sizes=tuple(c.image_size for c in configs),
        timesteps=configs[0].timesteps, beta_schedule=tuple(c.beta_schedule for c in configs),
        predict_x_start=tuple(c.objective == "x_start" for c in configs),
        predict_v=tuple(c.objective == "v" for c in configs), learned_variance=False,
        image_cond_drop_prob=configs[0].image_cond_drop_prob, text_cond_drop_prob=1.0,
        use_blur_for_lowres_cond=False, use_noise_for_lowres_cond=True)


def convert_to_stock(path, kind):
    """{name: tensor}: the state dict of the library's class of the same sizes and schedule."""
    if kind == "prior":
        network, config, header = load_prior(path)
        return build_stock_prior(network, config, header["embed_dim"]).state_dict()
    if kind == "decoder":
        unets, configs, header = load_decoder(path)
        if len(unets) < len(header["stages"]):
            raise UserError(f"{path} holds {len(unets)} of {len(header['stages'])} stages", "input")
        order = sorted(unets)
        return build_stock_decoder([unets[n] for n in order],
                                   [configs[n] for n in order]).state_dict()
    raise UserError(f"{path} is a {kind}, not a prior or decoder", "input")


def find_state(loaded):
    """The {name: tensor} in what a file holds: the averaged weights, if there are any."""
    for key in ("ema_model", "model", "state_dict"):
        if isinstance(loaded.get(key), dict):
            return find_state(loaded[key])
    state = {name: value for name, value in loaded.items() if torch.is_tensor(value)}
    averaged = {name.removeprefix("ema_model."): value for name, value in state.items()
                if name.startswith("ema_model.")}
    return averaged or state


def convert_from_stock(state, header, preset):
    """(kind, header of the export, its weights). Raises UserError if the weights do not fit."""
    if any(name.startswith("unets.") for name in state):
        kept = {name: value for name, value in state.items() if name.startswith("unets.")}
        configs = preset.decoder.unets
        network = torch.nn.Module()
        network.unets = torch.nn.ModuleList(
            build_unet(config, number, header["embed_dim"])
            for number, config in enumerate(configs, start=1))
        stages = [{"config": config_to_dict(config), "step": 0} for config in configs]
        kind, header = "decoder", {**header, "stages": stages}
    else:
        kept = {name: value for name, value in state.items() if name.startswith("net.")}
        kept = kept or {f"net.{name}": value for name, value in state.items()
                        if not name.startswith("noise_scheduler.")}
        config, embed_dim = read_prior_config(kept, preset.prior)
        if embed_dim != header["embed_dim"]:
            raise UserError(f"its embeddings have {header['embed_dim']} numbers, the "
                            f"prior's {embed_dim}", "clip_model")
        network = torch.nn.Module()
        network.net = build_prior(config, embed_dim)
        kind, header = "prior", {**header, "config": config_to_dict(config), "step": 0}
    try:
        network.load_state_dict(kept)
    except RuntimeError as error:
        raise UserError("the weights do not fit: "
                        + " ".join(str(error).split())[:300], "input") from error
    return kind, header, kept


def read_prior_config(state, base: PriorConfig):
    """(PriorConfig, embedding size) of the weights of a DiffusionPriorNetwork under `net.`."""
    try:
        layers = {name.split(".")[3] for name in state
                  if name.startswith("net.causal_transformer.layers.")}
        heads = state["net.causal_transformer.rel_pos_bias.relative_attention_bias.weight"].shape[1]
        inner = state["net.causal_transformer.layers.0.0.to_q.weight"].shape[0]
        max_text_len, embed_dim = state["net.null_text_encodings"].shape[1:]
    except (KeyError, ValueError) as error:
        raise UserError(f"neither a prior nor a decoder of dalle2-pytorch ({error} is "
                        "missing)", "input") from error
    return replace(base, depth=len(layers), heads=heads, dim_head=inner // heads,
                   max_text_len=max_text_len,
                   normformer="net.causal_transformer.layers.0.1.3.g" in state,
                   discrete_time="net.to_time_embeds.0.weight" in state), embed_dim


if __name__ == "__main__":
    cli.run(main)
