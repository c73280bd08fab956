"""A trained prior, decoder and their CLIP together: captions in, pictures out."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dalle2.clip import FrozenClip, compute_fingerprint, load_clip
from dalle2.config import PriorConfig, UnetConfig, UserError
from dalle2.models import load_decoder, load_prior
from dalle2.sampling import GROUP, SAMPLER, call_in_groups, sample_image_embed, sample_images


def add_checkpoint_flags(parser):
    """The flags that `load_pipeline` reads."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--prior_ckpt", default="output/prior/prior.safetensors",
                       help="what train_prior.py exported")
    group.add_argument("--decoder_ckpt", default="output/decoder/decoder.safetensors",
                       help="what train_decoder.py exported")
    group.add_argument("--clip_model", help="None: the CLIP that the checkpoints name")
    group.add_argument("--clip_pretrained", help="None: the CLIP that the checkpoints name")
    group.add_argument("--compile", action="store_true",
                       help="the networks by torch.compile, after a minute or two at the start")


@dataclass
class Pipeline:
    """What `load_pipeline` gives. Every method takes one seed a row, and a row depends on its own
    seed, caption or embedding alone: on a CPU to the last bit, on a GPU up to rounding."""

    clip: FrozenClip
    prior: torch.nn.Module
    prior_config: PriorConfig
    unets: list             # networks, first stage first
    unet_configs: list[UnetConfig]
    header: dict            # of the prior's export
    precision: str = "no"   # or "bf16", "fp16": what use_precision stands for

    @contextlib.contextmanager
    def use_precision(self):
        """Within it networks compute in `precision`, and CUDA's other matrix products in TF32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        before = torch.get_float32_matmul_precision()
        if self.clip.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            with torch.autocast(self.clip.device.type, dtype, enabled=dtype is not None):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def embed_captions(self, captions):
        """list of B strings -> text_embed (B, D), unit norm, and text_encodings (B, L, D), as the
        prior has been trained on them."""
        groups = [[caption] for caption in captions] if self.clip.device.type == "cpu" \
            else [captions]
        return tuple(map(torch.cat, zip(*map(self._embed_group, groups))))

    def _embed_group(self, captions):
        text_tokens = self.clip.tokenize(captions)
        text_embed, text_encodings = self.clip.embed_text(text_tokens)
        return text_embed, fit_text_encodings(text_encodings, text_tokens, self.clip,
                                              self.prior_config.max_text_len)

    def sample_image_embed(self, captions, seeds, *, prior_cond_scale=None, sample_timesteps=None,
                           num_candidates=None, sampler=SAMPLER):
        """image_embed (B, D), unit norm, that the prior draws for the captions."""
        def sample(text_embed, text_encodings, seeds):
            return sample_image_embed(self.prior, self.prior_config, text_embed, text_encodings,
                                      seeds.tolist(), cond_scale=prior_cond_scale,
                                      sample_timesteps=sample_timesteps,
                                      num_candidates=num_candidates, sampler=sampler)
        return call_in_groups(sample, GROUP, *self.embed_captions(captions), torch.tensor(seeds))

    def sample_images(self, image_embed, seeds, **options):
        """image (B, 3, H, W) in [0, 1] of image_embed (B, D); options: of
        `dalle2.sampling.sample_images`."""
        return sample_images(self.unets, self.unet_configs, image_embed, seeds, **options)

    def embed_images(self, images):
        """images (B, 3, H, W), float in [0, 1] or uint8 -> image_embed (B, D), unit norm."""
        return call_in_groups(self.clip.embed_image, 1, images)

    def resolve_timesteps(self, sample_timesteps):
        """[the prior's steps, each stage's] of what --sample_timesteps holds: one number for all, a
        number each, or None for the configs'. Raises UserError on another count, or more steps than
        were trained."""
        configs = [self.prior_config, *self.unet_configs]
        given = list(sample_timesteps or [None])
        given = given * len(configs) if len(given) == 1 else given
        if len(given) != len(configs):
            raise UserError(f"--sample_timesteps: one number, or {len(configs)}: the prior's and "
                            f"those of {len(self.unets)} stages")
        steps = [n or config.sample_timesteps for n, config in zip(given, configs)]
        for number, config in zip(steps, configs):
            if number > config.timesteps:
                raise UserError(f"--sample_timesteps: {number} is more than the "
                                f"{config.timesteps} of training")
        return steps

    def resolve_lowres_noise_level(self, lowres_noise_level):
        """[each upsampler's level] of --lowres_noise_level: one for all, or None for the configs'.
        Raises UserError on more noise than was trained with."""
        if lowres_noise_level is None:
            return [config.lowres_noise_level for config in self.unet_configs[1:]]
        for config in self.unet_configs[1:]:
            if lowres_noise_level > config.lowres_noise_max_level:
                raise UserError(f"--lowres_noise_level: {lowres_noise_level} is more than the "
                                f"{config.lowres_noise_max_level} of training")
        return [lowres_noise_level] * len(self.unet_configs[1:])


def load_pipeline(args, device, precision="no"):
    """The Pipeline that the flags of `add_checkpoint_flags` name, on `device`.

    Raises UserError, naming the flag, where a file is missing, is of another kind, or prior,
    decoder and CLIP do not belong together.
    """
    prior, prior_config, header = load_prior(args.prior_ckpt)
    unets, unet_configs, decoder_header = load_decoder(args.decoder_ckpt)
    missing = [n for n in range(1, len(decoder_header["stages"]) + 1) if n not in unets]
    if missing:
        raise UserError(f"--decoder_ckpt: stage {missing[0]} is not trained yet: "
                        f"sh scripts/train_decoder.sh --unet_number {missing[0]}")
    clip = load_matching_clip(args, header["clip"], decoder_header["clip"], device)
    networks = [prior.to(device), *(unets[n].to(device) for n in sorted(unets))]
    if args.compile:
        for network in networks:
            network.compile()
    return Pipeline(clip, prior, prior_config, networks[1:],
                    [unet_configs[n] for n in sorted(unet_configs)], header, precision)


def load_matching_clip(args, recorded, decoder_recorded, device):
    """The FrozenClip that both checkpoints were trained with; UserError where it is another."""
    if recorded["fingerprint"] != decoder_recorded["fingerprint"]:
        raise UserError("--decoder_ckpt: prior and decoder were trained with different CLIPs "
                        f"({recorded['clip_pretrained']} {recorded['fingerprint']}, "
                        f"{decoder_recorded['clip_pretrained']} {decoder_recorded['fingerprint']})")
    pretrained = args.clip_pretrained
    if pretrained is None:
        beside = Path(args.prior_ckpt).parent / recorded["relative_path"]
        use_beside = recorded["relative_path"] and beside.is_file()
        pretrained = os.path.normpath(beside) if use_beside else recorded["clip_pretrained"]
    clip = load_clip(args.clip_model or recorded["clip_model"], pretrained, device)
    fingerprint = compute_fingerprint(clip)
    if fingerprint != recorded["fingerprint"]:
        raise UserError(f"--clip_pretrained: {pretrained} ({fingerprint}) is not the CLIP that the "
                        f"checkpoints were trained with ({recorded['fingerprint']})")
    return clip


def fit_text_encodings(text_encodings, text_tokens, clip, max_text_len):
    """(B, L, D) -> (B, max_text_len, D), a longer caption keeping its end token: what
    Store.load_text_encodings does for training."""
    lengths = clip.compute_text_mask(text_tokens).sum(1)  # (B,)
    out = text_encodings[:, :max_text_len].clone()
    for i in (lengths > max_text_len).nonzero().flatten().tolist():
        out[i, -1] = text_encodings[i, lengths[i] - 1]
    return F.pad(out, (0, 0, 0, max_text_len - out.shape[1]))
