"""The diffusion process; schedules, samplers, guidance, the cascade: against distributions whose
denoiser is known."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dalle2_pytorch.dalle2_pytorch import NoiseScheduler

from dalle2 import sampling
from dalle2.config import PRESETS
from dalle2.diffusion import Diffusion
from dalle2.fast_modules import Prefix
from dalle2.models import build_unet
from dalle2.sampling import SampleOptions, build_stages, compute_levels, sample_image_embed

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


MEAN, SPREAD = 0.7, 0.3
DIFFUSION = Diffusion(1000, "cosine")


def denoise_gaussian(x_t, level):
    """E[x_start | x_t] where x_start is Gaussian with MEAN and SPREAD."""
    alpha, sigma = level.alpha, level.sigma
    gain = alpha * SPREAD ** 2 / (alpha ** 2 * SPREAD ** 2 + sigma ** 2)
    return MEAN + gain * (x_t - alpha * MEAN)


def solve(sampler, denoise, x, levels):
    return sampling.SAMPLERS[sampler](denoise, x, levels, lambda step: torch.randn(
        x.shape, generator=torch.Generator().manual_seed(step)))


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_samplers_converge_at_their_order(sampler, order):
    """Against the exact solution of the probability flow; without the last step, whose length does
    not shrink."""
    z = torch.linspace(-2, 2, 9).double()
    errors = []
    for steps in (40, 80, 160):
        levels = compute_levels(DIFFUSION, steps)[:-1]
        (a, b), (c, d) = ((x.alpha, (x.alpha ** 2 * SPREAD ** 2 + x.sigma ** 2) ** 0.5)
                          for x in (levels[0], levels[-1]))
        found = solve(sampler, denoise_gaussian, a * MEAN + b * z, levels)
        errors.append((found - c * MEAN - d * z).abs().max())
    slopes = [(errors[i] / errors[i + 1]).log2().item() for i in range(2)]
    assert min(slopes) > order - 0.25, slopes


@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("variance", [0.05, 0.01, 0.002])
def test_the_default_sampler_keeps_the_amplitude_of_detail(variance, beta_schedule):
    """In 25 steps, with the exact denoiser of Gaussian data; DDIM with evenly spaced timesteps
    keeps .89, .77 and .59 of it."""
    def denoise(x_t, level):
        gain = level.alpha * variance / (level.alpha ** 2 * variance + level.sigma ** 2)
        return gain * x_t
    levels = compute_levels(Diffusion(1000, beta_schedule), 25)
    found = solve(SampleOptions().sampler, denoise, torch.ones(1).double(), levels)
    assert 0.98 <= found.item() / variance ** 0.5 < 1.02


def test_ancestral_sampling_draws_the_distribution():
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = solve("ddpm", denoise_gaussian, z, compute_levels(DIFFUSION, 500))
    assert found.mean() == pytest.approx(MEAN, abs=0.01)
    assert found.std() == pytest.approx(SPREAD, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([found, z]))[0, 1]) < 0.1  # the start is forgotten
    exact = solve("ddim", denoise_gaussian, z, compute_levels(DIFFUSION, 100))
    assert torch.corrcoef(torch.stack([exact, z]))[0, 1] > 0.99


def test_dynamic_thresholding_scales_the_saturated_picture_alone():
    image = torch.linspace(-0.5, 0.5, 300) * torch.tensor([[1], [8]])
    found = sampling.threshold(image.view(2, 3, 10, 10), "dynamic").flatten(1)
    assert torch.equal(found[0], image[0])
    assert found[1].abs().max() == 1 and (found[1].abs() == 1).float().mean() < 0.02


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_levels_are_even_in_log_snr_from_the_last_timestep_to_the_clean_picture(schedule):
    diffusion = Diffusion(1000, schedule)
    for steps in (1, 2, 25, 1000):
        levels = compute_levels(diffusion, steps)
        times = [level.t for level in levels]
        assert len(levels) == steps + 1 and times == sorted(set(times), reverse=True)
        assert times[0] == 999 and (steps == 1 or times[-2] == 0)
        assert levels[-1] == sampling.Level(-1, 1, 0)
    levels = compute_levels(diffusion, 25)[:-1]
    log_ratio = torch.tensor([level.alpha / level.sigma for level in levels]).log()
    h = log_ratio[1:].diff()  # the first step skips what is noise alone
    assert h.max() / h.min() == pytest.approx(1, abs=1e-3)
    for level, ratio in zip(levels, log_ratio):  # the network's time is that of the noise
        below, above = int(level.t), min(int(level.t) + 1, 999)
        assert diffusion.half_log_snr[below] + 1e-5 >= ratio >= diffusion.half_log_snr[above] - 1e-5
    torch.testing.assert_close([levels[0].alpha, levels[-1].sigma],
                               [diffusion.alpha[999].item(), diffusion.sigma[0].item()])


def test_levels_of_a_discrete_network_are_whole_timesteps_with_their_own_noise():
    levels = compute_levels(DIFFUSION, 1000, discrete_time=True)
    times = [level.t for level in levels]
    assert all(isinstance(t, int) for t in times) and times == sorted(set(times), reverse=True)
    assert times[0] == 999 and times[-2:] == [0, -1] and 100 < len(times) < 1000
    for level in levels[:-1]:
        assert level.sigma == pytest.approx(DIFFUSION.sigma[level.t].item(), rel=1e-3)
    assert len(compute_levels(DIFFUSION, 16, discrete_time=True)) == 17


def test_ddim_is_the_reference_formula():
    x, levels = torch.tensor([0.3, -1.2]), compute_levels(DIFFUSION, 6, discrete_time=True)
    found = solve("ddim", denoise_gaussian, x, levels)
    a, times = DIFFUSION.alpha.square(), [*(level.t for level in levels[:-1]), None]
    for level, t, after in zip(levels, times[:-1], times[1:]):
        x0 = denoise_gaussian(x, level)
        eps = (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        x = x0 if after is None else a[after].sqrt() * x0 + (1 - a[after]).sqrt() * eps
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_guidance_extrapolates_in_one_call_and_costs_nothing_at_one():
    x, t = torch.zeros(2, 3), torch.tensor([5, 5])
    for scale, wanted, drops in ((3.0, 3, [0, 0, 1, 1]), (1.0, 1, [0, 0])):
        drop, rows, times = sampling.repeat_guided(scale, x, t)
        assert drop.tolist() == drops and times.tolist() == [5] * len(drops)
        assert (sampling.guide(rows + 1 - drop[:, None], scale) == wanted).all()


class LinearPrior:
    """Its estimates: text and noise, half and half, the text's part gone where it is dropped."""

    def __init__(self):
        self.seen = []

    def read_text(self, text_embed, text_encodings, drop):
        return Prefix(1, [(text_embed[:, None] * (1 - drop[:, None, None]), text_encodings)])

    def __call__(self, x_t, t, prefix):
        text = prefix.keys_values[0][0][:, 0]
        self.seen.append((x_t, text))
        return F.normalize(x_t, dim=-1) + text


def test_guidance_of_the_prior_drops_the_text_and_keeps_the_noised_embedding():
    prior, text_embed = LinearPrior(), torch.randn(2, 8)
    embed = sample_image_embed(prior, PRESETS["toy"].prior, text_embed, torch.randn(2, 5, 8),
                               [1, 2], SampleOptions(cond_scale=2.0, sample_timesteps=3))
    assert len(prior.seen) == 3
    for x_t, text in prior.seen:  # two captions, two candidates each, and once more without text
        assert torch.equal(x_t[:4], x_t[4:]) and x_t.abs().sum() > 0
        assert torch.equal(text[:4], text_embed[[0, 0, 1, 1]]) and not text[4:].any()
    torch.testing.assert_close(embed.norm(dim=-1), torch.ones(2))


def test_the_candidate_nearest_to_the_text_is_kept_and_depends_on_its_seed_alone():
    text = F.normalize(torch.randn(3, 8), dim=-1), torch.randn(3, 5, 8)

    def sample(rows, **options):
        return sample_image_embed(
            LinearPrior(), PRESETS["toy"].prior, *(part[rows] for part in text), [1, 2, 3][rows],
            SampleOptions(sample_timesteps=2, cond_scale=1.0, **options))
    every = slice(None)
    one, two, eight = ((sample(every, num_candidates=count) * text[0]).sum(-1)
                       for count in (1, 2, 8))
    assert (one <= two).all() and (two <= eight).all() and (one > 0.3).all()
    assert one.mean() + 0.01 < eight.mean()
    assert torch.equal(sample(every), sample(every, num_candidates=2))  # the config's
    for row in range(3):
        torch.testing.assert_close(sample(slice(row, row + 1)), sample(every)[row:row + 1])


def test_each_later_stage_has_its_own_steps_sampler_and_conditioning_noise():
    configs = [replace(PRESETS["toy"].decoder.unets[1], image_size=size, lowres_noise_level=5)
               for size in (8, 16, 32)]
    seen = []

    def unet(x_t, t, *, lowres_noise_level=None, **_):
        seen.append((x_t.shape[-1], None if lowres_noise_level is None else lowres_noise_level[0]))
        return x_t
    for given, levels in ((None, [5, 5]), ([0, 0], [0, 0]), ([7, 9], [7, 9])):
        seen.clear()
        options = [SampleOptions(1, steps, sampler, lowres_noise_level=level)
                   for steps, sampler, level in zip((3, 1, 2), ("ddim", "dpmpp_2m", "ddpm"),
                                                    [None, *(given or [None] * 2)])]
        sampling.sample_images(build_stages([unet] * 3, configs), torch.randn(1, 4), [1], options)
        assert seen == [(8, None)] * 3 + [(16, levels[0])] + [(32, levels[1])] * 2


def test_a_picture_depends_on_its_seed_alone_and_the_upsampler_is_not_guided():
    configs = PRESETS["toy"].decoder.unets
    unets = [build_unet(c, n, 128).eval() for n, c in enumerate(configs, start=1)]
    for unet in unets:  # the library's last layer begins at zero
        torch.nn.init.normal_(unet.to_out.weight, std=0.1)
    batches = {1: [], 2: []}
    for number, unet in enumerate(unets, start=1):
        unet.register_forward_pre_hook(
            lambda _, args, number=number: batches[number].append(len(args[0])))
    embeds = F.normalize(torch.randn(3, 128), dim=-1)
    stages, options = build_stages(unets, configs), SampleOptions(2.0, 2)
    together = sampling.sample_images(stages, embeds, [7, 8, 9], options)
    assert batches == {1: [8, 8], 2: [1] * 6}  # guidance doubles the first stage alone
    alone = sampling.sample_images(stages, embeds[1:2], [8], options)
    assert together.shape == (3, 3, 256, 256) and 0 <= together.min() and together.max() <= 1
    assert torch.equal(together[1:2], alone)
    assert (together[1] - together[0]).abs().mean() > 1e-3
