"""Sampling from the trained networks: a schedule of noise levels, a denoiser, a sampler; guidance;
prior and cascade.

A sampler is a function over `denoise(x_t, level) -> x_start` and the levels that it walks down.
Noise comes from one seed a picture, so that a picture does not depend on the batch that it was
drawn in.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dalle2.data import resize
from dalle2.diffusion import Diffusion, build_diffusion, noise_lowres
from dalle2.rng import derive_seed, draw_noise

SAMPLER = "dpmpp_2m"  # the default: benchmarks/RESULTS.md, "Samplers"

GROUP = 4             # rows that a CPU computes together


# ----------------------------------------------------------------------------------------------
# schedule

NOISE_ONLY = -5.0     # half log-SNR below which a picture's own part, exp(-5), is nothing


class Level(NamedTuple):
    """One level of noise: x_t = alpha x_start + sigma noise. The clean end has t = -1."""

    t: float      # what the network is told; between the timesteps of training too
    alpha: float
    sigma: float


def compute_levels(diffusion, sample_timesteps, discrete_time=False):
    """The levels of a sampler: `sample_timesteps` of them from the last timestep of training to the
    first, and after them the clean picture.

    They are evenly spaced in half log-SNR, log(alpha / sigma) (Lu et al. 2022, arXiv 2206.00927,
    sec. 3.4), where detail of any size gets as many steps as any other; the first step takes all
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


SAMPLERS = {"ddim": sample_ddim, "ddpm": sample_ddpm, "dpmpp_2m": sample_dpmpp_2m}


def invert_ddim(denoise, x_start, levels):
    """The noise of the first level from which DDIM draws x_start (B, ...), about: its steps walked
    backwards. Ramesh et al. 2022, sec. 3.1; Dhariwal and Nichol 2021, appendix F."""
    x_t = x_start  # taken for the least noisy level's
    for after, level in pairwise(reversed(levels[:-1])):
        x_start = denoise(x_t, after)
        noise = (x_t - after.alpha * x_start) / after.sigma
        x_t = level.alpha * x_start + level.sigma * noise
    return x_t


def threshold(x_start, kind):
    """Brings x_start (B, 3, H, W) into [-1, 1]: "static" clamps; "dynamic" (Saharia et al. 2022,
    sec. 2.3) first divides by the 99.5th percentile of a picture's absolute values, if above 1."""
    if kind == "dynamic":
        scale = x_start.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)
        x_start = x_start / scale.view(-1, 1, 1, 1)
    return x_start.clamp(-1, 1)


THRESHOLDS = "static", "dynamic"


def guide(predict, cond_scale):
    """Classifier-free guidance (Ho and Salimans 2022): `predict(x_t, t, drop)` with the condition
    kept (drop 0) and dropped (drop 1) in one batch. A scale of 1 costs nothing."""
    if cond_scale == 1:
        return lambda x_t, t: predict(x_t, t, torch.zeros(len(x_t), device=x_t.device))

    def guided(x_t, t):
        drop = torch.arange(2, device=x_t.device).repeat_interleave(len(x_t)).float()  # (2B,)
        kept, dropped = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), drop).chunk(2)
        return dropped + (kept - dropped) * cond_scale
    return guided


# ----------------------------------------------------------------------------------------------
# prior and decoder


@torch.no_grad()
def sample_image_embed(prior, config, text_embed, text_encodings, seeds, *, cond_scale=None,
                       sample_timesteps=None, num_candidates=None, sampler=SAMPLER):
    """image_embed (B, D), unit norm, for text_embed (B, D) and text_encodings (B, L, D): of each
    row's candidates the one nearest to its text_embed (Ramesh et al. 2022, sec. 2.2).

    prior, config: network and PriorConfig; seeds: one int a row; cond_scale, sample_timesteps,
    num_candidates: None is the config's; sampler: a name of SAMPLERS.
    """
    cond_scale = config.cond_scale if cond_scale is None else cond_scale
    count = num_candidates or config.num_candidates
    device, shape = text_embed.device, text_embed.shape[-1:]
    seeds = [derive_seed(seed, "candidate", number) if number else seed
             for seed in seeds for number in range(count)]
    embed = SAMPLERS[sampler](
        build_prior_denoiser(prior, text_embed, text_encodings, cond_scale, count),
        draw_part(seeds, shape, device, "prior"),
        compute_levels(Diffusion(config.timesteps, config.beta_schedule),
                       sample_timesteps or config.sample_timesteps, config.discrete_time),
        lambda step: draw_part(seeds, shape, device, "prior", step))
    embed = F.normalize(embed, dim=-1).unflatten(0, (-1, count))  # (B, count, D)
    nearest = (embed * text_embed[:, None]).sum(-1).argmax(-1)    # (B,)
    return embed[torch.arange(len(embed), device=device), nearest]


def build_prior_denoiser(prior, text_embed, text_encodings, cond_scale, num_candidates=1):
    """denoise(x_t, level) of the prior for text_embed (B, D) and text_encodings (B, L, D), guided;
    x_t (B num_candidates, D): those of one caption in succession."""
    drop = torch.zeros(len(text_embed), device=text_embed.device)  # as `guide` orders them
    if cond_scale != 1:
        text_embed, text_encodings = text_embed.repeat(2, 1), text_encodings.repeat(2, 1, 1)
        drop = torch.cat([drop, drop + 1])
    prefix = prior.read_text(text_embed, text_encodings, drop).repeat_rows(num_candidates)
    guided = guide(lambda x_t, t, drop: prior(x_t, t, prefix=prefix), cond_scale)
    return lambda x_t, level: guided(x_t, torch.full((len(x_t),), level.t, device=x_t.device))


@torch.no_grad()
def sample_images(unets, configs, image_embed, seeds, *, cond_scale=None, sample_timesteps=None,
                  sampler=SAMPLER, eta=0.0, thresholding="static", lowres_noise_level=None,
                  noise=None):
    """image (B, 3, H, W) in [0, 1] for image_embed (B, D), unit norm, through all stages.

    unets, configs: the networks and UnetConfigs, first stage first; seeds: one int a picture;
    cond_scale: guidance of the first stage; sample_timesteps, sampler (of SAMPLERS): of every
    stage, or a list, one a stage; lowres_noise_level: of every later stage, or a list; None: the
    config's. thresholding: of THRESHOLDS; eta, noise (B, 3, h, w): of "ddim" in the first stage,
    and what it begins from in place of the seeds'.
    """
    image, device = None, image_embed.device
    options = zip(unets, configs, spread(sample_timesteps, len(unets)), spread(sampler, len(unets)),
                  [None, *spread(lowres_noise_level, len(unets) - 1)], strict=True)
    for number, (unet, config, steps, sampler, lowres_level) in enumerate(options, start=1):
        shape = 3, config.image_size, config.image_size
        if number == 1:
            denoise = build_denoiser(unet, config, image_embed, cond_scale, thresholding)
        else:
            denoise = build_upsampler(unet, config, image, draw_part(seeds, shape, device, "lowres",
                                                                     number), thresholding,
                                      lowres_level)
        x_t = noise if number == 1 and noise is not None else \
            draw_part(seeds, shape, device, "unet", number)
        sample = partial(sample_ddim, eta=eta) if number == 1 and sampler == "ddim" \
            else SAMPLERS[sampler]
        levels = compute_levels(build_diffusion(config, "cpu"), steps or config.sample_timesteps)
        x_start = sample(denoise, x_t, levels,
                         lambda step: draw_part(seeds, shape, device, "unet", number, step))
        image = (x_start.clamp(-1, 1) + 1) / 2
    return image


def build_denoiser(unet, config, image_embed, cond_scale=None, thresholding="static"):
    """denoise(x_t, level) of the first stage for image_embed (B, D), guided."""
    scale = config.cond_scale if cond_scale is None else cond_scale
    diffusion = build_diffusion(config, "cpu")

    def predict(x_t, t, embed):
        embed = embed if scale == 1 else embed.repeat(2, 1)
        return guide(lambda x_t, t, drop: unet(x_t, t, image_embed=embed,
                                               image_cond_drop_prob=drop), scale)(x_t, t)

    def denoise(x_t, level):
        t = torch.full((len(x_t),), level.t, device=x_t.device)
        prediction = call_in_groups(predict, GROUP, x_t, t, image_embed).float()
        return threshold(diffusion.to_x_start(prediction, x_t, level.alpha, level.sigma),
                         thresholding)
    return denoise


def build_upsampler(unet, config, image, noise, thresholding="static", lowres_noise_level=None):
    """denoise(x_t, level) of a later stage for image (B, 3, h, w) in [0, 1], the one before; noise
    (B, 3, H, W) for its augmentation, to lowres_noise_level (None: the config's). Nothing to drop,
    so never guided."""
    diffusion = build_diffusion(config, "cpu")
    augment = config.lowres_noise_level if lowres_noise_level is None else lowres_noise_level
    condition = noise_lowres(resize(image, config.image_size) * 2 - 1,
                             torch.full((len(image),), augment, device=image.device), noise)

    def predict(x_t, t, lowres, level):
        return unet(x_t, t, lowres_cond_img=lowres, lowres_noise_level=level)

    def denoise(x_t, level):
        t = torch.full((len(x_t),), level.t, device=x_t.device)
        prediction = call_in_groups(predict, 1, x_t, t, *condition).float()
        return threshold(diffusion.to_x_start(prediction, x_t, level.alpha, level.sigma),
                         thresholding)
    return denoise


def spread(value, count):
    """A list of one value a stage as it is; a single value `count` times."""
    return value if isinstance(value, (tuple, list)) else [value] * count


def call_in_groups(function, size, *tensors):
    """`function` of all tensors (B, ...); on a CPU of `size` rows at a time, the last group filled
    up with copies of its first row: what comes out for a row is then the same to the last bit
    whatever the others are and however many. No slower there: its caches hold one picture of 256 px
    (twice as fast as 16 at a time) and a few of 64."""
    if tensors[0].device.type != "cpu":
        return function(*tensors)
    out = []
    for parts in zip(*(tensor.split(size) for tensor in tensors)):
        rows = [0] * size
        rows[:len(parts[0])] = range(len(parts[0]))
        out.append(function(*(part[rows] for part in parts))[:len(parts[0])])
    return torch.cat(out)


def draw_part(seeds, shape, device, *part):
    """Standard normal (B, *shape) for one part of the drawing; row i depends on seeds[i] alone."""
    return draw_noise([derive_seed(seed, *part) for seed in seeds], shape, device)
