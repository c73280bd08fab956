"""Section 3 of the paper: slerp, inversion, and each command on untrained checkpoints."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TOY, change_unets, check_refused, open_pipeline, write_checkpoints
from PIL import Image

from dalle2.config import UnetConfig
from dalle2.diffusion import Diffusion
from dalle2.pipeline import Pipeline
from dalle2.sampling import build_stages
from dalle2.tools import explore

PHOTO, OTHER = "val/000000.jpg", "val/000003.jpg"
MEAN, SPREAD, DROPPED_MEAN = 0.1, 0.25, 0.4


@pytest.fixture(scope="module")
def checkpoints(clip_path, tmp_path_factory):
    """Flags of untrained exports, so small that they draw at once."""
    return write_checkpoints(tmp_path_factory.mktemp("ckpt"), clip_path, noise=0.1,
                             unets=change_unets({"dim": 8}, {"dim": 8, "sample_timesteps": 1}))


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    return open_pipeline(checkpoints)


@pytest.fixture
def photos(toy, monkeypatch):
    """Two, and little time for each."""
    monkeypatch.setattr(explore, "INVERSION_STEPS", 4)
    return torch.stack([explore.load_photo(toy / name) for name in (PHOTO, OTHER)])


def make_args(**options):
    return SimpleNamespace(**{"num": 3, "seed": 0, "sample_timesteps": 3, "cond_scale": None,
                              "eta": 1.0, "theta": 0.5, **options})


def test_slerp_walks_equal_arcs_and_a_line_between_parallel_vectors():
    a, b = torch.eye(3)[:1], torch.eye(3)[1:2]
    third = explore.slerp(a, b, 1 / 3)  # 30 of 90 degrees
    torch.testing.assert_close(third, torch.tensor([[3 ** 0.5 / 2, 0.5, 0]]))
    torch.testing.assert_close(explore.slerp(a, 3 * a, 0.5), 2 * a)
    a, b = (torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    rows = explore.slerp(a, b, torch.tensor([0.0, 0.3, 0.6, 1.0]))
    torch.testing.assert_close(rows[[0, 3]], torch.stack([a[0], b[3]]))
    torch.testing.assert_close(rows[1:2], explore.slerp(a[1:2], b[1:2], 0.3))


def build_gaussian_pipeline():
    """A first stage alone, exact for pictures around MEAN where its condition is kept, around
    DROPPED_MEAN where it is dropped."""
    config = UnetConfig(image_size=64, dim=8, dim_mults=(1,), objective="x_start",
                        cond_scale=2.0, train=TOY.prior.train)
    diffusion = Diffusion(config.timesteps, config.beta_schedule)

    def unet(x_t, t, *, image_embed, image_cond_drop_prob):
        mean = MEAN + image_cond_drop_prob.view(-1, 1, 1, 1) * (DROPPED_MEAN - MEAN)
        snr = float(np.exp(2 * np.interp(t[0], np.arange(1000), diffusion.half_log_snr)))
        alpha, sigma = (snr / (1 + snr)) ** 0.5, (1 / (1 + snr)) ** 0.5
        gain = alpha * SPREAD ** 2 / (alpha ** 2 * SPREAD ** 2 + sigma ** 2)
        return mean + gain * (x_t - alpha * mean)
    return Pipeline(None, None, None, None, build_stages([unet], [config]), {}, {})


@pytest.mark.parametrize("cond_scale, mean", [(1.0, MEAN), (None, 2 * MEAN - DROPPED_MEAN)])
def test_a_photo_is_inverted_to_its_noise_and_decoded_again(cond_scale, mean):
    """With guidance too, which makes of two Gaussians a third; None: the config's, which is 2."""
    pipeline, embed = build_gaussian_pipeline(), torch.ones(1, 4) / 2
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    photo = ((MEAN + SPREAD * noise + 1) * 127.5).round().to(torch.uint8)
    args = make_args(sample_timesteps=200, cond_scale=cond_scale)
    x_t = explore.invert(pipeline, photo, embed, args)
    assert (x_t - (photo / 127.5 - 1 - mean) / SPREAD).abs().mean() < 0.1
    assert (explore.decode(pipeline, embed, x_t, [0], args) - photo / 255).abs().mean() < 0.01


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


def test_a_command_writes_one_strip_or_one_line(run_script, checkpoints, tmp_path, toy):
    flags = [*checkpoints, "--output_dir", tmp_path / "out", "--sample_timesteps", 3,
             "--cond_scale", 1]

    def run(command, *more):
        return run_script("dalle2/tools/explore.py", command, *flags, *more)
    check_refused(run("reconstruct", "--photo", "README.md"), "--photo: README.md: cannot")
    check_refused(run("interpolate", "--photo", toy / PHOTO), "--photo: interpolate takes 2")
    assert not (tmp_path / "out").exists()
    code, out, err = run("textdiff", "--photo", toy / PHOTO, "--from", "a red square", "--to",
                         "a / star", "--num", 2)
    path = tmp_path / "out" / "textdiff 000000 to a star.jpg"
    assert (code, out) == (0, f"{path}\n"), err
    picture = Image.open(path)
    assert picture.format == "JPEG" and picture.size == (3 * 258 + 2, 260)
    photo = np.asarray(picture)[2:258, 2:258].astype(float)
    assert np.abs(photo - Image.open(toy / PHOTO)).mean() < 5
