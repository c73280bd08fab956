"""Frozen CLIP: captions and pictures to embeddings. The only file that imports open_clip.

Radford et al. 2021 (arXiv 2103.00020). The tokenizer is the one that belongs to the model: ids
begin with its start token and hold its end token, at whose position the text embedding is read.
"""

import hashlib
import logging
import math
import os
from functools import cached_property, lru_cache

import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as TF

from dalle2.checkpoint import explain_damage, load_export, load_network, read_export_header
from dalle2.config import ClipConfig, config_from_dict, validate_config
from dalle2.errors import UserError, rename_argument

CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


class FrozenClip:
    """A CLIP that only embeds. Build it with `load_clip`, or around a model one trains.

    embed_dim: D, the size of its embeddings. image_size, mean, std, interpolation, resize_mode: the
    pictures it was trained on, as the model's own config says; OpenAI's for one that train_clip.py
    trained.
    """

    def __init__(self, model, tokenizer):
        for name in ("sot_token_id", "eot_token_id"):
            if not hasattr(tokenizer, name):
                raise UserError("only CLIPs with CLIP's own tokenizer (start and end "
                                "token) can be used", "clip_model")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.text = getattr(model, "text", model)  # open_clip.CLIP holds its text tower's layers
        self.device = next(model.parameters()).device
        pictures = open_clip.get_model_preprocess_cfg(model)
        size = pictures["size"]
        self.image_size = size[0] if isinstance(size, (tuple, list)) else size
        self.mean, self.std = pictures.get("mean", CLIP_MEAN), pictures.get("std", CLIP_STD)
        self.interpolation = pictures.get("interpolation", "bicubic")
        self.resize_mode = pictures.get("resize_mode", "shortest")
        self.context_length = tokenizer.context_length
        weight = self.text.ln_final.weight.detach()
        self.text_width, self.embed_dim = len(weight), len(self._project(weight[None])[0])
        # CoCa pools at a token of its own, which it puts after all positions
        self.is_causal = self.text.attn_mask is not None \
            and getattr(self.text, "cls_emb", None) is None

    @cached_property
    def fingerprint(self):
        """16 hex digits that name the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def tokenize(self, captions):
        """list of B strings -> text_tokens (B, L) int64: start, words, end, zeros. A caption that
        is too long is cut, its end token kept."""
        text_tokens = self.tokenizer(captions)
        assert (text_tokens[:, 0] == self.tokenizer.sot_token_id).all()
        assert (text_tokens == self.tokenizer.eot_token_id).any(1).all()
        return text_tokens

    def compute_text_mask(self, text_tokens):
        """text_tokens (B, L) -> (B, L) bool, true up to and including the end token."""
        end = (text_tokens == self.tokenizer.eot_token_id).int().argmax(1, keepdim=True)  # (B, 1)
        return torch.arange(text_tokens.shape[1], device=text_tokens.device) <= end

    @torch.no_grad()
    def embed_image(self, image):
        """image (B, 3, H, W), uint8 or float in [0, 1] -> image_embed (B, D) float32, unit norm."""
        image = preprocess_image(image.to(self.device), self.image_size, self.mean, self.std,
                                 self.interpolation)
        return F.normalize(self.model.encode_image(image).float(), dim=-1)

    @torch.no_grad()
    def embed_text(self, text_tokens):
        """text_tokens (B, L) -> text_embed (B, D), unit norm, and text_encodings (B, M, D): the
        last layer's output after its norm, one vector a token, zero after the end token; M is L,
        or the longest caption's length where the text tower is causal, which is exact.

        Where the text tower is not D wide, CLIP's own text projection brings each of these vectors
        to D, as it does with the one that becomes the text embedding: the prior reads vectors of
        one size, and a projection of its own would be weights that the stock class lacks."""
        text_tokens = text_tokens.to(self.device)
        mask = self.compute_text_mask(text_tokens)
        if self.is_causal:
            longest = int(mask.sum(1).max())
            text_tokens, mask = text_tokens[:, :longest], mask[:, :longest]
            text_embed, text_encodings = self._run_text_tower(text_tokens)
        else:
            kept = []
            hook = self.text.transformer.register_forward_hook(
                lambda *args: kept.append(args[-1]))
            try:
                text_embed = self.model.encode_text(text_tokens)
            finally:
                hook.remove()
            text_encodings = self.text.ln_final(kept[0][:, :mask.shape[1]])  # (B, L, W)
        if self.text_width != self.embed_dim:
            text_encodings = self._project(text_encodings)  # (B, M, D)
        return F.normalize(text_embed.float(), dim=-1), text_encodings.float() * mask[..., None]

    def _run_text_tower(self, text_tokens):
        """What a causal tower of open_clip does, for fewer positions than the model has."""
        text, length = self.text, text_tokens.shape[1]
        x = text.token_embedding(text_tokens) + text.positional_embedding[:length]  # (B, M, W)
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
        ends = (text_tokens == self.tokenizer.eot_token_id).int().argmax(1)
        return self._project(x[torch.arange(len(x), device=x.device), ends]), x

    def _project(self, x):
        """(..., W) -> (..., D), from the text tower's width into the space of the embeddings."""
        projection = self.text.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    def list_differences(self, side):
        """How squares of `side` px, cut from the middle of a photo, differ from the pictures that
        this CLIP was trained on: a list of lines, empty for most."""
        lines = []
        if self.image_size > side:
            lines.append(f"this CLIP reads pictures of {self.image_size} px and sees those of "
                         f"{side} px enlarged: they hold no finer detail, and a CLIP that reads "
                         f"{side} px or less embeds them in less time")
        if self.resize_mode != "shortest":
            lines.append(f"this CLIP was trained on whole photos made square ({self.resize_mode}) "
                         "and sees the square in the middle of each: python -m dalle2.tools.doctor "
                         "tells how well it finds their captions")
        return lines


def preprocess_image(image, size, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic"):
    """image (B, 3, H, W), uint8 or float in [0, 1] -> (B, 3, size, size) as a CLIP wants it:
    resized ("bicubic" or "bilinear", antialiased) and normalised per channel."""
    if image.shape[-1] != size:
        image = TF.resize(image, [size, size], TF.InterpolationMode(interpolation), antialias=True)
    image = image.float() / 255 if image.dtype == torch.uint8 else image.clamp(0, 1)
    return (image - _build_channels(tuple(mean), image.device)) \
        / _build_channels(tuple(std), image.device)


@lru_cache
def _build_channels(values, device):
    """One number a channel, (1, 3, 1, 1), copied to the device once."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


class FastFrozenNorm(timm.layers.FrozenBatchNormAct2d):
    """The same numbers in one pass in place of three, and in the precision of x, where autocast
    would have fp32: EfficientNet-Lite1 on a CPU is 1.3 times as fast with it, in bf16 2.2 times."""

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                         eps=self.eps)
        return self.act(self.drop(x))


def build_clip(config: ClipConfig):
    """An untrained small CLIP: open_clip's model class with a ResNet image tower, or timm's."""
    vision = dict(width=config.vision_width, head_width=32, layers=config.vision_layers)
    if config.vision_timm:
        vision = dict(timm_model_name=config.vision_timm, timm_pool="avg", timm_proj="linear")
    try:
        model = open_clip.CLIP(
            config.embed_dim, dict(image_size=config.image_size, **vision),
            dict(context_length=config.context_length, vocab_size=49408, width=config.embed_dim,
                 heads=config.text_heads, layers=config.text_layers))
        if config.vision_timm:
            check_picture_size(model, config.image_size)
    except (RuntimeError, AssertionError) as error:
        if not config.vision_timm:
            raise
        raise UserError(f"timm has no such network that can be used: {config.vision_timm} "
                        f"({' '.join(str(error).split()):.200})", "vision_timm") from error
    if config.vision_timm:
        model.visual.image_mean, model.visual.image_std = find_mean_and_std(config)
        if config.lock_vision:
            model.visual.trunk = timm.layers.freeze_batch_norm_2d(
                model.visual.trunk).requires_grad_(False)
            for module in model.visual.trunk.modules():
                if type(module) is timm.layers.FrozenBatchNormAct2d:
                    module.__class__ = FastFrozenNorm
    if config.logit_scale:
        model.logit_scale.data.fill_(math.log(config.logit_scale))
        model.logit_scale.requires_grad_(False)
    return model


@torch.no_grad()
def check_picture_size(model, size):
    """Raises what the image tower raises on pictures of `size` px, as some of timm's do."""
    weight = next(model.visual.parameters())
    model.eval().encode_image(torch.zeros(1, 3, size, size, device=weight.device))
    model.train()


def load_vision_weights(model, config, path=None):
    """Puts ImageNet weights into the timm image tower of what `build_clip` gave: those of a
    safetensors file under timm's names, or timm's own, downloaded. Raises UserError where they
    cannot be had or do not fit."""
    if path and not os.path.isfile(path):
        raise UserError(f"no such file: {path}", "vision_weights")
    try:
        state = load_file(path) if path else timm.create_model(
            config.vision_timm, pretrained=True).state_dict()
    except Exception as error:
        what = f"{path} cannot be read" if path else "could not be downloaded; name a file of them"
        raise UserError(f"{what} ({' '.join(str(error).split()):.200})",
                        "vision_weights") from error
    tower = model.visual.trunk
    with rename_argument(path="vision_weights"), explain_damage(path or config.vision_timm):
        tower.load_state_dict({name: state[name] for name in tower.state_dict()})


def find_mean_and_std(config: ClipConfig):
    """By which a small CLIP's pictures are normalised, a number a channel each."""
    if not config.vision_timm:
        return CLIP_MEAN, CLIP_STD
    pictures = timm.get_pretrained_cfg(config.vision_timm)
    return pictures.mean, pictures.std


def build_tokenizer(context_length):
    return open_clip.SimpleTokenizer(context_length=context_length)


class WordSwaps:
    """Captions with two words swapped that could have been written so: every pair of neighbors in
    them occurs in one of the captions `text_tokens` (M, L), integers. For a CLIP that learns from a
    batch of random pictures it hardly matters which thing has which color; these make it matter
    (Yuksekgonul et al. 2023, "When and why vision-language models behave like bags-of-words")."""

    TRIES = 128  # random swaps, of which the first possible one is taken

    def __init__(self, text_tokens):
        self.pairs = self._pair(text_tokens.long()).unique()

    def draw(self, text_tokens, is_word, random):
        """(B, L) captions and (B,) 1.0 where a swap was found. text_tokens, is_word: (B, L)."""
        self.pairs = self.pairs.to(text_tokens.device)
        draw = random.rand(self.TRIES, text_tokens.shape[1]).masked_fill(~is_word[:, None], -1)
        places = draw.topk(2).indices                                           # (B, TRIES, 2)
        tokens = text_tokens[:, None].expand(-1, self.TRIES, -1)
        swapped = tokens.scatter(2, places, tokens.gather(2, places.flip(2)))   # (B, TRIES, L)
        pairs = self._pair(swapped)
        near = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
        possible = (self.pairs[near] == pairs).all(2) & (swapped != tokens).any(2)  # (B, TRIES)
        first = possible.float().argmax(1)[:, None, None].expand(-1, 1, text_tokens.shape[1])
        return swapped.gather(1, first).squeeze(1), possible.any(1).float()

    @staticmethod
    def _pair(tokens):
        """A number for each token and its neighbor on the right, (..., L - 1)."""
        return (tokens[..., :-1] << 16 | tokens[..., 1:]).contiguous()


class ClipLoss(nn.Module):
    """Symmetric contrastive loss over the pairs of all processes (Radford et al. 2021, fig. 3)."""

    def __init__(self, rank, world_size):
        super().__init__()
        self.loss = open_clip.ClipLoss(local_loss=world_size > 1, gather_with_grad=world_size > 1,
                                       rank=rank, world_size=world_size)

    def forward(self, image_embed, text_embed, logit_scale):
        return self.loss(image_embed, text_embed, logit_scale.clamp(max=100))


def load_clip(clip_model, clip_pretrained, device="cpu"):
    """FrozenClip of an open_clip model.

    clip_model: open_clip's name; not read for a file that `train_clip.py` wrote.
    clip_pretrained: open_clip's tag of published weights, or a file.
    Raises UserError on an unknown name or tag, a missing file, weights that do not fit.
    """
    if os.path.isfile(clip_pretrained):
        with rename_argument(path="clip_pretrained"):
            if read_export_header(clip_pretrained, kind=None) is not None:
                return _load_own_clip(clip_pretrained, device)
    elif os.sep in clip_pretrained or clip_pretrained.endswith((".pt", ".safetensors", ".bin")):
        raise UserError(f"no such file: {clip_pretrained}", "clip_pretrained")
    check_clip_name(clip_model, clip_pretrained)
    logging.disable(logging.WARNING)
    try:
        model = open_clip.create_model(clip_model, pretrained=clip_pretrained, device=device,
                                       force_preprocess_cfg=_find_preprocessing(clip_model)
                                       if os.path.isfile(clip_pretrained) else None)
    except Exception as error:
        raise UserError(f"could not load {clip_model} {clip_pretrained}: "
                        f"{str(error).splitlines()[0]}", "clip_pretrained") from error
    finally:
        logging.disable(logging.NOTSET)
    return FrozenClip(_freeze(model, device), open_clip.get_tokenizer(clip_model))


def check_clip_name(clip_model, clip_pretrained):
    """Raises UserError where open_clip does not know the model or the weights, where the model has
    a tokenizer of its own, or where its activation is not that of the weights, of which open_clip
    only warns. Loads nothing."""
    config = open_clip.get_model_config(clip_model)
    if config is None:
        raise UserError(f"open_clip knows no {clip_model!r}; "
                        "open_clip.list_models() names them", "clip_model")
    tokenizer = config["text_cfg"].get("hf_tokenizer_name")
    if tokenizer:
        raise UserError(f"{clip_model} has the tokenizer of {tokenizer}; only CLIPs "
                        "with CLIP's own tokenizer (start and end token) can be used", "clip_model")
    if os.path.isfile(clip_pretrained):
        return
    tags = open_clip.list_pretrained_tags_by_model(clip_model)
    if clip_pretrained not in tags:
        raise UserError(f"{clip_pretrained!r} is neither a file nor one of "
                        f"{clip_model}'s tags: {', '.join(tags) or 'it has none'}",
                        "clip_pretrained")
    wants_quick_gelu = open_clip.get_pretrained_cfg(clip_model, clip_pretrained).get("quick_gelu")
    if wants_quick_gelu and not config.get("quick_gelu"):
        raise UserError(f"the weights {clip_pretrained} of {clip_model} were trained "
                        f"with QuickGELU: name {clip_model}-quickgelu", "clip_model")


def _find_preprocessing(clip_model):
    """Mean, std, interpolation and resize mode that all published weights of a model share, for
    weights in a file, which brings none along; None where there are none, or not one alone."""
    found = [{key: open_clip.get_pretrained_cfg(clip_model, tag)[key]
              for key in ("mean", "std", "interpolation", "resize_mode")}
             for tag in open_clip.list_pretrained_tags_by_model(clip_model)]
    return found[0] if found and all(other == found[0] for other in found) else None


def _load_own_clip(path, device):
    header, state = load_export(path, kind="clip")
    with explain_damage(path):
        config = validate_config(config_from_dict(ClipConfig, header["config"]))
        model = load_network(lambda: build_clip(config), state)
    return FrozenClip(_freeze(model, device), build_tokenizer(config.context_length))


def _freeze(model, device):
    """`model` on `device`, for embedding alone: on a CPU with the channels of its kernels
    innermost, which makes a convolutional tower up to 2.5 times as fast."""
    model = model.to(device).requires_grad_(False)
    is_cpu = torch.device(device).type == "cpu"
    return model.to(memory_format=torch.channels_last) if is_cpu else model
