"""The networks, built from a config.

Their parameter names are the library's own, so that exports load into its `DiffusionPrior` and
`Decoder` (under `net.` and `unets.<i>.`) and the other way round.
"""

import torch

from dalle2.checkpoint import (
    check_header,
    explain_damage,
    load_export,
    load_network,
    save_export,
)
from dalle2.config import (
    PriorConfig,
    UnetConfig,
    config_from_dict,
    config_to_dict,
    validate_config,
)
from dalle2.errors import UserError
from dalle2.fast_modules import library, swap_modules
from dalle2.files import hold_lock


def build_prior(config: PriorConfig, embed_dim):
    """The prior's causal transformer, for a CLIP whose text width and embedding are `embed_dim`.

    Called with image_embed (B, D) noised, t (B,), text_embed (B, D), text_encodings (B, L, D) and
    text_cond_drop_prob, a (B,) tensor of zeros and ones; gives (B, D).
    """
    prior = library.DiffusionPriorNetwork(
        dim=embed_dim, depth=config.depth, heads=config.heads, dim_head=config.dim_head,
        max_text_len=config.max_text_len, normformer=config.normformer,
        num_timesteps=config.timesteps if config.discrete_time else None)
    prior.null_image_embed.requires_grad_(False)  # never read: the image is never dropped
    return swap_modules(prior)


def build_unet(config: UnetConfig, unet_number, image_embed_dim):
    """Stage `unet_number` (1-based) of the decoder, with the flags `Decoder` would give it.

    The first is called with image (B, 3, H, W) in [-1, 1] noised, t (B,), image_embed (B, D) and
    image_cond_drop_prob (B,) of zeros and ones; the following ones with lowres_cond_img
    (B, 3, H, W) and lowres_noise_level (B,) instead. Gives (B, 3, H, W).
    """
    is_first = unet_number == 1
    factor = 2 ** (len(config.dim_mults) - (0 if config.memory_efficient else 1))
    for name in ("image_size", "crop_size"):
        if getattr(config, name) % factor:
            raise UserError(f"{getattr(config, name)} is no multiple of {factor}, as "
                            f"{len(config.dim_mults)} resolutions need", name)
    if not config.memory_efficient and config.dim_mults[0] != 1:  # the library's last block
        raise UserError("the first one has to be 1 where memory_efficient is off", "dim_mults")
    cond_dim = config.cond_dim or config.dim
    if is_first and cond_dim == image_embed_dim:  # the library would make no tokens
        raise UserError(f"cond_dim {cond_dim} needs a CLIP of another embedding size", "preset")
    kernel = config.init_conv_kernel_size
    unet = library.Unet(
        dim=config.dim, dim_mults=config.dim_mults, image_embed_dim=image_embed_dim,
        num_resnet_blocks=config.num_resnet_blocks, cond_dim=cond_dim,
        num_image_tokens=config.num_image_tokens,
        self_attn=config.self_attn or (False,) * len(config.dim_mults),
        attn_heads=config.attn_heads, attn_dim_head=config.attn_dim_head,
        memory_efficient=config.memory_efficient,
        checkpoint_during_training=config.gradient_checkpointing,
        init_cross_embed=kernel == 0, init_conv_kernel_size=kernel or 7,
        cond_on_image_embeds=is_first, lowres_cond=not is_first, lowres_noise_cond=not is_first)
    init_unet(unet, config, is_first, image_embed_dim)
    unet.null_text_embed.requires_grad_(False)  # captions reach the decoder by the embedding alone
    if not is_first:
        unet.null_image_embed.requires_grad_(False)
        unet.null_image_hiddens.requires_grad_(False)
    return swap_modules(unet)


@torch.no_grad()
def init_unet(unet, config, is_first, image_embed_dim):
    """Departures from the library's random start; the networks and their names are the same.

    Its pixel shuffles begin with the same weights for all four pixels, so that the picture that
    grows from the coarsest layers begins without any notion of place: they begin independent here.
    The image embedding has unit norm: the layers that read it begin as if each of its numbers had
    unit variance. A later stage that predicts x_start begins with the enlarged picture, which its
    last layer is given beside the features, as its answer, and learns what to change.
    """
    for module in unet.modules():
        if isinstance(module, library.PixelShuffleUpsample):
            torch.nn.init.kaiming_uniform_(module.net[0].weight)
    if is_first:
        for layer in (unet.to_image_hiddens, unet.image_to_tokens):
            if not isinstance(layer, torch.nn.Identity):
                layer[0].weight.mul_(image_embed_dim ** 0.5)
    elif config.objective == "x_start":
        weight = unet.to_out.weight  # (3, C + 3, K, K), zero
        middle = weight.shape[-1] // 2
        weight[:, -3:, middle, middle] = torch.eye(3)


def list_blocks(network):
    """The parts of a prior or U-Net that are called as a whole: most of its weights. The attention
    of the prior's layers is not among them, its parts are called one by one."""
    if isinstance(network, library.DiffusionPriorNetwork):
        return [feed_forward for _, feed_forward in network.causal_transformer.layers]
    kinds = library.ResnetBlock, library.RearrangeToSequence, library.PixelShuffleUpsample
    return [part for part in network.modules() if isinstance(part, kinds)]


def load_prior(path):
    """(network, PriorConfig, header) of a prior export; UserError for another file."""
    header, weights = load_export(path, "prior")
    with explain_damage(path):
        config = validate_config(config_from_dict(PriorConfig, header["config"]))
        prior = load_network(lambda: build_prior(config, header["embed_dim"]), {
            name.removeprefix("net."): value for name, value in weights.items()})
    return prior, config, header


def load_decoder(path):
    """({unet_number: network}, {unet_number: UnetConfig}, header) of the stages that a decoder
    export holds; UserError for another file."""
    header, weights = load_export(path, "decoder")
    unets, configs = {}, {}
    with explain_damage(path):
        for number, stage in enumerate(header["stages"], start=1):
            if stage is None:
                continue
            check_header(stage, {"config": dict})
            configs[number] = validate_config(config_from_dict(UnetConfig, stage["config"]))
            prefix = f"unets.{number - 1}."
            names = [name for name in weights if name.startswith(prefix)]
            unets[number] = load_network(
                lambda: build_unet(configs[number], number, header["embed_dim"]),
                {name.removeprefix(prefix): weights.pop(name) for name in names})
        if weights or not header["stages"]:
            raise UserError(f"tensor {min(weights, default='')} belongs to none of its "
                            f"{len(header['stages'])} stages")
    return unets, configs, header


def save_decoder_stage(path, unet_number, config, state, header, step, num_stages):
    """Puts the weights `state` of one stage after `step` steps into a decoder export, beside the
    other stages that it holds. A lock keeps two stages that are trained at the same time from
    losing each other's weights."""
    with hold_lock(path.with_name(f".{path.name}.lock"), f"waiting for {path}"):
        stages, weights = [None] * num_stages, {}
        if path.exists():
            before, weights = load_export(path, "decoder")
            stages = before["stages"]
        prefix = f"unets.{unet_number - 1}."
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        weights |= {prefix + name: value for name, value in state.items()}
        stages[unet_number - 1] = {"config": config_to_dict(config), "step": step}
        save_export(path, "decoder", {**header, "stages": stages}, weights)
