"""Counts what each preset costs and prints the table of the README.

Parameters and multiply-adds (counted twice) are exact, counted on the meta device. Memory is what a
training step holds in fp32: weights, gradients, two Adam moments and the average (20 bytes a
parameter), and what autograd keeps for the backward pass, counted by its hooks, for one of the
`gradient_accumulation_steps` parts of the batch, on a single device.

    python benchmarks/preset_costs.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dalle2.config import PRESETS  # noqa: E402
from dalle2.models import build_prior, build_unet  # noqa: E402

EMBED_DIM = {"toy": 128}  # of the CLIP that goes with the preset; ViT-L/14 has 768
SAMPLES = 2  # traced at a time


def count(network, call):
    """(parameters, FLOPs of a sample's forward, bytes kept for the backward of a sample)."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage._cdata] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with FlopCounterMode(display=False) as counter:
            call()
    parameters = sum(p.numel() for p in network.parameters())
    return parameters, counter.get_total_flops() / SAMPLES, sum(kept.values()) / SAMPLES


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


def main():
    print("| preset | network | parameters | GFLOP a sample, step | batch, parts | TFLOP a step "
          "| GB, fp32 |\n|---|---|---|---|---|---|---|")
    for name in PRESETS:
        for label, config, parameters, flops, kept in list_networks(name):
            batch = config.train.batch_size
            parts = config.train.gradient_accumulation_steps
            memory = 20 * parameters + kept * batch / parts
            print(f"| {name} | {label} | {parameters / 1e6:.1f} M | {3 * flops / 1e9:.2f} "
                  f"| {batch} / {parts} | {3 * flops * batch / 1e12:.2f} | {memory / 1e9:.1f} |")


if __name__ == "__main__":
    main()
