"""A training step never waits for the device: nothing in it reads a number back to the CPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from dalle2.clip import ClipLoss, build_clip, preprocess_image
from dalle2.config import PRESETS
from dalle2.diffusion import Diffusion, build_diffusion
from dalle2.losses import compute_prior_loss, compute_unet_loss
from dalle2.models import build_prior, build_unet
from dalle2.train_loop import TrainState

TOY, D, B = PRESETS["toy"], 128, 4
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


def make_step(name, device):
    """A function that takes one training step of the toy preset's network, with Muon."""
    torch.manual_seed(0)
    embed = torch.randn(B, D)
    if name == "clip":
        config, module = TOY.clip, build_clip(TOY.clip)
        clip_loss = ClipLoss(rank=0, world_size=1)
        batch = {"image": torch.zeros(B, 3, 48, 48, dtype=torch.uint8),
                 "text_tokens": torch.ones(B, config.context_length, dtype=torch.long)}

        def compute_loss(module, batch, random):
            return clip_loss(*module(preprocess_image(batch["image"], config.image_size),
                                     batch["text_tokens"]))
    elif name == "prior":
        config, module = TOY.prior, build_prior(TOY.prior, D)
        compute_loss = partial(compute_prior_loss, config=config, diffusion=Diffusion(
            config.timesteps, config.beta_schedule, predict_x_start=True, device=device))
        batch = {"image_embed": embed, "text_embed": embed, "text_encodings": torch.zeros(B, 26, D)}
    else:
        number = int(name[-1])
        config = TOY.decoder.unets[number - 1]
        module = build_unet(config, number, D)
        compute_loss = partial(compute_unet_loss, config=config,
                               diffusion=build_diffusion(config, device))
        side = config.crop_size or config.image_size
        batch = {"image": torch.zeros(B, 3, side, side, dtype=torch.uint8)}
        batch |= {"image_embed": embed} if number == 1 else {
            "lowres_cond_img": torch.zeros(B, 3, 32, 32, dtype=torch.uint8),
            "corner": torch.zeros(B, 2, dtype=torch.long)}
    train = replace(config.train, batch_size=B, snapshot_every=1)
    state = TrainState(module, train, Accelerator(cpu=device == "cpu"))
    if device == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}

    def take_step(step):
        state.compute_gradients(step, batch, compute_loss)
        state.update_weights(step, lr_factor=1.0)
    return take_step


@pytest.mark.parametrize("name", ["clip", "prior", "unet1", "unet2"])
def test_a_step_waits_for_nothing(name):
    take_step = make_step(name, "cpu")
    take_step(0)  # caches are filled
    with WaitCounter() as counter:
        take_step(1)
    assert counter.waits == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["clip", "prior", "unet1", "unet2"])
def test_a_step_on_a_gpu_waits_for_nothing(name):
    take_step = make_step(name, "cuda")
    take_step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
