"""What only a GPU can show; skipped without one."""

import copy

import pytest
import torch
from helpers import make_network

from dalle2.fast_modules import restore_modules
from dalle2.rng import BatchRandom

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("name", ["prior", "unet1", "unet2"])
def test_networks_equal_the_stock_ones_in_fp32(name):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network, args, kwargs = make_network(name, "cuda")
    stock = restore_modules(copy.deepcopy(network))
    torch.testing.assert_close(network(*args, **kwargs), stock(*args, **kwargs), atol=1e-4,
                               rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["prior", "unet1", "unet2"])
def test_bf16_is_near_fp32_forward_and_backward(name, compiled):
    network, args, kwargs = make_network(name, "cuda")
    wanted = network(*args, **kwargs)
    wanted.square().mean().backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    if compiled:
        network.compile()
    with torch.autocast("cuda", torch.bfloat16):
        found = network(*args, **kwargs)
    found.float().square().mean().backward()
    assert (found - wanted).norm() / wanted.norm() < 0.05
    ours = [p.grad for p in network.parameters() if p.grad is not None]
    one, other = (torch.cat([g.flatten() for g in part]) for part in (ours, gradients))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99


def test_what_the_cpu_draws_is_the_same_on_the_gpu():
    """Validation draws so; training draws on the GPU, which has other numbers."""
    cpu, same, other = (
        BatchRandom(0, batch_size=8, rows=slice(2, 6), device=device, drawn_on=drawn_on)
        for device, drawn_on in [("cpu", None), ("cuda", "cpu"), ("cuda", None)])
    for random in (cpu, same, other):
        random.found = random.randn(3), random.rand(2), random.randint(1000)
    for wanted, found, unlike in zip(cpu.found, same.found, other.found):
        assert found.is_cuda and torch.equal(found.cpu(), wanted)
        assert not torch.equal(unlike.cpu(), wanted)
