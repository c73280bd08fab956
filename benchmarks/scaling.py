"""How long training a preset should take on 1, 8 and 64 GPUs: a cost model, not a measurement.

The four parts of a step overlap, so it takes as long as the longest of them:
  compute     FLOPs of three forward passes / (matrix rate x efficiency)
  memory      bytes / memory rate: activations written and read twice, in bf16; weights, gradients,
              two moments and averaged weights read and written once, in fp32
  all-reduce  2 (G - 1) / G x 4 bytes a parameter / link rate of a GPU
  dispatch    kernels of a pass x passes x the time PyTorch needs to launch a kernel; a batch takes
              as many passes as it needs for its activations to fit into the memory of a GPU

    python -m benchmarks.scaling --preset base --gigabytes 80
"""

import math

from benchmarks.common import print_header, print_row
from benchmarks.preset_costs import count_fitting_rows, list_networks
from dalle2 import cli
from dalle2.config import PRESETS

MATRIX_RATE = 790e12     # bf16 FLOP/s of one H200, as measured by others
MEMORY_RATE = 4.3e12     # bytes a second, likewise
LINK_RATE = {1: float("inf"), 8: 300e9, 64: 45e9}  # bytes/s of a GPU: NVLink, 400 Gb/s Ethernet
DISPATCH = 5.5e-6        # seconds that PyTorch takes to launch a kernel, as measured by others
EFFICIENCY = 0.4         # assumed share of the matrix rate that the networks reach


def compute_step_seconds(parameters, flops, saved_bytes, kernels, batch_size, num_gpus, efficiency,
                         rows):
    """{part: seconds} of a step. flops and saved_bytes are those of one sample's forward pass; each
    GPU computes `rows` samples at a time."""
    samples = batch_size / num_gpus
    return {"compute": 3 * flops * samples / (MATRIX_RATE * efficiency),
            "memory": (3 * saved_bytes / 2 * samples + 10 * 4 * parameters) / MEMORY_RATE,
            "all-reduce": 2 * (num_gpus - 1) / num_gpus * 4 * parameters / LINK_RATE[num_gpus],
            "dispatch": kernels * math.ceil(samples / rows) * DISPATCH}


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--gigabytes", type=cli.at_least(1), default=80, help="memory of a GPU")
    args = parser.parse_args()
    print_header("network", "GPUs", "rows at a time", "compute, ms", "memory, ms", "all-reduce, ms",
                 "dispatch, ms", "bound by", "hours", "floor, hours")
    total_hours = {num_gpus: 0.0 for num_gpus in LINK_RATE}
    for label, config, parameters, flops, saved_bytes, kernels in list_networks(args.preset):
        train = config.train
        for num_gpus in LINK_RATE:
            rows = max(1, min(train.batch_size // num_gpus,
                              count_fitting_rows(args.gigabytes, parameters, saved_bytes)))
            seconds, floor = (compute_step_seconds(parameters, flops, saved_bytes, kernels,
                                                   train.batch_size, num_gpus, efficiency, rows)
                              for efficiency in (EFFICIENCY, 1))
            hours = train.num_steps * max(seconds.values()) / 3600
            total_hours[num_gpus] += hours
            print_row(label, num_gpus, rows, *(f"{1e3 * part:.1f}" for part in seconds.values()),
                      max(seconds, key=seconds.get), f"{hours:.1f}",
                      f"{train.num_steps * floor['compute'] / 3600:.1f}")
    print_row("all", *[""] * 7, ", ".join(f"{hours:.1f} on {num_gpus}"
                                          for num_gpus, hours in total_hours.items()), "")


if __name__ == "__main__":
    cli.run(main)
