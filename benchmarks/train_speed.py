"""Speed of training: the published way, the library with cached embeddings, and this project.

(a) published: the networks of preset `seed` in the trainers of dalle2-pytorch, fp32, with a CLIP
    ViT-L/14 (random weights) in every step and captions padded to 77 positions;
(b) stock: the networks of --preset in the same trainers, fp32, with cached embeddings; for the
    prior also with captions padded to 77 positions, which is the library's default;
(c) ours: the same networks as in (b), trained by this project (`dalle2.tasks`); on a GPU also
    without CUDA graphs (eager) and with torch.compile (compiled), on a CPU also in bf16.

All variants run in one process and take turns, a step each; medians over --rounds. The data are
random numbers.

    python -m benchmarks.train_speed --preset base
    python -m benchmarks.train_speed --preset seed --networks unet1 unet2
"""

import contextlib
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from dalle2_pytorch import (
    Decoder,
    DecoderTrainer,
    DiffusionPrior,
    DiffusionPriorTrainer,
    OpenClipAdapter,
)
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    compute_medians,
    count_saved_bytes,
    describe_machine,
    get_embed_dim,
    print_header,
    print_row,
    read_clock,
    time_in_turns,
)
from dalle2 import cli
from dalle2.config import PRESETS
from dalle2.fast_modules import restore_modules
from dalle2.graphs import EAGER_CALLS
from dalle2.models import build_prior, build_unet
from dalle2.tasks import PriorTask, UnetTask
from dalle2.train_state import TrainState

CAPTION_TOKENS = 13   # the mean of COCO
BATCH_SIZES = {"prior": 16, "unet1": 4, "unet2": 8}
OURS = {"ours": {}, "eager": {"cuda_graphs": False}, "channels_last": {"channels_last": True},
        "bf16": {"mixed_precision": "bf16"},
        "compiled": {"compile": True}}  # variants of (c), with what they change in TrainConfig


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--networks", nargs="+", default=list(BATCH_SIZES), choices=BATCH_SIZES)
    parser.add_argument("--variants", nargs="+", default=["published", "stock", "ours"],
                        choices=["published", "stock", *OURS], help="(a), (b), (c), kinds of (c)")
    parser.add_argument("--batch_size", type=cli.at_least(1), help="of every network (None: "
                        + ", ".join(f"{size} for {name}" for name, size in BATCH_SIZES.items())
                        + ")")
    parser.add_argument("--rounds", type=cli.at_least(1), default=5)
    parser.add_argument("--profile", action="store_true",
                        help="print the operations in which the last variant spends the most time")
    parser.add_argument("--json", help="write the figures to this file as well")
    return parser.parse_args()


def main():
    args = parse_args()
    device = cli.pick_device()
    matmul_rates = {"stock": measure_matmul_rate(device, torch.float32)}
    matmul_rates["ours"] = measure_matmul_rate(device, torch.bfloat16) \
        if device.type == "cuda" else matmul_rates["stock"]
    clip = None
    if "published" in args.variants:
        with contextlib.redirect_stdout(sys.stderr):  # the library prints
            clip = OpenClipAdapter("ViT-L-14", None).to(device)
    print(f"{describe_machine()}, preset {args.preset}, medians of {args.rounds}\n")
    print_header("network", "variant", "samples/s", "ms a step", "of it update", "GB", "GFLOP/s",
                 "of a matmul's", "ours is")
    results = {}
    for name in args.networks:
        batch_size = args.batch_size or BATCH_SIZES[name]
        steps = build_steps(args, name, batch_size, device, clip)
        results[name] = measure(steps, args.rounds, device)
        print_network(name, batch_size, results[name], matmul_rates)
        if args.profile:
            print_profile(*list(steps.values())[-1], device.type)
        steps.clear()
        gc.collect()
    print_both_stages(args, results)
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "results": results}, indent=1))


# ----------------------------------------------------------------------------------------------
# the variants: each is a pair of functions (compute gradients, update the weights)


def build_steps(args, name, batch_size, device, clip):
    """{variant: (compute gradients, update the weights)} of one network."""
    preset, steps = args.preset, {}
    if "published" in args.variants:
        steps["(a) published"] = build_stock_step(name, "seed", batch_size, device, clip)
    if "stock" in args.variants:
        if name == "prior":
            steps["(b) stock, 77 positions"] = build_stock_step(name, preset, batch_size, device,
                                                                max_text_len=77)
        steps["(b) stock"] = build_stock_step(name, preset, batch_size, device)
    for variant in [name for name in OURS if name in args.variants]:
        steps[f"(c) {variant}"] = build_our_step(name, preset, batch_size, device, OURS[variant])
    return steps


def build_stock_step(name, preset_name, batch_size, device, clip=None, max_text_len=None):
    """The library's trainers; with `clip` they embed pictures and captions in every step."""
    preset, embed_dim = PRESETS[preset_name], get_embed_dim(preset_name)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no")
    image = torch.rand(batch_size, 3, 256, 256, device=device)
    image_embed = torch.randn(batch_size, embed_dim, device=device)
    if name == "prior":
        config = preset.prior
        config = replace(config, max_text_len=max_text_len or config.max_text_len)
        network = restore_modules(build_prior(config, embed_dim))
        trainer = DiffusionPriorTrainer(
            DiffusionPrior(network, clip=clip, image_embed_dim=embed_dim, cond_drop_prob=0.1),
            accelerator=accelerator, lr=1e-4, wd=1e-2, max_grad_norm=1.0)
        tokens = torch.zeros(batch_size, 77, dtype=torch.long, device=device)
        tokens[:, :CAPTION_TOKENS] = 1000
        encodings = draw_encodings(batch_size, config.max_text_len, embed_dim).to(device)
        # a clone: the library scales its input in place
        inputs = (lambda: dict(text=tokens, image=image)) if clip else (lambda: dict(
            text_embed=image_embed, image_embed=image_embed.clone(), text_encodings=encodings))
        return lambda: trainer(**inputs()), trainer.update
    number, configs = int(name[-1]), preset.decoder.unets
    unets = tuple(restore_modules(build_unet(config, n, embed_dim))
                  for n, config in enumerate(configs, start=1))
    decoder = Decoder(unets, clip=clip, image_sizes=tuple(c.image_size for c in configs),
                      random_crop_sizes=tuple(c.crop_size or None for c in configs),
                      use_noise_for_lowres_cond=True, use_blur_for_lowres_cond=False,
                      learned_variance=False)
    for other in range(len(configs)):  # the trainer would keep its optimizer and average as well
        if other != number - 1:
            decoder.unets[other] = torch.nn.Identity()
    trainer = DecoderTrainer(decoder.to(device), accelerator=accelerator, lr=1e-4, wd=1e-2,
                             max_grad_norm=1.0)
    inputs = {} if clip else dict(image_embed=image_embed)
    return (lambda: trainer(image, unet_number=number, **inputs),
            lambda: trainer.update(unet_number=number))


def build_our_step(name, preset_name, batch_size, device, options):
    preset, embed_dim = PRESETS[preset_name], get_embed_dim(preset_name)
    AcceleratorState._reset_state()
    accelerator = cli.build_accelerator(options.get("mixed_precision", "auto"))
    image_embed = torch.randn(batch_size, embed_dim)
    if name == "prior":
        config = preset.prior
        module, task = build_prior(config, embed_dim), PriorTask(config, accelerator)
        encodings = draw_encodings(batch_size, config.max_text_len, embed_dim)
        batch = {"image_embed": image_embed, "text_embed": image_embed,
                 "text_encodings": encodings.half()}
    else:
        number = int(name[-1])
        config = preset.decoder.unets[number - 1]
        module = build_unet(config, number, embed_dim)
        task = UnetTask(number, preset.decoder, accelerator)
        batch = {"image": draw_pictures(batch_size, task.crop_size)}
        batch |= {"image_embed": image_embed} if number == 1 else {
            "lowres_cond_img": draw_pictures(batch_size, task.lowres_size),
            "corner": torch.zeros(batch_size, 2, dtype=torch.long)}
    train = replace(config.train, batch_size=batch_size, snapshot_every=0, **options)
    state = TrainState(module, train, accelerator)
    return (lambda: state.compute_gradients(0, batch, task.loss),
            lambda: state.update_weights(1, lr_factor=1.0))


def draw_encodings(batch_size, max_text_len, embed_dim):
    """(B, L, D), zero after a caption's end."""
    encodings = torch.zeros(batch_size, max_text_len, embed_dim)
    encodings[:, :CAPTION_TOKENS] = torch.randn(batch_size, CAPTION_TOKENS, embed_dim)
    return encodings


def draw_pictures(batch_size, size):
    return torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------
# measuring


def measure(steps, rounds, device):
    """{variant: {"ms": a step, "update_ms": the part that updates the weights, "gb": memory for the
    backward pass, "gflop": forward and backward pass}}; the variants take turns. On a GPU a turn is
    five steps in succession, since kernels are launched while earlier ones still run."""
    results, in_turn = {variant: {} for variant in steps}, 5 if device.type == "cuda" else 1
    for variant, (compute, update) in steps.items():
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            compute()
        results[variant]["gflop"] = counter.get_total_flops() / 1e9
        update()
        results[variant]["gb"] = measure_memory(compute, device) / 1e9
        for _ in range(EAGER_CALLS if device.type == "cuda" else 0):  # compiles, records graphs
            update()
            compute()
        update()

    def repeat(*functions):
        return lambda: [function() for _ in range(in_turn) for function in functions]
    seconds = time_in_turns(
        {(variant, part): repeat(*pair[:number]) for variant, pair in steps.items()
         for part, number in (("compute", 1), ("step", 2))}, rounds, warm_up=False)
    medians = compute_medians(seconds)
    for variant, row in results.items():
        row["ms"] = 1e3 * medians[variant, "step"] / in_turn
        row["update_ms"] = max(0, row["ms"] - 1e3 * medians[variant, "compute"] / in_turn)
    return results


def measure_memory(compute, device):
    """Bytes that `compute` adds: at its peak on a GPU; on a CPU, what autograd keeps."""
    if device.type != "cuda":
        return count_saved_bytes(compute)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute()
    return torch.cuda.max_memory_allocated() - before


def measure_matmul_rate(device, dtype):
    """GFLOP/s of one large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = compute_medians(time_in_turns({"matmul": lambda: a @ a}, rounds=5))
    return 2 * size ** 3 / seconds["matmul"] / 1e9


# ----------------------------------------------------------------------------------------------
# printing


def print_network(name, batch_size, results, matmul_rates):
    ours = results.get("(c) ours")
    for variant, row in results.items():
        same = variant.startswith("(c)") and "(b) stock" in results  # the same mathematics
        rate = (results["(b) stock"] if same else row)["gflop"] / row["ms"] * 1e3
        share = rate / matmul_rates["ours" if variant.startswith("(c)") else "stock"]
        print_row(f"{name}, {batch_size}", variant, f"{batch_size / row['ms'] * 1e3:.2f}",
                  f"{row['ms']:.0f}", f"{row['update_ms']:.0f}", f"{row['gb']:.2f}", f"{rate:.0f}",
                  f"{share:.0%}", f"{row['ms'] / ours['ms']:.2f}x" if ours else "")


def print_profile(compute, update, device_type):
    """The operations in which a step spends the most time."""
    with torch.profiler.profile() as profile:
        compute()
        update()
        read_clock()
    print(profile.key_averages().table(sort_by=f"self_{device_type}_time_total", row_limit=15,
                                       max_name_column_width=40))


def print_both_stages(args, results):
    """Rows for both decoder stages together, one sample each."""
    if not {"unet1", "unet2"} <= results.keys() or "ours" not in args.variants:
        return
    batch_sizes = {name: args.batch_size or BATCH_SIZES[name] for name in results}
    ms = {variant: sum(results[name][variant]["ms"] / batch_sizes[name]
                       for name in ("unet1", "unet2")) for variant in results["unet1"]}
    for variant, value in ms.items():
        print_row("both stages", variant, f"{1e3 / value:.2f}", *[""] * 5,
                  f"{value / ms['(c) ours']:.2f}x")


if __name__ == "__main__":
    cli.run(main)
