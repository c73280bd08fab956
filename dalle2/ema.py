"""Averages of the weights whose length is chosen after training (post-hoc EMA).

Karras et al. 2024 (EDM2, arXiv 2312.02696), sec. 3 and appendix C: training tracks two averages
whose length grows with the step and keeps snapshots of them; any other length, at any step with a
snapshot, is a linear combination of these. A length is `sigma_rel`, the standard deviation of the
average's profile over training as a share of the steps so far.

PostHocEMA of ema-pytorch is not used: it waits for the device at every update, updates tensor by
tensor, and its snapshots are pickles that are written in place and all read again at each use.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dalle2.checkpoint import load_export, save_export
from dalle2.config import UserError
from dalle2.sharding import scatter_like

SIGMA_RELS = 0.05, 0.1  # tracked in training, as in EDM2
MAX_SIGMA_REL = 0.28    # the flat average over all of training has 0.289
NEGLIGIBLE = 1e-6       # weight of a snapshot that is not read


class PowerAverages:
    """Power-function averages of the trained parameters of `module`, on its device, or shared out
    among the processes as they are. Build it where the parameters are in their final place."""

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


def list_snapshots(run_dir, step=None):
    """{(step, sigma_rel): path} of the snapshots in `run_dir` up to `step`, oldest first."""
    found = {}
    for path in sorted(Path(run_dir).glob("averages/step_*.safetensors")):
        match = re.fullmatch(r"step_(\d+)_sigma_([\d.]+)\.safetensors", path.name)
        if match and (step is None or int(match[1]) <= step):
            found[int(match[1]), float(match[2])] = path
    return found


def solve_weights(snapshots, step, sigma_rel):
    """(weights (n,), mismatch) of the combination of snapshots, a list of n (step, sigma_rel), that
    comes closest to the average of length `sigma_rel` at `step`. EDM2, algorithm 3; mismatch: the
    norm of what is left between the two profiles, as a share of the wanted one's.

    Unlike there the weights add up to 1, for networks that are not indifferent to the scale of
    their weights: with fewer than some 16 snapshots they would add up to 0.8 to 1.04.
    """
    t, gamma = (np.array(values, np.float64) for values in zip(
        *((t, compute_gamma(sigma)) for t, sigma in [*snapshots, (step, sigma_rel)])))
    dots = _compute_dot(t[:, None], gamma[:, None], t, gamma)
    dots /= dots[-1, -1]                       # of the wanted profile with itself
    dots, wanted = dots[:-1, :-1], dots[:-1, -1]
    ones = np.ones((len(wanted), 1))
    system = np.block([[dots, ones], [ones.T, np.zeros((1, 1))]])
    weights = np.linalg.solve(system, np.append(wanted, 1))[:-1]
    return weights, max(0, 1 - 2 * weights @ wanted + weights @ dots @ weights) ** 0.5


def _compute_dot(t_a, gamma_a, t_b, gamma_b):
    """Inner product of two profiles, (gamma + 1) / t (x / t)^gamma for x from 0 to t: `p_dot_p` of
    EDM2, algorithm 3."""
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / (
        (gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def synthesize(run_dir, step, sigma_rel):
    """The average of length `sigma_rel` at `step` from the snapshots up to it, one file in memory
    at a time: {name: tensor}, fp32 on the CPU. Raises UserError where there is none or one is
    damaged."""
    snapshots, state = list_snapshots(run_dir, step), {}
    if not snapshots:
        raise UserError(f"--run_dir: {run_dir} holds no averages up to step {step}")
    weights, _ = solve_weights(list(snapshots), step, sigma_rel)
    for path, weight in zip(snapshots.values(), weights.tolist()):
        if abs(weight) < NEGLIGIBLE:
            continue
        for name, value in load_export(path, "snapshot", "--run_dir")[1].items():
            if value.is_floating_point():
                state.setdefault(name, torch.zeros(value.shape)).add_(value, alpha=weight)
            else:
                state[name] = value  # of the newest
    return state
