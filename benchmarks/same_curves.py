"""Losses of training with the library's modules and with our faster ones: are they the same?

Runs train_prior.py and train_decoder.py with preset toy in fp32 from the same seed, on a data set
drawn by data/toy_coco.py, and prints the largest relative difference of the losses. The library's
modules draw their dropout themselves; here they are given the drawn values, as ours are. A third
run, the control, uses the library's modules again, with initial weights changed by a rounding
error.

    python -m benchmarks.same_curves --data output/quickstart/toy_coco \\
        --clip_pretrained output/quickstart/clip/clip.safetensors --output_dir output/same_curves
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import print_header, print_row
from dalle2 import cli, models
from dalle2.config import PRESETS
from dalle2.fast_modules import library
from dalle2.logger import read_metrics

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = "ours", "stock", "control"
ROUNDING = 1e-7  # relative, about half a unit in the last place of fp32
RUNS = {"prior": ["train_prior.py"], "unet1": ["train_decoder.py", "--unet_number", "1"],
        "unet2": ["train_decoder.py", "--unet_number", "2"]}


def main():
    args = parse_args()
    if args.adamw:
        use_adamw()
    accept_drawn_dropout()  # changes nothing for our modules
    for variant in VARIANTS:
        if variant != "ours":
            use_stock_modules(variant)
        if args.double:
            use_doubles()
        for name in args.networks:
            train(args, name, f"{args.output_dir}/{variant}/{name}")
    print()
    print_header("network", f"loss at step 1, {args.num_steps}", "against stock", "first 50 steps",
                 "all", "last 50, mean")
    for name in args.networks:
        losses = {variant: read_losses(f"{args.output_dir}/{variant}/{name}")
                  for variant in VARIANTS}
        stock = losses.pop("stock")
        for variant, other in losses.items():
            relative = [abs(a - b) / abs(b) for a, b in zip(other, stock, strict=True)]
            print_row(name, f"{stock[0]:.4f}, {stock[-1]:.4f}", variant,
                      f"{max(relative[:50]):.1e}", f"{max(relative):.1e}",
                      f"{sum(relative[-50:]) / len(relative[-50:]):.1e}")


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that data/toy_coco.py wrote")
    parser.add_argument("--clip_pretrained", required=True,
                        help="CLIP, a file that train_clip.py wrote")
    parser.add_argument("--output_dir", default="output/same_curves")
    parser.add_argument("--num_steps", type=cli.at_least(1), default=200)
    parser.add_argument("--adamw", action="store_true", help="train with AdamW at 1e-4 instead of "
                        "Muon, which amplifies rounding errors")
    parser.add_argument("--double", action="store_true", help="compute the networks in fp64, to "
                        "tell rounding errors from a different function")
    parser.add_argument("--networks", nargs="+", default=list(RUNS), choices=RUNS)
    return parser.parse_args()


def train(args, name, output_dir):
    script, *flags = RUNS[name]
    sys.argv = [script, *flags, "--preset", "toy", "--num_steps", str(args.num_steps),
                "--output_dir", output_dir, "--log_with", "none",
                "--store_dir", f"{args.output_dir}/store",
                "--train_img_path", f"{args.data}/train",
                "--train_annot_path", f"{args.data}/captions_train.json",
                "--val_annot_path", "", "--clip_pretrained", args.clip_pretrained]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def read_losses(run_dir):
    return [row["loss"] for row in read_metrics(next(Path(run_dir).rglob("metrics.jsonl")))]


# ----------------------------------------------------------------------------------------------
# changes to the modules and to the preset, for the rest of the process


class StockPrior(library.DiffusionPriorNetwork):
    """Called as our prior is. Its text is read again at every call."""

    def read_text(self, text_embed, text_encodings, drop):
        return dict(text_embed=text_embed, text_encodings=text_encodings, text_cond_drop_prob=drop)

    def forward(self, *args, prefix=None, **kwargs):
        return super().forward(*args, **(prefix or kwargs))


class StockUnet(library.Unet):
    def forward(self, *args, image_embed=None, **kwargs):
        return super().forward(*args, image_embed=image_embed, **kwargs)


def use_stock_modules(variant):
    stock = {library.DiffusionPriorNetwork: StockPrior, library.Unet: StockUnet}

    @torch.no_grad()
    def keep(network):
        network.__class__ = stock[type(network)]
        generator = torch.Generator().manual_seed(0)
        if variant == "control":
            for weight in network.parameters():
                weight.mul_(1 + ROUNDING * torch.randn(weight.shape, generator=generator))
        return network
    models.swap_modules = keep


def accept_drawn_dropout():
    """The library draws its dropout from a probability; let it take zeros and ones as well."""
    draw = library.prob_mask_like
    library.prob_mask_like = lambda shape, prob, device: prob > 0.5 if torch.is_tensor(prob) \
        else draw(shape, prob, device)


def use_doubles():
    """Computes the networks in fp64, with fp32 inputs and outputs. The library's norms use another
    epsilon if the precision is not fp32; they are given the one for fp32."""
    swap = models.swap_modules

    def widen(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    def widen_all(module, args, kwargs):
        return tuple(map(widen, args)), {name: widen(value) for name, value in kwargs.items()}

    def build(network):
        network = swap(network).double()
        called_in_fp32 = [network]
        for module in network.modules():
            if hasattr(module, "fp16_eps"):
                module.fp16_eps = module.eps
            if isinstance(module, library.SinusoidalPosEmb):
                called_in_fp32.append(module)
            if isinstance(module, library.MLP):
                called_in_fp32.append(module.net)
        for module in called_in_fp32:
            module.register_forward_pre_hook(widen_all, with_kwargs=True)
        network.register_forward_hook(lambda network, args, output: output.float())
        return network
    models.swap_modules = build


def use_adamw():
    toy = PRESETS["toy"]

    def change(config):
        return replace(config, train=replace(config.train, muon_lr=0.0, lr=1e-4))
    PRESETS["toy"] = replace(toy, prior=change(toy.prior), decoder=replace(
        toy.decoder, unets=tuple(map(change, toy.decoder.unets))))


if __name__ == "__main__":
    cli.run(main)
