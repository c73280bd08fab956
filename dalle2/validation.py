"""Validation on fixed pictures, noise and timesteps, shared among the processes of a launch."""

import torch
from accelerate.utils import gather_object

ROWS = 64  # validated at a time; their noise is drawn for so many, whatever the batch of training


def map_rows(function, count, accelerator=None):
    """`function(rows)` of every slice of ROWS of `count` rows -> (n, ...), joined: (count, ...) on
    the CPU, the same in every process.

    Each process calls it for its share of the slices, and all equally often, since networks that
    are shared out are gathered by all: the last slice is repeated where there are too few. Without
    an accelerator this process does all of it.
    """
    starts = list(range(0, count, ROWS))
    index, processes = (accelerator.process_index, accelerator.num_processes) if accelerator \
        else (0, 1)
    own = starts[index::processes]
    own += starts[-1:] * (-(-len(starts) // processes) - len(own))
    found = [(start, function(slice(start, min(start + ROWS, count))).cpu()) for start in own]
    found = dict(found if processes == 1 else gather_object(found))
    return torch.cat([found[start] for start in starts])


def summarize_by_quartile(losses, t, timesteps):
    """losses (N,) at timesteps t (N,) -> {"val_loss": mean, "val_loss_q1": mean over the lowest
    quarter of the timesteps, ..., "val_loss_q4"}."""
    quartile = t * 4 // timesteps
    row = {"val_loss": losses.mean().item()}
    for k in range(4):
        row[f"val_loss_q{k + 1}"] = losses[quartile == k].mean().item()
    return row


def compute_fixed_timesteps(count, timesteps):
    """(count,) timesteps: evenly spread, in a fixed random order."""
    t = torch.arange(count) * timesteps // count
    return t[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
