"""Section 3 of the paper: slerp, inversion, and each command on untrained checkpoints."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TOY, change_unets, check_refused, write_checkpoints
from PIL import Image

from dalle2.config import UnetConfig
from dalle2.diffusion import Diffusion
from dalle2.pipeline import Pipeline, load_pipeline
from dalle2.sampling import build_stages, compute_levels, invert_ddim
from dalle2.tools import explore

PHOTO, OTHER = "val/000000.jpg", "val/000003.jpg"
MEAN, SPREAD, DROPPED_MEAN = 0.1, 0.25, 0.4


@pytest.fixture(scope="module")
def checkpoints(clip_path, tmp_path_factory):
    """Untrained exports by flag, so small that they draw at once."""
    folder = tmp_path_factory.mktemp("ckpt")
    write_checkpoints(folder, clip_path, noise=0.1,
                      unets=change_unets({"dim": 8}, {"dim": 8, "sample_timesteps": 1}))
    return {f"{kind}_ckpt": str(folder / f"{kind}.safetensors") for kind in ("prior", "decoder")}


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    return load_pipeline(SimpleNamespace(**checkpoints, clip_model=None, clip_pretrained=None,
                                         compile=False), torch.device("cpu"))


@pytest.fixture
def photos(toy, monkeypatch):
    """Two, and little time for each."""
    monkeypatch.setattr(explore, "INVERSION_STEPS", 4)
    return torch.stack([explore.load_photo(toy / name) for name in (PHOTO, OTHER)])


def make_args(**options):
    return SimpleNamespace(**{"num": 3, "seed": 0, "sample_timesteps": 3, "cond_scale": None,
                              "eta": 1.0, "theta": 0.5, **options})


def test_slerp_walks_equal_arcs_on_rows_of_any_shape_and_a_line_between_parallel_vectors():
    a, b = torch.eye(3)[:1], torch.eye(3)[1:2]
    torch.testing.assert_close(explore.slerp(a, b, 0), a)
    torch.testing.assert_close(explore.slerp(a, b, 1), b)
    third = explore.slerp(a, b, 1 / 3)  # 30 of 90 degrees
    torch.testing.assert_close(third, torch.tensor([[3 ** 0.5 / 2, 0.5, 0]]))
    torch.testing.assert_close(explore.slerp(a, 3 * a, 0.5), 2 * a)
    assert explore.slerp(a, -a, torch.linspace(0, 1, 5)).isfinite().all()
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(4, 48), dim=1).view(4, 3, 4, 4) for _ in range(2))
    rows = explore.slerp(a, b, torch.tensor([0.0, 0.3, 0.6, 1.0]))
    torch.testing.assert_close(rows.flatten(1).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(rows[1:2], explore.slerp(a[1:2], b[1:2], 0.3))
    path = explore.slerp(a[:1], b[:1], torch.linspace(0, 1, 7))
    steps = (path[1:] - path[:-1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(6))


# ----------------------------------------------------------------------------------------------
# inversion


def build_gaussian_pipeline(error=0.0):
    """A first stage alone, exact for pictures around MEAN where its condition is kept, around
    DROPPED_MEAN where it is dropped; its estimates are off by `error`, brighter or darker."""
    config = UnetConfig(image_size=64, dim=8, dim_mults=(1,), objective="x_start",
                        cond_scale=2.0, train=TOY.prior.train)
    diffusion = Diffusion(config.timesteps, config.beta_schedule)
    wrong = error * (1 - 2 * (torch.arange(64) % 2))

    def unet(x_t, t, *, image_embed, image_cond_drop_prob):
        mean = MEAN + image_cond_drop_prob.view(-1, 1, 1, 1) * (DROPPED_MEAN - MEAN)
        snr = float(np.exp(2 * np.interp(t[0], np.arange(1000), diffusion.half_log_snr)))
        alpha, sigma = (snr / (1 + snr)) ** 0.5, (1 / (1 + snr)) ** 0.5
        gain = alpha * SPREAD ** 2 / (alpha ** 2 * SPREAD ** 2 + sigma ** 2)
        return mean + gain * (x_t - alpha * mean) + wrong
    return Pipeline(None, None, None, None, build_stages([unet], [config]), {}, {})


def build_photo():
    """uint8 (1, 3, 64, 64) of the Gaussian that the pipeline knows."""
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    return ((MEAN + SPREAD * noise + 1) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize("cond_scale, mean", [(1.0, MEAN), (None, 2 * MEAN - DROPPED_MEAN)])
def test_a_photo_is_inverted_to_its_noise_and_decoded_again(cond_scale, mean):
    """With guidance too, which makes of two Gaussians a third; None: the config's, which is 2."""
    pipeline, embed = build_gaussian_pipeline(), torch.ones(1, 4) / 2
    photo = build_photo()
    args = make_args(sample_timesteps=200, cond_scale=cond_scale)
    x_t = explore.invert(pipeline, photo, embed, args)
    assert (x_t - (photo / 127.5 - 1 - mean) / SPREAD).abs().mean() < 0.1
    assert (explore.decode(pipeline, embed, x_t, [0], args) - photo / 255).abs().mean() < 0.01


def test_the_inversion_begins_where_the_network_can_tell_noise_from_its_own_error():
    pipeline, embed = build_gaussian_pipeline(error=0.1), torch.ones(1, 4) / 2
    photo = build_photo()
    args = make_args(cond_scale=1.0)
    stage, config = pipeline.stages[0], pipeline.stages[0].config
    levels = compute_levels(Diffusion(config.timesteps, config.beta_schedule), 50)
    denoise = explore.build_first_denoiser(stage, embed, args)
    x_start = photo / 127.5 - 1
    x_t, kept = explore.find_start(denoise, x_start, torch.randn(1, 3, 64, 64), levels)
    assert 0.1 / explore.MAX_ERROR < kept[-2].sigma < 0.15
    assert kept[0] == levels[0] and kept[-1] == levels[-1]
    added = (x_t - kept[-2].alpha * x_start) / kept[-2].sigma
    assert abs(added.std() - 1) < 0.02 and abs(added.mean()) < 0.02
    assert invert_ddim(denoise, x_start, levels).std() > 1.8  # from the clean end it fails
    assert abs(explore.invert(pipeline, photo, embed, args).std() - 1) < 0.4


# ----------------------------------------------------------------------------------------------
# commands


def test_variations_stray_in_the_first_stage_by_eta_and_seed(pipeline, photos, monkeypatch):
    x_t = explore.invert(pipeline, photos[:1], pipeline.embed_images(photos[:1]), make_args())
    monkeypatch.setattr(explore, "invert", lambda *_: x_t)
    first = replace(pipeline, stages=pipeline.stages[:1])

    def vary(**options):
        return explore.variations(first, photos[:1], make_args(**options))[1:]
    strip = vary()
    assert min((a - b).abs().mean() for a, b in zip(strip, strip.roll(1, 0))) > 1e-3
    torch.testing.assert_close(vary(num=1), strip[:1], atol=1e-4, rtol=1e-4)
    assert (vary(num=1, seed=1) - strip[:1]).abs().mean() > 1e-3
    torch.testing.assert_close(*vary(num=2, eta=0.0), atol=1e-4, rtol=1e-4)


def test_an_interpolation_ends_in_the_reconstructions(pipeline, photos):
    strip = explore.interpolate(pipeline, photos, make_args())
    assert len(strip) == 5
    torch.testing.assert_close(strip[[0, -1]], photos / 255)
    for photo, end in zip(photos, (1, -2)):
        _, inverted, random = explore.reconstruct(pipeline, photo[None], make_args())
        torch.testing.assert_close(strip[end], inverted, atol=1e-3, rtol=1e-3)
        assert (inverted - random).abs().mean() > 1e-2  # its own noise, and any
    assert (strip[1] - strip[2]).abs().mean() > 1e-3 < (strip[2] - strip[3]).abs().mean()


def test_a_text_diff_turns_the_embedding_towards_the_captions_difference(pipeline, photos,
                                                                         monkeypatch):
    seen, decode = [], explore.decode
    monkeypatch.setattr(explore, "decode", lambda *args: seen.append(args) or decode(*args))
    strip = explore.textdiff(pipeline, photos[:1], make_args(
        from_caption="a red square", to_caption="a blue star", theta=0.4))
    assert len(strip) == 4
    image_embed, (before, after) = pipeline.embed_images(photos[:1]), pipeline.embed_captions(
        ["a red square", "a blue star"])[0]
    direction = F.normalize(after - before, dim=0)
    (_, path, x_t, *_), = seen
    assert len(x_t) == 1  # one noise for all
    torch.testing.assert_close(
        torch.acos(path @ direction), torch.acos(image_embed @ direction)
        * torch.tensor([1.0, 0.8, 0.6]), atol=1e-3, rtol=1e-3)


@pytest.fixture
def run_explore(run_script, checkpoints, tmp_path, toy):
    def run(command, *flags):
        files = {f"--{name}": path for name, path in checkpoints.items()}
        return run_script("dalle2/tools/explore.py", command, *sum(files.items(), ()),
                          "--output_dir", tmp_path / "out", "--sample_timesteps", 3,
                          "--cond_scale", 1,
                          *(toy / flag if flag in (PHOTO, OTHER) else flag for flag in flags))
    return run


@pytest.mark.parametrize("command, flags, columns, name", [
    ("interpolate", ["--photo", PHOTO, "--photo", OTHER, "--num", 2], 4,
     "interpolate 000000 000003"),
    ("textdiff", ["--photo", PHOTO, "--from", "a red square", "--to", "a / star", "--num", 2], 3,
     "textdiff 000000 to a star")])
def test_a_command_writes_one_strip(run_explore, tmp_path, toy, command, flags, columns, name):
    code, out, err = run_explore(command, *flags)
    path = tmp_path / "out" / f"{name}.jpg"
    assert (code, out) == (0, f"{path}\n"), err
    assert list(path.parent.iterdir()) == [path]
    picture = Image.open(path)
    assert picture.format == "JPEG" and picture.size == (columns * 258 + 2, 260)
    photo = np.asarray(picture)[2:258, 2:258].astype(float)
    assert np.abs(photo - Image.open(toy / PHOTO)).mean() < 5


@pytest.mark.parametrize("command, flags, message", [
    ("reconstruct", ["--photo", "README.md"], "--photo: README.md: cannot identify"),
    ("interpolate", ["--photo", PHOTO], "--photo: interpolate takes 2, 1 given"),
    ("variations", ["--photo", PHOTO, "--eta", 1.5], "--eta: 1.5 is not between 0 and 1"),
    ("textdiff", ["--photo", PHOTO, "--from", "a", "--to", " "], "--to: the caption is empty"),
    ("reconstruct", ["--photo", PHOTO, "--output_dir", "README.md"],
     "--output_dir: README.md is no folder")])
def test_bad_input_is_refused_in_a_line(run_explore, tmp_path, command, flags, message):
    check_refused(run_explore(command, *flags), message)
    assert not (tmp_path / "out").exists()
