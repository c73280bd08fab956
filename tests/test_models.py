import copy

import pytest
import torch
from dalle2_pytorch import dalle2_pytorch as library

from dalle2.config import PRESETS, UserError
from dalle2.fast_modules import swap_modules
from dalle2.models import build_prior, build_unet

TOY = PRESETS["toy"]
D = 128


def make_prior_inputs(batch=3, length=9):
    text_encodings = torch.randn(batch, length, D)
    text_encodings[:, -2:] = 0
    return (torch.randn(batch, D), torch.arange(batch) * 300), dict(
        text_embed=torch.randn(batch, D), text_encodings=text_encodings)


def test_weights_load_into_the_stock_networks_and_say_the_same():
    torch.manual_seed(0)
    ours = build_prior(TOY.prior, D)
    stock = library.DiffusionPriorNetwork(dim=D, depth=TOY.prior.depth, heads=TOY.prior.heads,
                                          dim_head=TOY.prior.dim_head,
                                          max_text_len=TOY.prior.max_text_len)
    stock.load_state_dict(ours.state_dict(), strict=True)
    args, kwargs = make_prior_inputs()
    torch.testing.assert_close(ours(*args, **kwargs), stock(*args, **kwargs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", ["toy", "seed"])
def test_decoder_stages_are_those_that_the_stock_decoder_builds(preset):
    """`Decoder` re-creates networks that lack its flags; ours are taken as they are."""
    configs = PRESETS[preset].decoder.unets
    unets = tuple(build_unet(c, n, 96) for n, c in enumerate(configs, start=1))
    decoder = library.Decoder(unets, image_sizes=tuple(c.image_size for c in configs),
                              learned_variance=False, use_noise_for_lowres_cond=True,
                              use_blur_for_lowres_cond=False)
    for ours, kept in zip(unets, decoder.unets):
        assert kept is ours


@pytest.mark.parametrize("module, make", [
    (lambda: library.LayerNorm(24), lambda: (torch.randn(2, 5, 24),)),
    (lambda: library.LayerNorm(24, stable=True), lambda: (torch.rand(3, 24) + 0.1,)),
    (lambda: library.CrossAttention(24, context_dim=16),
     lambda: (torch.randn(2, 7, 24), torch.randn(2, 3, 16))),
    (lambda: library.CrossAttention(24, context_dim=16, norm_context=True),
     lambda: (torch.randn(2, 7, 24), torch.randn(2, 3, 16),
              torch.tensor([[True, False, True], [False, False, False]]))),
])
def test_fast_modules_equal_the_stock_ones_forward_and_backward(module, make):
    torch.manual_seed(0)
    stock = module()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    fast = swap_modules(copy.deepcopy(stock), library)
    assert type(fast) is not type(stock) and fast.state_dict().keys() == stock.state_dict().keys()
    inputs = make()
    gradients = []
    for network in (stock, fast):
        x = inputs[0].clone().requires_grad_()
        out = network(x, *inputs[1:])
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        gradients.append([out, x.grad, *(p.grad for p in network.parameters())])
    for one, other in zip(*gradients):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


def test_fast_unet_equals_the_stock_unet():
    torch.manual_seed(0)
    fast = build_unet(TOY.decoder.unets[0], 1, D)
    torch.nn.init.normal_(fast.to_out.weight)
    stock = copy.deepcopy(fast)
    for module in stock.modules():
        if type(module).__name__.startswith("Fast"):
            module.__class__ = type(module).__mro__[1]
    x, t, embed = torch.randn(2, 3, 32, 32), torch.tensor([3, 700]), torch.randn(2, D)
    torch.testing.assert_close(fast(x, t, image_embed=embed), stock(x, t, image_embed=embed),
                               atol=2e-5, rtol=1e-4)


def test_every_trainable_parameter_gets_a_gradient():
    """Distributed training waits for the gradient of each."""
    drop = torch.tensor([0.0, 1.0])
    prior = build_prior(TOY.prior, D)
    args, kwargs = make_prior_inputs(batch=2)
    networks = [(prior, lambda: prior(*args, **kwargs, text_cond_drop_prob=drop))]
    for number, config in enumerate(TOY.decoder.unets, start=1):
        unet = build_unet(config, number, D)
        torch.nn.init.normal_(unet.to_out.weight)
        x, t = torch.randn(2, 3, 64, 64), torch.tensor([5, 6])
        condition = dict(image_embed=torch.randn(2, D), image_cond_drop_prob=drop) \
            if number == 1 else dict(image_embed=None, lowres_cond_img=x, lowres_noise_level=t)
        networks.append((unet, lambda unet=unet, x=x, t=t, c=condition: unet(x, t, **c)))
    for network, call in networks:
        call().square().sum().backward()
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_dropping_the_text_drops_it_for_its_row_alone():
    prior = build_prior(TOY.prior, D).eval()
    args, kwargs = make_prior_inputs(batch=2)
    other = dict(text_embed=torch.randn(2, D), text_encodings=torch.randn(2, 9, D))
    drop = torch.tensor([1.0, 0.0])
    a, b = (prior(*args, **k, text_cond_drop_prob=drop) for k in (kwargs, other))
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 1e-3
    noised = prior(args[0].flip(-1), args[1], **kwargs, text_cond_drop_prob=drop)
    assert (noised[0] - a[0]).abs().max() > 1e-4  # the noised embedding is still read


def test_sizes_that_the_network_cannot_halve_are_named():
    from dataclasses import replace
    config = replace(TOY.decoder.unets[0], image_size=30)
    with pytest.raises(UserError, match="--image_size"):
        build_unet(config, 1, D)


def test_image_tokens_as_wide_as_the_embedding_are_refused():
    """The library would hand on the embedding itself in place of its tokens."""
    with pytest.raises(UserError, match="cond_dim 64 needs a CLIP of another embedding size"):
        build_unet(TOY.decoder.unets[0], 1, 64)
