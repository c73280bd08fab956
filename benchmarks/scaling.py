"""What training a preset should take on 1, 8 and 64 GPUs: a cost model on paper, no measurement.

A step takes the longest of what its parts take, which overlap:
  compute     FLOPs of three forwards / (matrix rate x efficiency)
  memory      bytes of activations written and read twice, in bf16, and of weights, gradients, two
              moments and the average read and written once, in fp32 / memory rate
  all-reduce  2 (G - 1) / G x 4 bytes a parameter / link rate of a GPU
  dispatch    kernels of a part x parts x what PyTorch takes to launch one; parts: as few as let
              their activations fit into the memory of a GPU
    python -m benchmarks.scaling --preset base --gigabytes 80
"""

import argparse
import math

from benchmarks.preset_costs import count_fitting_rows, list_networks
from dalle2.config import PRESETS

MATRIX_RATE = 790e12     # bf16 FLOP/s of one H200, as measured by others
MEMORY_RATE = 4.3e12     # bytes a second, likewise
LINK_RATE = {1: float("inf"), 8: 300e9, 64: 45e9}  # bytes/s of a GPU: NVLink, 400 Gb/s Ethernet
DISPATCH = 5.5e-6        # seconds that PyTorch takes to launch a kernel, as measured by others
EFFICIENCY = 0.4         # share of the matrix rate that the networks are hoped to reach


def compute_step_seconds(parameters, flops, kept, kernels, batch_size, num_gpus, efficiency, rows):
    """{part: seconds} of a step; flops and kept (bytes) are those of a sample's forward; rows are
    computed at a time."""
    samples = batch_size / num_gpus
    return {"compute": 3 * flops * samples / (MATRIX_RATE * efficiency),
            "memory": (3 * kept / 2 * samples + 10 * 4 * parameters) / MEMORY_RATE,
            "all-reduce": 2 * (num_gpus - 1) / num_gpus * 4 * parameters / LINK_RATE[num_gpus],
            "dispatch": kernels * math.ceil(samples / rows) * DISPATCH}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--gigabytes", type=int, default=80, help="memory of a GPU")
    args = parser.parse_args()
    print("| network | GPUs | rows at a time | compute, ms | memory, ms | all-reduce, ms "
          "| dispatch, ms | bound by | hours | floor, hours |\n" + "|---" * 10 + "|")
    whole = {gpus: 0.0 for gpus in LINK_RATE}
    for label, config, parameters, flops, kept, kernels in list_networks(args.preset):
        for gpus in LINK_RATE:
            train = config.train
            rows = min(train.batch_size // gpus,
                       count_fitting_rows(args.gigabytes, parameters, kept))
            parts, floor = (compute_step_seconds(parameters, flops, kept, kernels,
                                                 train.batch_size, gpus, efficiency, rows)
                            for efficiency in (EFFICIENCY, 1))
            hours = train.num_steps * max(parts.values()) / 3600
            whole[gpus] += hours
            print(f"| {label} | {gpus} | {rows} | " + " | ".join(
                f"{1e3 * part:.1f}" for part in parts.values())
                + f" | {max(parts, key=parts.get)} | {hours:.1f} "
                f"| {train.num_steps * floor['compute'] / 3600:.1f} |")
    print("| all | | | | | | | | " + ", ".join(
        f"{hours:.1f} on {gpus}" for gpus, hours in whole.items()) + " | |")


if __name__ == "__main__":
    main()
