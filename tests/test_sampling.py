import pytest
import torch

from dalle2.config import PRESETS
from dalle2.diffusion import Diffusion
from dalle2.models import build_unet
from dalle2.rng import draw_noise
from dalle2.sampling import (
    SAMPLERS,
    compute_levels,
    compute_sample_times,
    guide,
    invert_ddim,
    sample_image_embed,
    sample_images,
    threshold,
)

MEAN, SPREAD = 0.7, 0.3
DIFFUSION = Diffusion(1000, "cosine")


def denoise_gaussian(x_t, t):
    """E[x_start | x_t] where x_start is Gaussian with MEAN and SPREAD."""
    alpha, sigma = DIFFUSION.alpha[t].to(x_t), DIFFUSION.sigma[t].to(x_t)
    gain = alpha * SPREAD ** 2 / (alpha ** 2 * SPREAD ** 2 + sigma ** 2)
    return MEAN + gain * (x_t - alpha * MEAN)


def solve(sampler, denoise, x, levels):
    return SAMPLERS[sampler](denoise, x, levels, lambda step: torch.randn(
        x.shape, generator=torch.Generator().manual_seed(step)))


@pytest.mark.parametrize("sampler, error", [("ddim", 0.02), ("dpmpp_2m", 0.003)])
def test_samplers_solve_the_gaussian(sampler, error):
    """The probability flow maps noise z to MEAN + SPREAD z (from the last timestep's noise)."""
    z = torch.linspace(-2, 2, 9)
    found = solve(sampler, denoise_gaussian, z, compute_levels(DIFFUSION, 200))
    assert (found - (MEAN + SPREAD * z)).abs().max() < error
    coarse = solve(sampler, denoise_gaussian, z, compute_levels(DIFFUSION, 20))
    assert (coarse - (MEAN + SPREAD * z)).abs().max() < 50 * error


def denoise_mixture(x_t, t):
    """E[x_start | x_t] of two narrow Gaussians at -1 and 1, in float64."""
    alpha, sigma = DIFFUSION.alpha[t].double(), DIFFUSION.sigma[t].double()
    variance = alpha ** 2 * 0.2 ** 2 + sigma ** 2
    share = torch.sigmoid(2 * alpha * x_t / variance)  # of the one at 1
    mean = 2 * share - 1
    return mean + alpha * 0.2 ** 2 / variance * (x_t - alpha * mean)


@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_samplers_converge_at_their_order(sampler, order, problem):
    """Against the exact solution of the probability flow, or, of the mixture's, the solution with
    ten times the steps; without the last step, whose length does not shrink."""
    z = torch.linspace(-2, 2, 9).double()
    errors = []
    for steps in (40, 80, 160):
        levels = compute_levels(DIFFUSION, steps)[:-1]
        if problem == "gaussian":
            (a, b), (c, d) = ((x.alpha, (x.alpha ** 2 * SPREAD ** 2 + x.sigma ** 2) ** 0.5)
                              for x in (levels[0], levels[-1]))
            start, exact, denoise = a * MEAN + b * z, c * MEAN + d * z, denoise_gaussian
        else:
            start, denoise = z, denoise_mixture
            exact = solve("dpmpp_2m", denoise, z, compute_levels(DIFFUSION, 1000)[:-1])
        errors.append((solve(sampler, denoise, start, levels) - exact).abs().max())
    slopes = [(errors[i] / errors[i + 1]).log2().item() for i in range(2)]
    print(sampler, problem, "slopes", slopes)
    assert min(slopes) > order - 0.25


def test_ancestral_sampling_draws_the_distribution():
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = solve("ddpm", denoise_gaussian, z, compute_levels(DIFFUSION, 500))
    assert found.mean() == pytest.approx(MEAN, abs=0.01)
    assert found.std() == pytest.approx(SPREAD, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([found, z]))[0, 1]) < 0.1  # the start is forgotten
    exact = solve("ddim", denoise_gaussian, z, compute_levels(DIFFUSION, 100))
    assert torch.corrcoef(torch.stack([exact, z]))[0, 1] > 0.99


def test_inversion_finds_the_noise_that_ddim_began_from():
    z, levels = torch.linspace(-2, 2, 9), compute_levels(DIFFUSION, 250)
    x_start = solve("ddim", denoise_gaussian, z, levels)
    assert (invert_ddim(denoise_gaussian, x_start, levels) - z).abs().max() < 0.05


def test_dynamic_thresholding_scales_the_saturated_picture_alone():
    image = torch.stack([torch.linspace(-0.5, 0.5, 300), torch.linspace(-4, 4, 300)]
                        ).view(2, 3, 10, 10)
    found = threshold(image, "dynamic")
    assert torch.equal(found[0], image[0])
    assert found[1].abs().max() == 1 and (found[1].abs() == 1).float().mean() < 0.02
    assert (threshold(image, "static")[1].abs() == 1).float().mean() > 0.5


def test_sampling_begins_at_the_last_timestep_and_ends_at_zero():
    for steps in (2, 7, 25, 1000):
        times = compute_sample_times(1000, steps)
        assert times[0] == 999 and times[-1] == 0
        assert len(times) == steps == len(set(times))
    assert compute_sample_times(1000, 1) == [999]
    for name in SAMPLERS:
        seen = []
        solve(name, lambda x, t: (seen.append(t), x)[1], torch.zeros(1, 2),
              compute_levels(DIFFUSION, 5))
        assert seen == compute_sample_times(1000, 5)


def test_ddim_is_the_reference_formula():
    x, times = torch.tensor([0.3, -1.2]), [*compute_sample_times(1000, 6), None]
    found = solve("ddim", denoise_gaussian, x, compute_levels(DIFFUSION, 6))
    a = DIFFUSION.alpha.square()  # alphas_cumprod
    for t, after in zip(times[:-1], times[1:]):
        x0 = denoise_gaussian(x, t)
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

    class Prior:
        def read_text(self, text_embed, text_encodings, drop):
            assert drop.tolist() == [0, 0, 1, 1] and torch.equal(text_embed[:2], text_embed[2:])
            return "the text"

        def __call__(self, x_t, t, prefix):
            assert prefix == "the text"
            seen.append(x_t)
            return x_t
    config = PRESETS["toy"].prior
    embed = sample_image_embed(Prior(), config, torch.randn(2, 8), torch.randn(2, 5, 8), [1, 2],
                               cond_scale=2.0, sample_timesteps=3)
    assert len(seen) == 3
    for x_t in seen:
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
    assert batches == {1: [8, 8], 2: [1] * 6}  # guidance doubles the first stage alone
    alone = sample_images(unets, configs, embeds[1:2], [8], cond_scale=2.0, sample_timesteps=2)
    assert together.shape == (3, 3, 256, 256) and 0 <= together.min() and together.max() <= 1
    assert torch.equal(together[1:2], alone)
    assert (together[1] - together[0]).abs().mean() > 1e-3


def test_noise_comes_from_the_seed_of_its_row():
    noise = draw_noise([3, 4], (5,))
    assert torch.equal(noise[1], draw_noise([4], (5,))[0]) and not torch.equal(*noise)
