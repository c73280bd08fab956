"""Does the faster code train the same? 200 steps with the stock modules and with ours, fp32, the
same seed: the largest relative difference of the losses.

Runs train_prior.py and train_decoder.py on a data set made by data/toy_coco.py; the stock modules
are given what they lack: a drawn dropout instead of one that they draw themselves. A third run, the
control, is of the stock modules again, their first weights changed by a rounding error.

    python -m benchmarks.same_curves --data output/quickstart/toy_coco \\
        --clip_pretrained output/quickstart/clip/clip.safetensors --output_dir output/same_curves
"""

import argparse
import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from dalle2 import models
from dalle2.config import PRESETS
from dalle2.fast_modules import library
from dalle2.logger import read_metrics

ROOT = Path(__file__).resolve().parents[1]

warnings.filterwarnings("ignore")

WAYS = "ours", "stock", "control"
ROUNDING = 1e-7  # relative, about half a unit in the last place of fp32
RUNS = {"prior": ["train_prior.py"], "unet1": ["train_decoder.py", "--unet_number", "1"],
        "unet2": ["train_decoder.py", "--unet_number", "2"]}


class StockPrior(library.DiffusionPriorNetwork):
    """Its samplers are not ours; here the text is read again at every call."""

    def read_text(self, text_embed, text_encodings, drop):
        return dict(text_embed=text_embed, text_encodings=text_encodings, text_cond_drop_prob=drop)

    def forward(self, *args, prefix=None, **kwargs):
        return super().forward(*args, **(prefix or kwargs))


class StockUnet(library.Unet):
    def forward(self, *args, image_embed=None, **kwargs):
        return super().forward(*args, image_embed=image_embed, **kwargs)


def use_stock_modules(way):
    stock = {library.DiffusionPriorNetwork: StockPrior, library.Unet: StockUnet}

    @torch.no_grad()
    def keep(network):
        network.__class__ = stock[type(network)]
        generator = torch.Generator().manual_seed(0)
        if way == "control":
            for weight in network.parameters():
                weight.mul_(1 + ROUNDING * torch.randn(weight.shape, generator=generator))
        return network
    models.swap_modules = keep


def let_dropout_be_drawn():
    draw = library.prob_mask_like
    library.prob_mask_like = lambda shape, prob, device: prob > 0.5 if torch.is_tensor(prob) \
        else draw(shape, prob, device)


def use_doubles():
    """Networks in fp64, called and answering in fp32. The library's norms have another epsilon
    wherever the precision is not fp32."""
    swap = models.swap_modules

    def widen(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    def widen_all(module, args, kwargs):
        return tuple(map(widen, args)), {name: widen(value) for name, value in kwargs.items()}

    def build(network):
        network = swap(network).double()
        for module in network.modules():
            if hasattr(module, "fp16_eps"):
                module.fp16_eps = module.eps
            if module is network or isinstance(module, library.SinusoidalPosEmb):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that data/toy_coco.py wrote")
    parser.add_argument("--clip_pretrained", required=True)
    parser.add_argument("--output_dir", default="output/same_curves")
    parser.add_argument("--num_steps", type=int, default=200)
    parser.add_argument("--adamw", action="store_true", help="AdamW at 1e-4 in place of Muon, "
                        "which makes much of a rounding error")
    parser.add_argument("--double", action="store_true", help="networks in fp64: tells rounding "
                        "from another function")
    parser.add_argument("--networks", nargs="+", default=list(RUNS), choices=RUNS)
    args = parser.parse_args()
    if args.adamw:
        use_adamw()
    let_dropout_be_drawn()  # no difference to ours
    for way in WAYS:
        if way != "ours":
            use_stock_modules(way)
        if args.double:
            use_doubles()
        for name in args.networks:
            script, *flags = RUNS[name]
            sys.argv = [script, *flags, "--preset", "toy", "--num_steps", str(args.num_steps),
                        "--output_dir", f"{args.output_dir}/{way}/{name}", "--log_with", "none",
                        "--store_dir", f"{args.output_dir}/store",
                        "--train_img_path", f"{args.data}/train",
                        "--train_annot_path", f"{args.data}/captions_train.json",
                        "--val_annot_path", "", "--clip_pretrained", args.clip_pretrained]
            runpy.run_path(str(ROOT / script), run_name="__main__")
    print(f"\n| network | loss at step 1, {args.num_steps} | against stock | first 50 steps | all "
          "| last 50, mean |\n|---|---|---|---|---|---|")
    for name in args.networks:
        losses = {way: [row["loss"] for row in read_metrics(next(
            Path(args.output_dir, way, name).rglob("metrics.jsonl")))] for way in WAYS}
        stock = losses.pop("stock")
        for way, other in losses.items():
            relative = [abs(a - b) / abs(b) for a, b in zip(other, stock, strict=True)]
            print(f"| {name} | {stock[0]:.4f}, {stock[-1]:.4f} | {way} | {max(relative[:50]):.1e} "
                  f"| {max(relative):.1e} | {sum(relative[-50:]) / 50:.1e} |")


if __name__ == "__main__":
    main()
