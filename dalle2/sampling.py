"""Sampling from the trained networks: a schedule of noise levels, a denoiser, a sampler; one stage
of the decoder; the cascade.

A sampler is a function over `denoise(x_t, level) -> x_start` and the levels that it walks down.
Noise comes from one seed a picture, so that a picture does not depend on the batch that it was
drawn in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dalle2.config import SAMPLER_NAMES, PriorConfig, UnetConfig
from dalle2.diffusion import Diffusion, build_diffusion, noise_lowres
from dalle2.images import resize
from dalle2.rng import derive_seed, draw_noise
from dalle2.rowwise import in_groups

GROUP = 4  # rows that a CPU computes together


@dataclass(frozen=True)
class SampleOptions:
    """How one network is sampled from. None: what its config says."""

    cond_scale: float | None = None        # guidance of the prior or the first stage, 1 is none
    sample_timesteps: int | None = None    # steps
    sampler: str = SAMPLER_NAMES[0]        # of SAMPLERS
    num_candidates: int | None = None      # embeddings that the prior samples a caption
    lowres_noise_level: int | None = None  # noise on the picture that a later stage enlarges
    thresholding: str = "static"           # of a stage's estimates, of THRESHOLDS

    def fill(self, config):
        """These options with the numbers of `config`, a PriorConfig or UnetConfig, where None."""
        names = [item.name for item in fields(self) if getattr(self, item.name) is None]
        return replace(self, **{name: getattr(config, name) for name in names
                                if hasattr(config, name)})


# ----------------------------------------------------------------------------------------------
# schedule

NOISE_ONLY = -5.0     # half log-SNR below which a picture's own part, exp(-5), is nothing


class Level(NamedTuple):
    """One level of noise: x_t = alpha x_start + sigma noise. The clean end has t = -1."""

    t: float      # the network's time; between the timesteps of training too
    alpha: float
    sigma: float


def compute_levels(diffusion, sample_timesteps, discrete_time=False):
    """The levels of a sampler: `sample_timesteps` of them from the last timestep of training to the
    first, and after them the clean picture.

    They are evenly spaced in half log-SNR, log(alpha / sigma) (Lu et al. 2022, arXiv 2206.00927,
    sec. 3.3), where detail of any size gets as many steps as any other; the first step takes all
    that is noisier than NOISE_ONLY. Between two timesteps of training the half log-SNR is
    interpolated linearly. discrete_time: for a network that knows whole timesteps alone. Levels are
    then rounded to them, and those that fall together are walked once.
    """
    table = diffusion.half_log_snr.numpy()  # (T,), falling
    every = np.arange(diffusion.timesteps)
    wanted = np.linspace(max(table[-1], NOISE_ONLY), table[0], sample_timesteps)
    times = np.interp(wanted, table[::-1], every[::-1])
    times[0] = every[-1]
    if discrete_time:
        times = np.unique(times.round().astype(int))[::-1]
    snr = np.exp(2 * np.interp(times, every, table))
    return [*map(Level, times.tolist(), np.sqrt(snr / (1 + snr)).tolist(),
                 np.sqrt(1 / (1 + snr)).tolist()), Level(-1, 1.0, 0.0)]


# ----------------------------------------------------------------------------------------------
# samplers: noise x_t (B, ...) of the first level -> x_start (B, ...); draw(step): fresh noise


def sample_ddim(denoise, x_t, levels, draw=None, eta=0.0):
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16. eta 0 is deterministic."""
    for step, (level, after) in enumerate(pairwise(levels)):
        x_start = denoise(x_t, level)
        noise = (x_t - level.alpha * x_start) / level.sigma
        fresh = eta * after.sigma / level.sigma * math.sqrt(
            max(0.0, 1 - (level.alpha / after.alpha) ** 2))
        x_t = after.alpha * x_start + math.sqrt(max(0.0, after.sigma ** 2 - fresh ** 2)) * noise
        if fresh:
            x_t = x_t + fresh * draw(step)
    return x_t


def sample_ddpm(denoise, x_t, levels, draw):
    """Ancestral sampling with the variance of the posterior (Ho et al. 2020, eq. 6 and 7), over the
    levels that are walked: DDIM with eta 1 (Song et al. 2021, sec. 4.1)."""
    return sample_ddim(denoise, x_t, levels, draw, eta=1.0)


def sample_dpmpp_2m(denoise, x_t, levels, draw=None):
    """DPM-Solver++(2M). Lu et al. 2022 (arXiv 2211.01095), algorithm 2; the first and the last step
    are first order."""
    previous, previous_h = None, None
    for level, after in pairwise(levels):
        x_start = denoise(x_t, level)
        if after.sigma == 0:
            x_t = x_start
            break
        ratio = (after.sigma * level.alpha) / (level.sigma * after.alpha)  # exp(-h)
        h = -math.log(ratio)  # the step in log(alpha / sigma)
        direction = x_start
        if previous is not None:
            direction = x_start + (x_start - previous) * h / (2 * previous_h)
        x_t = after.sigma / level.sigma * x_t + after.alpha * (1 - ratio) * direction
        previous, previous_h = x_start, h
    return x_t


SAMPLERS = dict(zip(SAMPLER_NAMES, (sample_dpmpp_2m, sample_ddim, sample_ddpm), strict=True))


# ----------------------------------------------------------------------------------------------
# denoisers


def repeat_guided(cond_scale, *tensors):
    """The rows that guidance computes of tensors (B, ...): each with its condition kept and, below
    them all, once more with it dropped. A scale of 1 is no guidance and adds none. Returns (drop,
    *tensors): 0 or 1 a row, and the repeated ones."""
    count = 1 if cond_scale == 1 else 2
    drop = torch.arange(count, device=tensors[0].device).repeat_interleave(len(tensors[0])).float()
    return drop, *(torch.cat([tensor] * count) for tensor in tensors)


def guide(prediction, cond_scale):
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6) of what a network predicts for the
    rows of `repeat_guided`."""
    if cond_scale == 1:
        return prediction
    kept, dropped = prediction.chunk(2)
    return dropped + (kept - dropped) * cond_scale


def build_prior_denoiser(prior, text_embed, text_encodings, cond_scale, num_candidates=1):
    """denoise(x_t, level) of the prior for text_embed (B, D) and text_encodings (B, L, D), guided;
    x_t (B num_candidates, D): those of one caption in succession."""
    drop, text_embed, text_encodings = repeat_guided(cond_scale, text_embed, text_encodings)
    prefix = prior.read_text(text_embed, text_encodings, drop).repeat_rows(num_candidates)

    def denoise(x_t, level):
        t = torch.full((len(x_t),), level.t, device=x_t.device)
        _, rows, t = repeat_guided(cond_scale, x_t, t)
        return guide(prior(rows, t, prefix=prefix), cond_scale)
    return denoise


def build_denoiser(unet, config, condition, cond_scale=1.0, thresholding="static"):
    """denoise(x_t, level) of one stage of the decoder. condition: {argument of the network: tensor
    (B, ...)}, "image_embed" (B, D) of the first stage, which alone is guided, or what
    `condition_upsampler` gives."""
    diffusion = build_diffusion(config, "cpu")
    if "image_embed" in condition:
        drop, image_embed = repeat_guided(cond_scale, condition["image_embed"])
        condition = {"image_embed": image_embed, "image_cond_drop_prob": drop}
    else:
        cond_scale = 1.0

    def denoise(x_t, level):
        t = torch.full((len(x_t),), level.t, device=x_t.device)
        _, rows, t = repeat_guided(cond_scale, x_t, t)
        prediction = guide(unet(rows, t, **condition), cond_scale).float()
        x_start = diffusion.to_x_start(prediction, x_t, level.alpha, level.sigma)
        return threshold(x_start, thresholding)
    return denoise


def condition_upsampler(image, image_size, lowres_noise_level, noise):
    """What a later stage is conditioned on: image (B, 3, h, w) in [0, 1], the one before, enlarged
    and noised to lowres_noise_level with noise (B, 3, H, W)."""
    level = torch.full((len(image),), lowres_noise_level, device=image.device)
    lowres, level = noise_lowres(resize(image, image_size) * 2 - 1, level, noise)
    return {"lowres_cond_img": lowres, "lowres_noise_level": level}


def threshold(x_start, kind):
    """Brings x_start (B, 3, H, W) into [-1, 1]: "static" clamps; "dynamic" (Saharia et al. 2022,
    sec. 2.3) first divides by the 99.5th percentile of a picture's absolute values, if above 1."""
    if kind == "dynamic":
        scale = x_start.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)
        x_start = x_start / scale.view(-1, 1, 1, 1)
    return x_start.clamp(-1, 1)


# ----------------------------------------------------------------------------------------------
# prior and decoder


@torch.no_grad()
def sample_image_embed(prior, config, text_embed, text_encodings, seeds, options=SampleOptions()):
    """image_embed (B, D), unit norm, for text_embed (B, D) and text_encodings (B, L, D): of each
    row's candidates the one nearest to its text_embed (Ramesh et al. 2022, sec. 2.2).

    prior, config: network and PriorConfig; seeds: one int a row.
    """
    options = options.fill(config)
    count = options.num_candidates
    seeds = [derive_seed(seed, "candidate", number) if number else seed
             for seed in seeds for number in range(count)]
    draw = partial(draw_part, seeds, text_embed.shape[-1:], text_embed.device, "prior")
    denoise = build_prior_denoiser(prior, text_embed, text_encodings, options.cond_scale, count)
    levels = compute_levels(Diffusion(config.timesteps, config.beta_schedule),
                            options.sample_timesteps, config.discrete_time)
    embed = SAMPLERS[options.sampler](denoise, draw(), levels, draw)
    embed = F.normalize(embed, dim=-1).unflatten(0, (-1, count))  # (B, count, D)
    nearest = (embed * text_embed[:, None]).sum(-1).argmax(-1)    # (B,)
    return embed[torch.arange(len(embed), device=embed.device), nearest]


@dataclass(frozen=True)
class Prior:
    """The prior's network, and what it was trained with."""

    network: Callable
    config: PriorConfig

    def sample(self, text_embed, text_encodings, seeds, options=SampleOptions()):
        """`sample_image_embed`; on a CPU a row depends on its own text and seed to the last bit."""
        sample = partial(sample_image_embed, self.network, self.config)
        return in_groups(sample, GROUP)(text_embed, text_encodings, seeds, options=options)


@dataclass(frozen=True)
class Stage:
    """One stage of the decoder."""

    unet: Callable
    config: UnetConfig
    unet_number: int  # 1-based

    def sample(self, condition, seeds, options=SampleOptions()):
        """`sample_stage`; on a CPU a row depends on its own condition and seed to the last bit."""
        size = GROUP if self.unet_number == 1 else 1
        return in_groups(partial(sample_stage, self), size)(condition, seeds, options=options)


def build_stages(unets, configs):
    """The Stages of a decoder's networks and UnetConfigs, first stage first."""
    return [Stage(unet, config, number)
            for number, (unet, config) in enumerate(zip(unets, configs), start=1)]


def sample_images(stages, image_embed, seeds, options=SampleOptions()):
    """image (B, 3, H, W) in [0, 1] for image_embed (B, D), unit norm, through all stages. seeds:
    one int a picture; options: of all stages, or a list, one a stage."""
    if isinstance(options, SampleOptions):
        options = [options] * len(stages)
    condition = image_embed
    for stage, own in zip(stages, options, strict=True):
        condition = stage.sample(condition, seeds, own)
    return condition


@torch.no_grad()
def sample_stage(stage, condition, seeds, options):
    """image (B, 3, H, W) in [0, 1] of one Stage. condition: image_embed (B, D), unit norm, of the
    first; image (B, 3, h, w) in [0, 1], the one before, of a later stage; seeds: one int a row."""
    config, number, options = stage.config, stage.unet_number, options.fill(stage.config)
    draw = partial(draw_part, seeds, (3, config.image_size, config.image_size), condition.device)
    condition = {"image_embed": condition} if number == 1 else condition_upsampler(
        condition, config.image_size, options.lowres_noise_level, draw("lowres", number))
    denoise = build_denoiser(stage.unet, config, condition, options.cond_scale,
                             options.thresholding)
    levels = compute_levels(build_diffusion(config, "cpu"), options.sample_timesteps)
    x_start = SAMPLERS[options.sampler](denoise, draw("unet", number), levels,
                                        partial(draw, "unet", number))
    return (x_start.clamp(-1, 1) + 1) / 2


def draw_part(seeds, shape, device, *part):
    """Standard normal (B, *shape) for one part of the drawing; row i depends on seeds[i] alone."""
    return draw_noise([derive_seed(seed, *part) for seed in seeds], shape, device)
