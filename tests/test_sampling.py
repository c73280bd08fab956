import pytest
import torch

from dalle2.config import PRESETS
from dalle2.diffusion import Diffusion
from dalle2.models import build_unet
from dalle2.rng import draw_noise
from dalle2.sampling import (
    SAMPLERS,
    compute_sample_times,
    guide,
    sample_image_embed,
    sample_images,
)

MEAN, SPREAD = 0.7, 0.3
DIFFUSION = Diffusion(1000, "cosine")


def denoise_gaussian(x_t, t):
    """E[x_start | x_t] where x_start is Gaussian with MEAN and SPREAD."""
    alpha, sigma = DIFFUSION.coefficients(t, x_t)
    gain = alpha * SPREAD ** 2 / (alpha ** 2 * SPREAD ** 2 + sigma ** 2)
    return MEAN + gain * (x_t - alpha * MEAN)


@pytest.mark.parametrize("sampler, error", [("ddim", 0.02), ("dpmpp_2m", 0.003)])
def test_samplers_solve_the_gaussian(sampler, error):
    """The probability flow maps noise z to MEAN + SPREAD z (from the last timestep's noise)."""
    z = torch.linspace(-2, 2, 9)
    found = SAMPLERS[sampler](denoise_gaussian, z, DIFFUSION, 200)
    assert (found - (MEAN + SPREAD * z)).abs().max() < error
    coarse = SAMPLERS[sampler](denoise_gaussian, z, DIFFUSION, 20)
    assert (coarse - (MEAN + SPREAD * z)).abs().max() < 50 * error


def test_sampling_begins_at_the_last_timestep_and_ends_at_zero():
    for steps in (2, 7, 25, 1000):
        times = compute_sample_times(1000, steps)
        assert times[0] == 999 and times[-1] == 0
        assert len(times) == steps == len(set(times))
    assert compute_sample_times(1000, 1) == [999]
    for sampler in SAMPLERS.values():
        seen = []
        sampler(lambda x, t: (seen.append(t[0].item()), x)[1], torch.zeros(1, 2), DIFFUSION, 5)
        assert seen == compute_sample_times(1000, 5)


def test_ddim_is_the_reference_formula():
    x, times = torch.tensor([0.3, -1.2]), [*compute_sample_times(1000, 6), None]
    found = SAMPLERS["ddim"](denoise_gaussian, x, DIFFUSION, 6)
    a = DIFFUSION.alpha.square()  # alphas_cumprod
    for t, after in zip(times[:-1], times[1:]):
        x0 = denoise_gaussian(x, torch.full((2,), t))
        eps = (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        x = x0 if after is None else a[after].sqrt() * x0 + (1 - a[after]).sqrt() * eps
    torch.testing.assert_close(found, x)


def test_guidance_extrapolates_in_one_call_and_costs_nothing_at_one():
    calls = []

    def predict(x_t, t, drop):
        calls.append(drop.tolist())
        return x_t + 1 - drop[:, None]
    x, t = torch.zeros(2, 3), torch.tensor([5, 5])
    assert (guide(predict, 3.0)(x, t) == 3).all()
    assert (guide(predict, 1.0)(x, t) == 1).all()
    assert calls == [[0, 0, 1, 1], [0, 0]]


def test_guidance_of_the_prior_keeps_the_noised_embedding():
    seen = []

    def prior(x_t, t, *, text_embed, text_encodings, text_cond_drop_prob):
        seen.append((x_t, text_cond_drop_prob))
        return x_t
    config = PRESETS["toy"].prior
    embed = sample_image_embed(prior, config, torch.randn(2, 8), torch.randn(2, 5, 8), [1, 2],
                               cond_scale=2.0, sample_timesteps=3)
    for x_t, drop in seen:
        assert drop.tolist() == [0, 0, 1, 1]
        assert torch.equal(x_t[:2], x_t[2:]) and x_t.abs().sum() > 0
    torch.testing.assert_close(embed.norm(dim=-1), torch.ones(2))


def test_a_picture_depends_on_its_seed_alone_and_the_upsampler_is_not_guided():
    configs = PRESETS["toy"].decoder.unets
    unets = [build_unet(c, n, 128).eval() for n, c in enumerate(configs, start=1)]
    for unet in unets:  # the library's last layer begins at zero
        torch.nn.init.normal_(unet.to_out.weight, std=0.1)
    batches = {1: [], 2: []}
    for number, unet in enumerate(unets, start=1):
        unet.register_forward_pre_hook(
            lambda _, args, number=number: batches[number].append(len(args[0])))
    embeds = torch.nn.functional.normalize(torch.randn(3, 128), dim=-1)
    together = sample_images(unets, configs, embeds, [7, 8, 9], cond_scale=2.0, sample_timesteps=2)
    assert batches == {1: [6, 6], 2: [1] * 6}  # guidance doubles the first stage alone
    alone = sample_images(unets, configs, embeds[1:2], [8], cond_scale=2.0, sample_timesteps=2)
    assert together.shape == (3, 3, 256, 256) and 0 <= together.min() and together.max() <= 1
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (together[1] - together[0]).abs().mean() > 1e-3


def test_noise_comes_from_the_seed_of_its_row():
    noise = draw_noise([3, 4], (5,))
    assert torch.equal(noise[1], draw_noise([4], (5,))[0]) and not torch.equal(*noise)
