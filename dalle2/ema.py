"""Averages of the weights whose length is chosen after training (post-hoc EMA).

Karras et al. 2024 (EDM2, arXiv 2312.02696), sec. 3 and appendix C: training tracks two averages
whose length grows with the step and keeps snapshots of them, of which `dalle2.tools.averages`
combines any other length. A length is `sigma_rel`, the standard deviation of the average's profile
over training as a share of the steps so far.

PostHocEMA of ema-pytorch is not used: it waits for the device at every update, updates tensor by
tensor, and its snapshots are pickles that are written in place and all read again at each use.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from dalle2.checkpoint import save_export
from dalle2.sharding import scatter_like

SIGMA_RELS = 0.05, 0.1  # tracked in training, as in EDM2


class PowerAverages:
    """Power-function averages of the trained parameters of `module`, on its device, sharded among
    the processes if they are. Build it where the parameters are in their final place."""

    def __init__(self, module, sigma_rels=SIGMA_RELS):
        named = [(name, param) for name, param in module.named_parameters(remove_duplicate=False)
                 if param.requires_grad]
        self.module, self.names = module, [name for name, _ in named]
        self.params = [param.detach() for _, param in named]
        self.averages = {sigma_rel: [param.clone() for param in self.params]
                         for sigma_rel in sigma_rels}

    @torch.no_grad()
    def update(self, step):
        """Takes in the weights after `step`, an int that counts from 1. Eq. 127 of the paper; it
        neither waits for the device nor copies from it."""
        for sigma_rel, average in self.averages.items():
            beta = (1 - 1 / step) ** (compute_gamma(sigma_rel) + 1)
            torch._foreach_lerp_(average, self.params, 1 - beta)

    @torch.no_grad()
    def collect(self):
        """{sigma_rel: state dict}, for save_snapshot: the averages in fp16; buffers and parameters
        that are not trained as the module has them now."""
        return {sigma_rel: self.module.state_dict() | {
                    name: value.half() for name, value in zip(self.names, average)}
                for sigma_rel, average in self.averages.items()}

    def state_dict(self):
        """{str(sigma_rel): {name: tensor}}, in full precision: with it a run resumes exactly."""
        return {str(sigma_rel): dict(zip(self.names, average))
                for sigma_rel, average in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, saved):
        """Takes what state_dict gave, its tensors whole on any device."""
        for sigma_rel, average in self.averages.items():
            for name, value in zip(self.names, average):
                value.copy_(scatter_like(saved[str(sigma_rel)][name], value))


@cache
def compute_gamma(sigma_rel):
    """Exponent of the power function of length `sigma_rel`. EDM2, algorithm 2."""
    return np.roots([1, 7, 16 - sigma_rel ** -2, 12 - sigma_rel ** -2]).real.max().item()


def save_snapshot(run_dir, step, state_dicts, header):
    """Writes what `PowerAverages.collect` gave, tensors whole, as
    `<run_dir>/averages/step_<step>_sigma_<sigma_rel>.safetensors`, one file after the other, each
    whole or not at all. header: the run's, as JSON."""
    for sigma_rel, state in state_dicts.items():
        path = Path(run_dir) / "averages" / f"step_{step:08d}_sigma_{sigma_rel:g}.safetensors"
        save_export(path, "snapshot", {**header, "step": step, "sigma_rel": sigma_rel,
                                       "gamma": compute_gamma(sigma_rel)}, state)
