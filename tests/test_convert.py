"""Weights to and from the stock classes of dalle2-pytorch, through the command line."""

import pytest
import torch
from dalle2_pytorch import dalle2_pytorch as library
from helpers import TOY, D, call, check_refused, make_network, write_checkpoints

from dalle2.checkpoint import load_export
from dalle2.diffusion import compute_betas
from dalle2.models import load_decoder, load_prior


@pytest.fixture
def run_convert(clip_path):
    return lambda *flags: call("dalle2/tools/convert.py", "--clip_pretrained", clip_path, *flags)


def build_library_prior(**options):
    network = library.DiffusionPriorNetwork(dim=D, depth=TOY.prior.depth, heads=TOY.prior.heads,
                                            dim_head=TOY.prior.dim_head, max_text_len=26, **options)
    return library.DiffusionPrior(network, image_embed_dim=D)


def build_library_decoder():
    unets = [library.Unet(
        dim=c.dim, dim_mults=c.dim_mults, image_embed_dim=D, num_resnet_blocks=0,
        self_attn=(False,) * len(c.dim_mults), attn_heads=4, attn_dim_head=32,
        memory_efficient=True, init_cross_embed=False, init_conv_kernel_size=3,
        cond_dim=c.cond_dim or c.dim, num_image_tokens=c.num_image_tokens,
        cond_on_image_embeds=number == 1, lowres_cond=number > 1, lowres_noise_cond=number > 1)
        for number, c in enumerate(TOY.decoder.unets, start=1)]
    return library.Decoder(tuple(unets), image_sizes=(32, 256), learned_variance=False,
                           use_blur_for_lowres_cond=False, use_noise_for_lowres_cond=True)


def run(network, name):
    """What a network gives for the fixed inputs of the toy preset's one of that name."""
    _, args, conditions = make_network(name)
    return network(*args, **conditions)


@torch.no_grad()
def test_a_prior_goes_to_the_stock_class_and_back(run_convert, tmp_path):
    write_checkpoints(tmp_path, None)
    run_convert("--input", tmp_path / "prior.safetensors", "--output", tmp_path / "b.pt")
    ours, stock = load_prior(tmp_path / "prior.safetensors")[0], build_library_prior().eval()
    stock.load_state_dict(torch.load(
        tmp_path / "b.pt", map_location="cpu", weights_only=True), strict=True)
    torch.testing.assert_close(run(stock.net, "prior"), run(ours, "prior"), atol=1e-5, rtol=1e-4)
    run_convert("--input", tmp_path / "b.pt", "--output", tmp_path / "c.safetensors")
    weights = load_export(tmp_path / "c.safetensors", "prior")[1]
    assert weights.keys() == {f"net.{name}" for name in ours.state_dict()}
    for name, value in ours.state_dict().items():
        assert torch.equal(value, weights[f"net.{name}"])


@torch.no_grad()
def test_a_decoder_goes_to_the_stock_class_and_back(run_convert, tmp_path):
    write_checkpoints(tmp_path, None, noise=0.05)
    run_convert("--input", tmp_path / "decoder.safetensors", "--output", tmp_path / "b.pt")
    state = torch.load(tmp_path / "b.pt", map_location="cpu", weights_only=True)
    unets, stock = load_decoder(tmp_path / "decoder.safetensors")[0], build_library_decoder().eval()
    for number, config in enumerate(TOY.decoder.unets):
        torch.testing.assert_close(state[f"noise_schedulers.{number}.betas"],
                                   compute_betas(config.beta_schedule, 1000).float())
    stock.load_state_dict(state, strict=True)
    torch.testing.assert_close(run(stock.unets[0], "unet1"), run(unets[1], "unet1"), atol=1e-4,
                               rtol=1e-4)
    run_convert("--input", tmp_path / "b.pt", "--output", tmp_path / "c.safetensors",
                "--preset", "toy")
    again = load_decoder(tmp_path / "c.safetensors")[0]
    for number, unet in unets.items():
        torch.testing.assert_close(run(again[number], f"unet{number}"), run(unet, f"unet{number}"))


@pytest.mark.parametrize("prefix, options", [
    ("net.", {}), ("ema_model.net.", {"normformer": True, "num_timesteps": 1000})])
@torch.no_grad()
def test_files_of_the_library_load_here(run_convert, tmp_path, prefix, options):
    """The second is the layout of the public LAION prior."""
    stock = build_library_prior(**options).eval()
    state = {f"{prefix}{name}": value for name, value in stock.net.state_dict().items()}
    if prefix.startswith("ema"):
        state |= {f"online_model.net.{name}": torch.zeros_like(value)
                  for name, value in stock.net.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    run_convert("--input", tmp_path / "a.pt", "--output", tmp_path / "b.safetensors")
    ours, config, _ = load_prior(tmp_path / "b.safetensors")
    assert config.normformer == config.discrete_time == bool(options)
    torch.testing.assert_close(run(ours, "prior"), run(stock.net, "prior"), atol=1e-5, rtol=1e-4)


def test_other_files_are_refused_in_a_line(run_script, clip_path, tmp_path):
    for state, message in (({"x": torch.zeros(3)}, "neither a prior nor a decoder"),
                           ({"unets.0.x": torch.zeros(3)}, "do not fit")):
        torch.save(state, tmp_path / "a.pt")
        check_refused(run_script("dalle2/tools/convert.py", "--clip_pretrained", clip_path,
                                 "--input", tmp_path / "a.pt", "--output",
                                 tmp_path / "b.safetensors", "--preset", "toy"), message)
    assert not (tmp_path / "b.safetensors").exists()
