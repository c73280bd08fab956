"""The diffusion process: schedule, targets, weights of the loss."""

import pytest
import torch
from dalle2_pytorch.dalle2_pytorch import NoiseScheduler

from dalle2.diffusion import Diffusion

OBJECTIVES = "noise", "v", "x_start"


@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_schedule_is_the_librarys(beta_schedule):
    library = NoiseScheduler(beta_schedule=beta_schedule, timesteps=1000, loss_type="l2")
    ours = Diffusion(1000, beta_schedule)
    torch.testing.assert_close(ours.alpha, library.sqrt_alphas_cumprod)
    torch.testing.assert_close(ours.sigma, library.sqrt_one_minus_alphas_cumprod)
    x, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 500, 999])
    torch.testing.assert_close(ours.q_sample(x, t, noise), library.q_sample(x, t, noise))
    v = Diffusion(1000, beta_schedule, objective="v").target(x, t, noise)
    torch.testing.assert_close(v, library.calculate_v(x, t, noise))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targets_lead_back_to_x_start(objective):
    diffusion = Diffusion(1000, "cosine", objective=objective)
    x, noise, t = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 100, 500, 900])
    x_t = diffusion.q_sample(x, t, noise)
    found = diffusion.to_x_start(diffusion.target(x, t, noise), x_t, *diffusion.coefficients(t, x))
    torch.testing.assert_close(found, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_bounds_the_weight_of_x_start(objective):
    """In terms of the error of x_start, every parametrisation weighs min(SNR, gamma)."""
    diffusion = Diffusion(1000, "cosine", min_snr_gamma=5.0, objective=objective)
    t = torch.arange(10, 990, 50)
    x, noise = torch.randn(len(t), 4), torch.randn(len(t), 4)
    x_t, (alpha, sigma) = diffusion.q_sample(x, t, noise), diffusion.coefficients(t, x)
    # a prediction whose x_start is off by one everywhere
    wrong = {"v": (alpha * x_t - (x + 1)) / sigma, "x_start": x + 1,
             "noise": (x_t - alpha * (x + 1)) / sigma}[objective]
    loss = diffusion.loss(lambda *_: wrong, x, t, noise)
    snr = (alpha / sigma).flatten() ** 2
    torch.testing.assert_close(loss, snr.clamp(max=5.0), rtol=2e-2, atol=1e-3)


def test_the_plain_loss_weighs_every_timestep_alike_and_leaves_its_input_alone():
    """dalle2-pytorch scales a cached embedding in place."""
    diffusion = Diffusion(1000, "cosine", objective="x_start")
    x = torch.randn(2, 4)
    before = x.clone()
    loss = diffusion.loss(lambda x_t, t: x_t * 0, x, torch.tensor([1, 999]), torch.randn(2, 4))
    torch.testing.assert_close(loss, x.square().mean(1))
    assert torch.equal(x, before)
