"""Drawing from the trained networks: timestep spacing, DDIM, DPM-Solver++, guidance, the cascade.

A sampler is a function over `denoise(x_t, t) -> x_start`. Noise comes from one seed a picture, so
that a picture does not depend on the batch that it was drawn in.
"""

import torch
import torch.nn.functional as F

from dalle2.data import resize
from dalle2.diffusion import Diffusion
from dalle2.rng import derive_seed, draw_noise


def compute_sample_times(timesteps, sample_timesteps):
    """list of int, falling from the last training timestep to 0, evenly spaced."""
    if sample_timesteps == 1:
        return [timesteps - 1]
    return torch.linspace(timesteps - 1, 0, sample_timesteps).round().long().tolist()


def _walk(denoise, x_t, diffusion, sample_timesteps):
    """Yields (x_start, alpha, sigma, next alpha, next sigma) a step and takes x_t back by send();
    after the last timestep comes the clean picture: alpha 1, sigma 0."""
    times = compute_sample_times(diffusion.timesteps, sample_timesteps)
    levels = [(diffusion.alpha[t].item(), diffusion.sigma[t].item()) for t in times] + [(1.0, 0.0)]
    for i, t in enumerate(times):
        x_start = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
        x_t = yield x_t, x_start, *levels[i], *levels[i + 1]


def sample_ddim(denoise, x_t, diffusion, sample_timesteps):
    """x_start (B, ...) from noise x_t, deterministically. Song et al. 2021 (arXiv 2010.02502),
    eq. 12 with sigma 0."""
    walk = _walk(denoise, x_t, diffusion, sample_timesteps)
    step = next(walk)
    while True:
        x_t, x_start, alpha, sigma, next_alpha, next_sigma = step
        noise = (x_t - alpha * x_start) / sigma
        x_t = next_alpha * x_start + next_sigma * noise
        try:
            step = walk.send(x_t)
        except StopIteration:
            return x_t


def sample_dpmpp_2m(denoise, x_t, diffusion, sample_timesteps):
    """x_start (B, ...) from noise x_t by DPM-Solver++(2M). Lu et al. 2022 (arXiv 2211.01095),
    algorithm 2; the last step is first order."""
    walk = _walk(denoise, x_t, diffusion, sample_timesteps)
    step, previous, previous_h = next(walk), None, None
    while True:
        x_t, x_start, alpha, sigma, next_alpha, next_sigma = step
        if next_sigma == 0:
            return x_start
        ratio = (next_sigma * alpha) / (sigma * next_alpha)  # exp(-h), h the step in log-SNR / 2
        h = -torch.tensor(ratio).log().item()
        direction = x_start
        if previous is not None:
            direction = x_start + (x_start - previous) * h / (2 * previous_h)
        x_t = next_sigma / sigma * x_t + next_alpha * (1 - ratio) * direction
        previous, previous_h = x_start, h
        step = walk.send(x_t)


SAMPLERS = {"ddim": sample_ddim, "dpmpp_2m": sample_dpmpp_2m}


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


@torch.no_grad()
def sample_image_embed(prior, config, text_embed, text_encodings, seeds, *, cond_scale=None,
                       sample_timesteps=None, sampler="dpmpp_2m"):
    """image_embed (B, D), unit norm, for text_embed (B, D) and text_encodings (B, L, D).

    prior, config: network and PriorConfig; seeds: one int a row; cond_scale, sample_timesteps: None
    is the config's.
    """
    cond_scale = config.cond_scale if cond_scale is None else cond_scale
    device, dim = text_embed.device, text_embed.shape[-1]
    diffusion = Diffusion(config.timesteps, config.beta_schedule, predict_x_start=True,
                          device=device)
    times = 1 if cond_scale == 1 else 2
    text_embed, text_encodings = text_embed.repeat(times, 1), text_encodings.repeat(times, 1, 1)

    def predict(x_t, t, drop):
        return prior(x_t, t, text_embed=text_embed, text_encodings=text_encodings,
                     text_cond_drop_prob=drop)

    guided = guide(predict, cond_scale)
    x_t = draw_noise([derive_seed(seed, "prior") for seed in seeds], (dim,), device)
    embed = SAMPLERS[sampler](guided, x_t, diffusion, sample_timesteps or config.sample_timesteps)
    return F.normalize(embed, dim=-1)


@torch.no_grad()
def sample_images(unets, configs, image_embed, seeds, *, cond_scale=None, sample_timesteps=None,
                  sampler="dpmpp_2m"):
    """image (B, 3, H, W) in [0, 1] for image_embed (B, D), unit norm, through all stages.

    unets, configs: the networks and UnetConfigs, first stage first; seeds: one int a picture;
    cond_scale: guidance of the first stage; sample_timesteps: of every stage; None: the config's.
    """
    image = None
    for number, (unet, config) in enumerate(zip(unets, configs, strict=True), start=1):
        diffusion = build_diffusion(config, image_embed.device)
        x_t = draw_noise([derive_seed(seed, "unet", number) for seed in seeds],
                         (3, config.image_size, config.image_size), image_embed.device)
        if number == 1:
            scale = config.cond_scale if cond_scale is None else cond_scale
            embeds = image_embed if scale == 1 else image_embed.repeat(2, 1)
            predict = guide(lambda x, t, drop: unet(x, t, image_embed=embeds,
                                                    image_cond_drop_prob=drop), scale)
        else:
            lowres, level = noise_lowres(
                resize(image, config.image_size) * 2 - 1,
                torch.full((len(seeds),), config.lowres_noise_level, device=image.device),
                draw_noise([derive_seed(seed, "lowres", number) for seed in seeds],
                           x_t.shape[1:], image.device))
            # one at a time on a CPU, whose caches hold one picture of 256 px: twice as fast there
            rows = 1 if image.device.type == "cpu" else len(seeds)
            predict = lambda x, t: torch.cat([  # noqa: E731
                unet(x_part, t_part, image_embed=None, lowres_cond_img=lowres_part,
                     lowres_noise_level=level_part)
                for x_part, t_part, lowres_part, level_part in zip(*(
                    tensor.split(rows) for tensor in (x, t, lowres, level)))])

        def denoise(x_t, t):
            return diffusion.to_x_start(predict(x_t, t).float(), x_t, t).clamp(-1, 1)

        x_start = SAMPLERS[sampler](denoise, x_t, diffusion,
                                    sample_timesteps or config.sample_timesteps)
        image = (x_start.clamp(-1, 1) + 1) / 2
    return image


def build_diffusion(config, device):
    """The process of one decoder stage, from its UnetConfig."""
    return Diffusion(config.timesteps, config.beta_schedule, config.predict_v,
                     config.predict_x_start, config.min_snr_gamma, device)


def noise_lowres(lowres_cond_img, level, noise):
    """Noise conditioning augmentation (Saharia et al. 2022, sec. 2.4), as dalle2-pytorch does it:
    the conditioning picture (B, 3, H, W) in [-1, 1], noised to timestep `level` (B,) of a linear
    schedule of 1000. Returns it with `level`."""
    diffusion = Diffusion(1000, "linear", device=lowres_cond_img.device)
    return diffusion.q_sample(lowres_cond_img, level, noise), level
