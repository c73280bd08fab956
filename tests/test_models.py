"""The networks: equal to the library's, forward and backward, and what ours add."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers import NO_CLIP, TOY, D, build_network, make_network
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from dalle2.checkpoint import load_export
from dalle2.config import PRESETS
from dalle2.errors import UserError
from dalle2.fast_modules import compute_attention, restore_modules
from dalle2.models import build_prior, build_unet, list_blocks, save_decoder_stage

DROP = {"prior": "text_cond_drop_prob", "unet1": "image_cond_drop_prob"}


def test_an_untrained_upsampler_answers_with_the_enlarged_picture():
    config = TOY.decoder.unets[1]
    lowres = torch.rand(2, 3, 64, 64) * 2 - 1
    for changes, expected in (({}, lowres), ({"objective": "v"}, torch.zeros_like(lowres))):
        unet = build_unet(replace(config, **changes), 2, D)
        out = unet(torch.randn(2, 3, 64, 64), torch.tensor([999.0, 3.0]), lowres_cond_img=lowres,
                   lowres_noise_level=torch.zeros(2))
        assert torch.equal(out, expected)


def run(network, *args, **kwargs):
    """[output, gradient of the first argument, of every parameter] of a weighted sum."""
    x = args[0].clone().requires_grad_()
    network.zero_grad()
    out = network(x, *args[1:], **kwargs)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return [out, x.grad, *(p.grad for p in network.parameters() if p.requires_grad)]


def assert_same(fast, stock):
    """Equal to 1e-5 of each tensor's norm."""
    assert len(fast) == len(stock)
    for one, other in zip(fast, stock):
        one, other = (torch.zeros(()) if part is None else part for part in (one, other))
        assert (one - other).norm() < 1e-5 * other.norm().clamp(min=1e-3)


@pytest.mark.parametrize("drop, changes", [
    (0.0, {}), (1.0, {}), (0.0, {"normformer": True, "discrete_time": True})])
def test_the_prior_equals_the_stock_one_forward_and_backward(drop, changes):
    torch.manual_seed(0)
    fast = build_prior(replace(TOY.prior, **changes), D)
    stock = restore_modules(copy.deepcopy(fast))
    _, args, kwargs = make_network("prior")
    kwargs["text_encodings"][:, -2:] = 0
    assert_same(run(fast, *args, **kwargs, text_cond_drop_prob=torch.full((3,), drop)),
                run(stock, *args, **kwargs, text_cond_drop_prob=drop))


@pytest.mark.parametrize("name", ["prior", "unet1", "unet2"])
def test_most_weights_are_gathered_block_by_block(name):
    """Where processes share a network out."""
    with torch.device("meta"):
        network = build_network(PRESETS["base"], name, 768)
    total, *sizes = (sum(weight.numel() for weight in part.parameters())
                     for part in (network, *list_blocks(network)))
    assert sum(sizes) > (0.75 if name == "prior" else 0.95) * total and max(sizes) < 0.15 * total


def test_a_caption_read_once_serves_every_call_of_the_prior():
    prior, args, kwargs = make_network("prior")
    drop = torch.tensor([0.0, 1.0, 0.0])
    prefix = prior.read_text(**kwargs, text_cond_drop_prob=drop)
    for image_embed, t in [args, (torch.randn(3, D), torch.tensor([5, 999, 0]))]:
        torch.testing.assert_close(
            prior(image_embed, t, prefix=prefix),
            prior(image_embed, t, **kwargs, text_cond_drop_prob=drop), atol=1e-5, rtol=1e-5)


BASE = [replace(unet, dim=16, image_size=32, crop_size=0) for unet in PRESETS["base"].decoder.unets]


@pytest.mark.parametrize("config, number, drop", [
    (TOY.decoder.unets[0], 1, 0.0), (TOY.decoder.unets[0], 1, 1.0), (TOY.decoder.unets[1], 2, 0.0),
    (BASE[0], 1, 0.0), (BASE[1], 2, 0.0)])
def test_a_unet_equals_the_stock_one_forward_and_backward(config, number, drop):
    torch.manual_seed(0)
    fast = build_unet(config, number, D)
    torch.nn.init.normal_(fast.to_out.weight)
    stock = restore_modules(copy.deepcopy(fast))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    if number > 1:
        condition = dict(image_embed=None, lowres_cond_img=torch.randn_like(x),
                         lowres_noise_level=torch.tensor([0, 400]))
        return assert_same(run(fast, x, t, **condition), run(stock, x, t, **condition))
    embed = torch.randn(2, D)
    assert_same(run(fast, x, t, image_embed=embed, image_cond_drop_prob=torch.full((2,), drop)),
                run(stock, x, t, image_embed=embed, image_cond_drop_prob=drop))


def test_a_cpu_trains_attention_in_fp32():
    torch.manual_seed(0)
    q, k, v, bias = (torch.randn(*shape, dtype=torch.bfloat16, requires_grad=len(shape) > 2)
                     for shape in ((2, 1, 40, 16), (2, 1, 9, 16), (2, 1, 9, 16), (40, 9)))
    with torch.autocast("cpu", torch.bfloat16):
        out = compute_attention(q, k, v, bias, scale=0.2)
        with torch.no_grad():
            drawn = compute_attention(q, k, v, bias, scale=0.2)
    true = scaled_dot_product_attention(*(x.float() for x in (q, k, v, bias)), scale=0.2).bfloat16()
    assert drawn.dtype == torch.bfloat16
    torch.testing.assert_close(drawn, out, rtol=0.05, atol=0.05)
    for mine, wanted in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v))
                              for y in (out, true))):
        assert torch.equal(mine, wanted)


def test_neighbouring_timesteps_differ_in_bf16():
    """The library rounds the timestep itself to bf16, where 996 and 997 are the same."""
    fast, _, _ = make_network("unet1")
    stock = restore_modules(copy.deepcopy(fast))
    x, embed = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1), torch.randn(1, D).expand(2, -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = fast(x, torch.tensor([996, 997]), image_embed=embed)
        assert (one != other).any()
        one, other = stock(x, torch.tensor([996, 997]), image_embed=embed)
        assert one.equal(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior", "unet1"])
def test_networks_compile_as_one_graph_once(name):
    """No graph break, no second compilation from step to step, and the same numbers."""
    torch._dynamo.reset()
    counter = CompileCounter()
    network, args, kwargs = make_network(name)
    eager = copy.deepcopy(network)
    network.compile(backend=counter, fullgraph=True)
    for step in range(4):
        drop = {DROP[name]: (torch.rand(3) < 0.5).float()}
        found = network(args[0], args[1] + step, **kwargs, **drop)
        found.sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(found, eager(args[0], args[1] + step, **kwargs, **drop), atol=1e-5,
                               rtol=1e-4)


@pytest.mark.parametrize("name", ["prior", "unet1", "unet2"])
def test_every_trainable_parameter_gets_a_gradient(name):
    """Distributed training waits for the gradient of each."""
    network, args, condition = make_network(name)
    if name in DROP:
        condition[DROP[name]] = torch.tensor([0.0, 1.0, 0.0])
    network(*args, **condition).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_dropping_the_text_drops_it_for_its_row_alone():
    prior, args, kwargs = make_network("prior")
    other = {name: torch.randn_like(value) for name, value in kwargs.items()}
    drop = torch.tensor([1.0, 0.0, 0.0])
    a, b = (prior(*args, **k, text_cond_drop_prob=drop) for k in (kwargs, other))
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 1e-3
    noised = prior(args[0].flip(-1), args[1], **kwargs, text_cond_drop_prob=drop)
    assert (noised[0] - a[0]).abs().max() > 1e-4  # the noised embedding is still read


def test_configs_that_the_library_cannot_compute_are_refused():
    """Sides that cannot be halved; image tokens as wide as the embedding, for which the library
    would take the embedding itself; a last block that gets other channels than it was made for."""
    config = TOY.decoder.unets[0]
    with pytest.raises(UserError, match="image_size"):
        build_unet(replace(config, image_size=30), 1, D)
    with pytest.raises(UserError, match="cond_dim 64 needs a CLIP of another embedding size"):
        build_unet(config, 1, 64)
    with pytest.raises(UserError, match="dim_mults: the first one has to be 1"):
        build_unet(replace(config, memory_efficient=False), 1, D)


def test_checkpointed_blocks_give_the_same_gradients_from_less_memory():
    config = replace(TOY.decoder.unets[0], num_resnet_blocks=2)
    found, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        network = build_unet(replace(config, gradient_checkpointing=checkpointed), 1, D)
        torch.nn.init.normal_(network.to_out.weight, std=0.1)
        storages, x, embed = {}, torch.randn(2, 3, 32, 32), torch.ones(2, D)

        def keep(tensor, storages=storages):
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = network.train()(x, torch.tensor([5, 900]), image_embed=embed)
        out.square().mean().backward()
        found.append([p.grad for p in network.parameters() if p.requires_grad])
        kept.append(sum(storages.values()))
    assert_same(*found)
    assert kept[1] < 0.5 * kept[0]


def test_stages_that_are_exported_at_the_same_time_are_both_kept(tmp_path, monkeypatch):
    def save_slowly(state, path, metadata, save=safetensors.torch.save_file):
        time.sleep(0.2)
        save(state, path, metadata)
    monkeypatch.setattr("dalle2.checkpoint.save_file", save_slowly)
    path, header = tmp_path / "decoder.safetensors", {"embed_dim": D, "clip": NO_CLIP}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: save_decoder_stage(
            path, number, TOY.decoder.unets[number - 1], {"weight": torch.ones(2)}, header, 1, 2),
            (1, 2)))
    header, weights = load_export(path, "decoder")
    assert all(header["stages"]) and set(weights) == {"unets.0.weight", "unets.1.weight"}
