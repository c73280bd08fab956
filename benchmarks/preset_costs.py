"""Counts what each preset costs and prints the table of the README.

Parameters and multiply-adds (counted twice) are exact, counted on the meta device. Kernels: what
PyTorch would launch for the forward and backward pass of any number of rows, its operations other
than views and allocations. Memory is what a training step holds in fp32: weights, gradients, two
Adam moments and the average (20 bytes a parameter), and what autograd keeps for the backward pass,
counted by its hooks, for the whole batch on a single device; and the rows whose activations, in
bf16, fit beside the weights into a card of 24 and of 80 GB.

    python -m benchmarks.preset_costs
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shared import EMBED_DIM, count_kept_bytes
from dalle2.config import PRESETS
from dalle2.models import build_prior, build_unet

SAMPLES = 2  # traced at a time


class KernelCounter(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += not (function.is_view or name.startswith(("empty", "detach", "_unsafe_view")))
        return function(*args, **(kwargs or {}))


def count(network, call):
    """(parameters, FLOPs of a sample's forward, bytes kept for the backward of a sample, kernels of
    forward and backward)."""
    with FlopCounterMode(display=False) as counter:
        kept = count_kept_bytes(call)
    with KernelCounter() as kernels:
        call().mean().backward()
    parameters = sum(p.numel() for p in network.parameters())
    return (parameters, counter.get_total_flops() / SAMPLES, kept / SAMPLES,
            kernels.count)


def list_networks(name):
    """(label, config, network, call) of each network of a preset, on the meta device."""
    preset, dim = PRESETS[name], EMBED_DIM.get(name, 768)
    with torch.device("meta"):
        t = torch.zeros(SAMPLES, dtype=torch.long)
        embed = torch.zeros(SAMPLES, dim)
        prior = build_prior(preset.prior, dim)
        encodings = torch.zeros(SAMPLES, preset.prior.max_text_len, dim)
        networks = [("prior", preset.prior, prior, lambda: prior(
            embed, t, text_embed=embed, text_encodings=encodings))]
        for number, config in enumerate(preset.decoder.unets, start=1):
            unet = build_unet(config, number, dim)
            side = config.crop_size or config.image_size
            x = torch.zeros(SAMPLES, 3, side, side)
            condition = dict(image_embed=embed) if number == 1 else dict(
                image_embed=None, lowres_cond_img=x, lowres_noise_level=t)
            networks.append((f"unet {number}, {config.image_size} px", config, unet,
                             lambda u=unet, x=x, c=condition: u(x, t, **c)))
        for label, config, network, call in networks:
            yield label, config, *count(network, call)


def count_fitting_rows(gigabytes, parameters, kept):
    """Rows whose activations fit, as a power of two; the rest of the card is left to workspaces."""
    room = 0.9e9 * gigabytes - 20 * parameters
    return 2 ** int(math.log2(room / (kept / 2))) if room > kept else 0


def main():
    print("| preset | network | parameters | GFLOP a sample, step | batch | TFLOP a step | kernels "
          "| GB, fp32 | rows in 24 GB | in 80 GB |\n" + "|---" * 10 + "|")
    for name in PRESETS:
        for label, config, parameters, flops, kept, kernels in list_networks(name):
            batch = config.train.batch_size
            memory = 20 * parameters + kept * batch
            rows = [count_fitting_rows(size, parameters, kept) for size in (24, 80)]
            print(f"| {name} | {label} | {parameters / 1e6:.1f} M | {3 * flops / 1e9:.2f} "
                  f"| {batch} | {3 * flops * batch / 1e12:.2f} | {kernels} | {memory / 1e9:.1f} "
                  f"| {rows[0]} | {rows[1]} |")


if __name__ == "__main__":
    main()
