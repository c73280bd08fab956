"""A trained prior, decoder and their CLIP together: captions in, pictures out."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch

from dalle2.clip import FrozenClip, load_clip
from dalle2.data import fit_text_encodings
from dalle2.errors import UserError, rename_argument
from dalle2.files import compute_digest
from dalle2.models import load_decoder, load_prior
from dalle2.rowwise import in_groups
from dalle2.sampling import Prior, SampleOptions, Stage, build_stages, sample_images


class Sample(NamedTuple):
    """Pictures and what they were drawn from: row by row, one a caption."""

    image: torch.Tensor        # (B, 3, H, W) in [0, 1]
    image_embed: torch.Tensor  # (B, D), unit norm
    text_embed: torch.Tensor   # (B, D), unit norm


@dataclass
class Pipeline:
    """What `load_pipeline` gives. A row that its functions return depends on its own seed, caption,
    picture or embedding alone: on a CPU to the last bit, with as many threads (which share out
    sums), on a GPU up to rounding."""

    clip: FrozenClip
    embed_text: Callable    # text_tokens (B, L) -> text_embed (B, D), text_encodings (B, L, D)
    embed_images: Callable  # (B, 3, H, W), float in [0, 1] or uint8 -> image_embed (B, D)
    prior: Prior
    stages: list[Stage]     # of the decoder, first stage first
    header: dict            # of the prior's export
    files: dict             # {"prior": path, "decoder": path}
    clip_path: str = ""     # of the CLIP where it is a file
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
        return self.embed_text(self.clip.tokenize(captions).to(self.clip.device))

    def sample(self, captions, seeds, options, images=None):
        """The Sample of B captions, one int of `seeds` each. options: of `resolve_options`;
        images (B, 3, H, W): pictures whose embeddings are drawn from in place of the prior's."""
        text_embed, text_encodings = self.embed_captions(captions)
        image_embed = self.embed_images(images) if images is not None else \
            self.prior.sample(text_embed, text_encodings, seeds, options[0])
        image = sample_images(self.stages, image_embed, seeds, options[1:])
        return Sample(image, image_embed, text_embed)

    def resolve_options(self, *, cond_scale=None, prior_cond_scale=None, sample_timesteps=None,
                        lowres_noise_level=None, **options):
        """[SampleOptions of the prior, and of each stage], the configs' numbers in place of None.

        cond_scale: of the decoder; sample_timesteps: one number for all, or the prior's and each
        stage's; options: SampleOptions' further fields. Raises UserError on another count of
        sample_timesteps, or on more steps or noise than were trained with.
        """
        configs = [self.prior.config, *(stage.config for stage in self.stages)]
        steps = list(sample_timesteps or [None])
        steps = steps * len(configs) if len(steps) == 1 else steps
        if len(steps) != len(configs):
            raise UserError(f"one number, or {len(configs)}: the prior's and "
                            f"those of {len(self.stages)} stages", "sample_timesteps")
        scales = [prior_cond_scale, *[cond_scale] * len(self.stages)]
        filled = [SampleOptions(cond_scale=scale, sample_timesteps=n, **options,
                                lowres_noise_level=lowres_noise_level).fill(config)
                  for scale, n, config in zip(scales, steps, configs)]
        for own, config in zip(filled, configs):
            check_most(own.sample_timesteps, config.timesteps, "sample_timesteps")
        for own, config in zip(filled[2:], configs[2:]):
            if lowres_noise_level is not None:
                check_most(own.lowres_noise_level, config.lowres_noise_max_level,
                           "lowres_noise_level")
        return filled

    @cached_property
    def digests(self):
        return {f"{name}_sha256": compute_digest(path) for name, path in self.files.items()}

    def describe_settings(self, options):
        """What a picture depends on besides its caption and seed, as JSON: the checkpoints, their
        CLIP, the precision, and options of `resolve_options`."""
        prior, first, *later = options
        return {"cond_scale": first.cond_scale, "prior_cond_scale": prior.cond_scale,
                "sample_timesteps": [own.sample_timesteps for own in options],
                "sampler": first.sampler, "num_candidates": prior.num_candidates,
                "lowres_noise_level": [own.lowres_noise_level for own in later],
                "thresholding": first.thresholding, **self.digests, "clip": self.header["clip"],
                "mixed_precision": self.precision}


def check_most(number, most, name):
    """Raises UserError, naming the argument, where `number` is more than was trained with."""
    if number > most:
        raise UserError(f"{number} is more than the {most} of training", name)


def load_pipeline(args, device, precision="no"):
    """The Pipeline that the flags of `cli.add_checkpoint_flags` name, on `device`.

    Raises UserError, naming the flag, where a file is missing, is of another kind, or prior,
    decoder and CLIP do not belong together.
    """
    if getattr(args, "model", None):
        folder = find_model(args.model)
        args.prior_ckpt, args.decoder_ckpt = (str(folder / f"{name}.safetensors")
                                              for name in ("prior", "decoder"))
    with rename_argument(path="prior_ckpt"):
        prior, prior_config, header = load_prior(args.prior_ckpt)
    with rename_argument(path="decoder_ckpt"):
        unets, unet_configs, decoder_header = load_decoder(args.decoder_ckpt)
    missing = [n for n in range(1, len(decoder_header["stages"]) + 1) if n not in unets]
    if missing:
        raise UserError(f"stage {missing[0]} is not trained yet: "
                        f"sh scripts/train_decoder.sh --unet_number {missing[0]}", "decoder_ckpt")
    clip, clip_path = load_matching_clip(args, header["clip"], decoder_header["clip"], device)
    for network in (prior, *unets.values()):
        network.to(device)
        if args.compile:
            network.compile()
    return Pipeline(
        clip, in_groups(partial(embed_text, clip, prior_config.max_text_len), 1),
        in_groups(clip.embed_image, 1), Prior(prior, prior_config),
        build_stages(unets.values(), unet_configs.values()), header,
        {"prior": args.prior_ckpt, "decoder": args.decoder_ckpt}, clip_path, precision)


def find_model(model):
    """The folder of --model, downloaded where it is the name of a model on the hub."""
    if os.path.isdir(model):
        return Path(model)
    try:
        return Path(huggingface_hub.snapshot_download(model))
    except (OSError, ValueError) as error:  # huggingface_hub's own are among them
        raise UserError(f"{model} is neither a folder nor a model that could be downloaded "
                        f"({str(error).splitlines()[0]:.200})", "model") from error


def load_matching_clip(args, recorded, decoder_recorded, device):
    """(the FrozenClip that both checkpoints were trained with, its path if it is a file);
    UserError where it is another."""
    if recorded["fingerprint"] != decoder_recorded["fingerprint"]:
        raise UserError("prior and decoder were trained with different CLIPs "
                        f"({recorded['clip_pretrained']} {recorded['fingerprint']}, "
                        f"{decoder_recorded['clip_pretrained']} {decoder_recorded['fingerprint']})",
                        "decoder_ckpt")
    pretrained = args.clip_pretrained
    if pretrained is None:
        beside = Path(args.prior_ckpt).parent / recorded["relative_path"]
        use_beside = recorded["relative_path"] and beside.is_file()
        pretrained = os.path.normpath(beside) if use_beside else recorded["clip_pretrained"]
    clip = load_clip(args.clip_model or recorded["clip_model"], pretrained, device)
    if clip.fingerprint != recorded["fingerprint"]:
        raise UserError(f"{pretrained} ({clip.fingerprint}) is not the CLIP that the "
                        f"checkpoints were trained with ({recorded['fingerprint']})",
                        "clip_pretrained")
    return clip, pretrained if os.path.isfile(pretrained) else ""


def embed_text(clip, max_text_len, text_tokens):
    """text_tokens (B, L) -> text_embed (B, D) and text_encodings (B, max_text_len, D)."""
    text_embed, encodings = clip.embed_text(text_tokens)
    text_encodings = encodings.new_zeros(len(encodings), max_text_len, encodings.shape[-1])
    lengths = clip.compute_text_mask(text_tokens).sum(1).tolist()
    for row, encoding, length in zip(text_encodings, encodings, lengths):
        fit_text_encodings(encoding[:length], row)
    return text_embed, text_encodings
