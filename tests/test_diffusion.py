import pytest
import torch
from dalle2_pytorch.dalle2_pytorch import NoiseScheduler

from dalle2.diffusion import Diffusion

KINDS = [{}, {"predict_v": True}, {"predict_x_start": True}]


@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_schedule_is_the_librarys(beta_schedule):
    library = NoiseScheduler(beta_schedule=beta_schedule, timesteps=1000, loss_type="l2")
    ours = Diffusion(1000, beta_schedule)
    torch.testing.assert_close(ours.alpha, library.sqrt_alphas_cumprod)
    torch.testing.assert_close(ours.sigma, library.sqrt_one_minus_alphas_cumprod)
    x, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 500, 999])
    torch.testing.assert_close(ours.q_sample(x, t, noise), library.q_sample(x, t, noise))
    v = Diffusion(1000, beta_schedule, predict_v=True).target(x, t, noise)
    torch.testing.assert_close(v, library.calculate_v(x, t, noise))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_lead_back_to_x_start(kind):
    diffusion = Diffusion(1000, "cosine", **kind)
    x, noise, t = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 100, 500, 900])
    x_t = diffusion.q_sample(x, t, noise)
    found = diffusion.to_x_start(diffusion.target(x, t, noise), x_t, *diffusion.coefficients(t, x))
    torch.testing.assert_close(found, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_bounds_the_weight_of_x_start(kind):
    """In terms of the error of x_start, every parametrisation weighs min(SNR, gamma)."""
    diffusion = Diffusion(1000, "cosine", min_snr_gamma=5.0, **kind)
    t = torch.arange(10, 990, 50)
    snr = (diffusion.alpha[t] / diffusion.sigma[t]) ** 2
    x, noise = torch.randn(len(t), 4), torch.randn(len(t), 4)
    x_t = diffusion.q_sample(x, t, noise)
    # a prediction whose x_start is off by one everywhere
    if diffusion.predict_v:
        wrong = (diffusion.alpha[t][:, None] * x_t - (x + 1)) / diffusion.sigma[t][:, None]
    elif diffusion.predict_x_start:
        wrong = x + 1
    else:
        wrong = (x_t - diffusion.alpha[t][:, None] * (x + 1)) / diffusion.sigma[t][:, None]
    loss = diffusion.loss(lambda *_: wrong, x, t, noise)
    torch.testing.assert_close(loss, snr.clamp(max=5.0), rtol=2e-2, atol=1e-3)


def test_gamma_zero_is_the_plain_loss():
    diffusion = Diffusion(1000, "cosine", predict_v=True)
    assert (diffusion.loss_weight(torch.arange(1000)) == 1).all()


def test_loss_leaves_its_input_alone():
    """dalle2-pytorch scales a cached embedding in place."""
    diffusion = Diffusion(1000, "cosine", predict_x_start=True)
    x = torch.randn(2, 4)
    before = x.clone()
    diffusion.loss(lambda x_t, t: x_t, x, torch.tensor([1, 2]), torch.randn(2, 4))
    assert torch.equal(x, before)
