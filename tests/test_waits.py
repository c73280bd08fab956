"""A training step never waits for the device: nothing in it reads a number back to the CPU."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import TOY, RandomStore, build_network
from torch.utils._python_dispatch import TorchDispatchMode

from dalle2.clip import build_clip
from dalle2.graphs import EAGER_CALLS
from dalle2.rng import BatchRandom
from dalle2.tasks import ClipTask, PriorTask, UnetTask
from dalle2.train_state import TrainState

B = 4
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}


class WaitCounter(TorchDispatchMode):
    """Collects the operations at which a GPU would keep the CPU waiting."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1])
        if name in WAITING or masks:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def make_step(name, device, **options):
    """A function that takes one training step of the toy preset's network, with Muon, and returns
    its loss. options: of TrainConfig."""
    torch.manual_seed(0)
    accelerator, store = Accelerator(cpu=device == "cpu"), RandomStore()
    if name == "clip":
        task, module = ClipTask(TOY.clip, accelerator, store), build_clip(TOY.clip)
    else:
        module = build_network(TOY, name)
        task = PriorTask(TOY.prior, accelerator, store) if name == "prior" else UnetTask(
            int(name[-1]), TOY.decoder, accelerator, store)
    batch = task.load(store, np.arange(B), BatchRandom("data", batch_size=B))
    if device == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    train = replace(task.config.train, batch_size=B, snapshot_every=1, **options)
    state = TrainState(module, train, accelerator, can_split=task.can_split)

    def take_step(step):
        loss = state.compute_gradients(step, batch, task.loss)
        state.update_weights(step, lr_factor=1.0)
        return loss
    return take_step


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", ["clip", "prior", "unet1", "unet2"])
def test_a_step_waits_for_nothing(name, device):
    take_step = make_step(name, device)
    for step in range(EAGER_CALLS + 1 if device == "cuda" else 1):
        take_step(step)  # caches are filled, and the CUDA graph is recorded
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with WaitCounter() if device == "cpu" else nullcontext() as counter:
            take_step(EAGER_CALLS + 1)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert device == "cuda" or counter.waits == []


@needs_gpu
@pytest.mark.parametrize("name", ["prior", "unet1", "unet2"])
def test_a_cuda_graph_computes_what_its_kernels_would(name):
    """The random numbers of each step too: others would change the loss by far more."""
    losses = []
    for cuda_graphs in (True, False):
        take_step = make_step(name, "cuda", cuda_graphs=cuda_graphs)
        losses.append(torch.stack([take_step(step) for step in range(EAGER_CALLS + 5)]))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
