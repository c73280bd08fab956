"""What each preset costs: the table of docs/presets.md.

Parameters and FLOPs (a multiply-add counts as two) are exact: they are counted on the meta device.
Kernels: the operations that PyTorch launches in one forward and backward pass, without views and
allocations. Their number does not depend on the batch size.
Memory: what a training step in fp32 holds on one device: weights, gradients, two Adam moments and
averaged weights (20 bytes a parameter), and the activations of the whole batch that autograd keeps
for the backward pass. The last columns: how many samples with bf16 activations fit beside the
weights into a GPU of 24 and of 80 GB.

    python -m benchmarks.preset_costs
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    build_networks,
    count_saved_bytes,
    get_embed_dim,
    print_header,
    print_row,
)
from dalle2 import cli
from dalle2.config import PRESETS

NUM_SAMPLES = 2  # in the batch that is traced


class KernelCounter(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += not (function.is_view or name.startswith(("empty", "detach", "_unsafe_view")))
        return function(*args, **(kwargs or {}))


def count_costs(network, call):
    """(parameters, FLOPs of the forward pass of one sample, bytes that it keeps for the backward
    pass, kernels of forward and backward pass) of `network`, which `call` computes."""
    with FlopCounterMode(display=False) as flops:
        saved_bytes = count_saved_bytes(call)
    with KernelCounter() as kernels:
        call().mean().backward()
    parameters = sum(p.numel() for p in network.parameters())
    return (parameters, flops.get_total_flops() / NUM_SAMPLES, saved_bytes / NUM_SAMPLES,
            kernels.count)


def list_networks(preset_name):
    """list of (label, config, *count_costs) of the networks of a preset."""
    preset, embed_dim = PRESETS[preset_name], get_embed_dim(preset_name)
    with torch.device("meta"):
        prior, unets = build_networks(preset, embed_dim)
        t = torch.zeros(NUM_SAMPLES, dtype=torch.long)
        embed = torch.zeros(NUM_SAMPLES, embed_dim)
        encodings = torch.zeros(NUM_SAMPLES, preset.prior.max_text_len, embed_dim)
        networks = [("prior", preset.prior, *count_costs(prior, lambda: prior(
            embed, t, text_embed=embed, text_encodings=encodings)))]
        for number, (unet, config) in enumerate(zip(unets, preset.decoder.unets), start=1):
            side = config.crop_size or config.image_size
            x_t = torch.zeros(NUM_SAMPLES, 3, side, side)
            condition = dict(image_embed=embed) if number == 1 else dict(
                image_embed=None, lowres_cond_img=x_t, lowres_noise_level=t)
            networks.append((f"unet {number}, {config.image_size} px", config,
                             *count_costs(unet, lambda: unet(x_t, t, **condition))))
    return networks


def count_fitting_rows(gigabytes, parameters, saved_bytes):
    """Samples whose activations fit, a power of two; a tenth of the GPU is left to workspaces."""
    room = 0.9e9 * gigabytes - 20 * parameters
    return 2 ** int(math.log2(room / (saved_bytes / 2))) if room > saved_bytes else 0


def main():
    cli.Parser(__doc__.splitlines()[0]).parse_args()
    print_header("preset", "network", "parameters", "GFLOP a sample", "batch", "TFLOP a step",
                 "kernels", "GB, fp32", "rows in 24 GB", "80 GB")
    for name in PRESETS:
        for label, config, parameters, flops, saved_bytes, kernels in list_networks(name):
            batch_size = config.train.batch_size
            memory = 20 * parameters + saved_bytes * batch_size
            print_row(name, label, f"{parameters / 1e6:.1f} M", f"{3 * flops / 1e9:.2f}",
                      batch_size, f"{3 * flops * batch_size / 1e12:.2f}", kernels,
                      f"{memory / 1e9:.1f}", *(count_fitting_rows(size, parameters, saved_bytes)
                                               for size in (24, 80)))


if __name__ == "__main__":
    cli.run(main)
