"""Averages of any length, from the snapshots that training kept (post-hoc EMA).

Karras et al. 2024 (EDM2, arXiv 2312.02696), sec. 3 and appendix C: an average of another length, at
any step with a snapshot, is a linear combination of the snapshots up to it.
"""

import re
from pathlib import Path

import numpy as np
import torch

from dalle2.checkpoint import load_export
from dalle2.ema import compute_gamma
from dalle2.errors import UserError

MAX_SIGMA_REL = 0.28  # the flat average over all of training has 0.289
NEGLIGIBLE = 1e-6     # weight of a snapshot that is not read


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
        raise UserError(f"{run_dir} holds no averages up to step {step}", "run_dir")
    weights, _ = solve_weights(list(snapshots), step, sigma_rel)
    for path, weight in zip(snapshots.values(), weights.tolist()):
        if abs(weight) < NEGLIGIBLE:
            continue
        for name, value in load_export(path, "snapshot")[1].items():
            if value.is_floating_point():
                state.setdefault(name, torch.zeros(value.shape)).add_(value, alpha=weight)
            else:
                state[name] = value  # of the newest
    return state
