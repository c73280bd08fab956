"""The diffusion process that prior and decoder share: schedules, noising, targets, loss weights.

Ho et al. 2020 (arXiv 2006.11239); cosine schedule: Nichol and Dhariwal 2021 (arXiv 2102.09672),
eq. 17; v: Salimans and Ho 2022 (arXiv 2202.00512), appendix D. The schedules are those of
dalle2-pytorch, so that its samplers run our networks.
"""

import math
from functools import lru_cache

import torch


def compute_betas(beta_schedule, timesteps):
    """(T,) float64 variances of "cosine" or "linear"."""
    if beta_schedule == "linear":
        scale = 1000 / timesteps
        return torch.linspace(scale * 1e-4, scale * 2e-2, timesteps, dtype=torch.float64)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)


class Diffusion:
    """One process. x_t = alpha_t x_start + sigma_t noise, with alpha^2 + sigma^2 = 1.

    predict_v, predict_x_start: what the network predicts; neither: the noise.
    """

    def __init__(self, timesteps=1000, beta_schedule="cosine", predict_v=False,
                 predict_x_start=False, min_snr_gamma=0.0, device="cpu"):
        alphas_cumprod = (1 - compute_betas(beta_schedule, timesteps)).cumprod(0)
        self.timesteps, self.predict_v, self.predict_x_start = timesteps, predict_v, predict_x_start
        self.min_snr_gamma = min_snr_gamma
        self.alpha = alphas_cumprod.sqrt().float().to(device)        # (T,)
        self.sigma = (1 - alphas_cumprod).sqrt().float().to(device)  # (T,)
        self.half_log_snr = alphas_cumprod.logit() / 2  # (T,) log(alpha / sigma), falling with t

    def coefficients(self, t, like):
        """alpha_t and sigma_t for t (B,), shaped to multiply `like` (B, ...)."""
        shape = (-1, *(1,) * (like.ndim - 1))
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def q_sample(self, x_start, t, noise):
        """x_t, shaped like x_start."""
        alpha, sigma = self.coefficients(t, x_start)
        return alpha * x_start + sigma * noise

    def target(self, x_start, t, noise):
        """What the network should say."""
        alpha, sigma = self.coefficients(t, x_start)
        if self.predict_v:
            return alpha * noise - sigma * x_start
        return x_start if self.predict_x_start else noise

    def to_x_start(self, prediction, x_t, alpha, sigma):
        """Converts the network's output to an estimate of x_start; alpha, sigma: those of x_t."""
        if self.predict_v:
            return alpha * x_t - sigma * prediction
        return prediction if self.predict_x_start else (x_t - sigma * prediction) / alpha

    def loss_weight(self, t):
        """(B,) weights of the squared error; min-SNR of Hang et al. 2023 (arXiv 2303.09556),
        sec. 3.4, or ones where min_snr_gamma is 0."""
        snr = (self.alpha[t] / self.sigma[t]) ** 2
        if not self.min_snr_gamma:
            return torch.ones_like(snr)
        clamped = snr.clamp(max=self.min_snr_gamma)
        if self.predict_v:
            return clamped / (snr + 1)
        return clamped if self.predict_x_start else clamped / snr

    def loss(self, predict, x_start, t, noise):
        """(B,) weighted mean squared errors of `predict(x_t, t)`."""
        prediction = predict(self.q_sample(x_start, t, noise), t)
        error = (prediction.float() - self.target(x_start, t, noise)).square().flatten(1).mean(1)
        return self.loss_weight(t) * error


def build_diffusion(config, device):
    """The process of one decoder stage, from its UnetConfig."""
    return Diffusion(config.timesteps, config.beta_schedule, config.predict_v,
                     config.predict_x_start, config.min_snr_gamma, device)


@lru_cache
def build_lowres_diffusion(device):
    """The process of `noise_lowres`, built once a device."""
    return Diffusion(1000, "linear", device=device)


def noise_lowres(lowres_cond_img, level, noise):
    """Noise conditioning augmentation (Saharia et al. 2022, sec. 2.4), as dalle2-pytorch does it:
    the conditioning picture (B, 3, H, W) in [-1, 1], noised to timestep `level` (B,) of a linear
    schedule of 1000. Returns it with `level`."""
    diffusion = build_lowres_diffusion(lowres_cond_img.device)
    return diffusion.q_sample(lowres_cond_img, level, noise), level
