"""How fast training is: the published way, the library with cached embeddings, and this project.

(a) published: the networks of preset `seed` in the trainers of dalle2-pytorch, fp32, a CLIP
    ViT-L/14 (random weights) in every step, captions padded to 77 positions;
(b) stock: the networks of --preset in the same trainers, fp32, embeddings cached; for the prior
    also at 77 positions, as a user who does not look at the length of captions has it;
(c) ours: the same networks as in (b), with the losses of `dalle2.tasks` and `TrainState`'s steps.

One process, one step of each way in turn, medians over --rounds. Data are random numbers.

    python -m benchmarks.train_speed --preset base
    python -m benchmarks.train_speed --preset seed --networks unet1 unet2
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from dalle2_pytorch import (  # noqa: E402
    Decoder,
    DecoderTrainer,
    DiffusionPrior,
    DiffusionPriorTrainer,
    OpenClipAdapter,
)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dalle2 import cli  # noqa: E402
from dalle2.config import PRESETS  # noqa: E402
from dalle2.fast_modules import restore_modules  # noqa: E402
from dalle2.models import build_prior, build_unet  # noqa: E402
from dalle2.tasks import PriorTask, UnetTask  # noqa: E402
from dalle2.train_state import TrainState  # noqa: E402

EMBED_DIM = 768       # of ViT-L/14
CAPTION_TOKENS = 13   # the mean of COCO
BATCH_SIZES = {"prior": 16, "unet1": 4, "unet2": 8}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--networks", nargs="+", default=list(BATCH_SIZES), choices=BATCH_SIZES)
    parser.add_argument("--ways", nargs="+", default=["published", "stock", "ours"],
                        choices=["published", "stock", "ours"])
    parser.add_argument("--batch_size", type=int, help=f"None: {BATCH_SIZES}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile")
    parser.add_argument("--profile", action="store_true", help="and where a step of ours goes")
    parser.add_argument("--json", help="write the figures into this file as well")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------
# the ways: each gives (compute gradients, update the weights), to be called in turn


def build_stock_step(name, preset, batch_size, device, clip=None, max_text_len=None):
    """The library's trainers; with `clip` it embeds pictures and captions in every step."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no")
    image = torch.rand(batch_size, 3, 256, 256, device=device)
    image_embed = torch.randn(batch_size, EMBED_DIM, device=device)
    if name == "prior":
        config = preset.prior
        config = replace(config, max_text_len=max_text_len or config.max_text_len)
        network = restore_modules(build_prior(config, EMBED_DIM))
        trainer = DiffusionPriorTrainer(
            DiffusionPrior(network, clip=clip, image_embed_dim=EMBED_DIM, cond_drop_prob=0.1),
            accelerator=accelerator, lr=1e-4, wd=1e-2, max_grad_norm=1.0)
        tokens = torch.zeros(batch_size, 77, dtype=torch.long, device=device)
        tokens[:, :CAPTION_TOKENS] = 1000
        encodings = draw_encodings(batch_size, config.max_text_len).to(device)
        # a clone: the library scales what it is given in place
        inputs = (lambda: dict(text=tokens, image=image)) if clip else (lambda: dict(
            text_embed=image_embed, image_embed=image_embed.clone(), text_encodings=encodings))
        return lambda: trainer(**inputs()), trainer.update
    number, configs = int(name[-1]), preset.decoder.unets
    unets = tuple(restore_modules(build_unet(config, n, EMBED_DIM))
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


def build_our_step(name, preset, batch_size, device, compiled):
    AcceleratorState._reset_state()
    accelerator = cli.build_accelerator("auto")
    image_embed = torch.randn(batch_size, EMBED_DIM)
    if name == "prior":
        task, module = PriorTask(preset.prior, accelerator), build_prior(preset.prior, EMBED_DIM)
        batch = {"image_embed": image_embed, "text_embed": image_embed,
                 "text_encodings": draw_encodings(batch_size, preset.prior.max_text_len).half()}
    else:
        number = int(name[-1])
        task = UnetTask(number, preset.decoder, accelerator)
        module = build_unet(task.config, number, EMBED_DIM)
        batch = {"image": draw_pictures(batch_size, task.crop_size)}
        batch |= {"image_embed": image_embed} if number == 1 else {
            "lowres_cond_img": draw_pictures(batch_size, task.lowres_size),
            "corner": torch.zeros(batch_size, 2, dtype=torch.long)}
    train = replace(task.config.train, batch_size=batch_size, compile=compiled, snapshot_every=0)
    state = TrainState(module, train, accelerator)
    return (lambda: state.compute_gradients(0, batch, task.loss),
            lambda: state.update_weights(1, lr_factor=1.0))


def draw_encodings(batch_size, max_text_len):
    """(B, L, D), zero after a caption's end."""
    encodings = torch.zeros(batch_size, max_text_len, EMBED_DIM)
    encodings[:, :CAPTION_TOKENS] = torch.randn(batch_size, CAPTION_TOKENS, EMBED_DIM)
    return encodings


def draw_pictures(batch_size, size):
    return torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------
# measuring


def measure(steps, rounds, device):
    """{way: {"ms": a step, "update_ms": of it, "gb": kept for the backward pass, "gflop": forward
    and backward}}; the ways take turns."""
    times = {way: [] for way in steps}
    rows = {way: {} for way in steps}
    for way, (compute, update) in steps.items():  # also the warm-up, and what torch.compile needs
        rows[way]["gflop"] = count_flops(compute)
        update()
        rows[way]["gb"] = count_memory(compute, device)
        update()
    for _ in range(rounds):
        for way, (compute, update) in steps.items():
            marks = [read_clock(device)]
            for function in (compute, update):
                function()
                marks.append(read_clock(device))
            times[way].append((marks[2] - marks[0], marks[2] - marks[1]))
    for way, pairs in times.items():
        whole, update = (statistics.median(column) * 1e3 for column in zip(*pairs))
        rows[way] |= {"ms": whole, "update_ms": update}
    return rows


def read_clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def count_flops(compute):
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() / 1e9


def count_memory(compute, device):
    """GB that `compute` adds at its peak on a GPU; on a CPU what autograd keeps, as it says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(kept.values()) / 1e9


def measure_matmul_rate(device, dtype):
    """GFLOP/s of one large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        start = read_clock(device)
        a @ a
        times.append(read_clock(device) - start)
    return 2 * size ** 3 / statistics.median(times[1:]) / 1e9


def main():
    args = parse_args()
    device = cli.pick_device()
    rates = {"stock": measure_matmul_rate(device, torch.float32)}
    rates["ours"] = measure_matmul_rate(device, torch.bfloat16) if device.type == "cuda" \
        else rates["stock"]
    with contextlib.redirect_stdout(sys.stderr):
        clip = OpenClipAdapter("ViT-L-14", None).to(device) if "published" in args.ways else None
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, preset {args.preset}, "
          f"medians of {args.rounds}\n")
    print("| network | way | samples/s | ms a step | of it update | GB | GFLOP/s | of a matmul's "
          "| ours is |\n|---|---|---|---|---|---|---|---|---|")
    found = {}
    for name in args.networks:
        batch_size = args.batch_size or BATCH_SIZES[name]
        preset, steps = PRESETS[args.preset], {}
        if "published" in args.ways:
            steps["(a) published"] = build_stock_step(name, PRESETS["seed"], batch_size, device,
                                                      clip)
        if "stock" in args.ways:
            if name == "prior":
                steps["(b) stock, 77 positions"] = build_stock_step(
                    name, preset, batch_size, device, max_text_len=77)
            steps["(b) stock"] = build_stock_step(name, preset, batch_size, device)
        if "ours" in args.ways:
            steps["(c) ours"] = build_our_step(name, preset, batch_size, device, args.compile)
        found[name] = measure(steps, args.rounds, device)
        print_rows(name, batch_size, found[name], rates)
        if args.profile:
            print_profile(*steps["(c) ours"], device)
        steps.clear()
        gc.collect()
    print_decoder(args, found)
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "found": found}, indent=1))


def print_rows(name, batch_size, rows, rates):
    ours = rows.get("(c) ours")
    for way, row in rows.items():
        if ours and "(b) stock" in rows and way == "(c) ours":
            row["gflop"] = rows["(b) stock"]["gflop"]  # the same mathematics
        rate = row["gflop"] / row["ms"] * 1e3
        share = rate / rates["ours" if way == "(c) ours" else "stock"]
        faster = f"{row['ms'] / ours['ms']:.2f}x" if ours else ""
        print(f"| {name}, {batch_size} | {way} | {batch_size / row['ms'] * 1e3:.2f} "
              f"| {row['ms']:.0f} | {row['update_ms']:.0f} | {row['gb']:.2f} | {rate:.0f} "
              f"| {share:.0%} | {faster} |", flush=True)


def print_profile(compute, update, device):
    """The operations that a step spends most of its time in."""
    with torch.profiler.profile() as profile:
        compute()
        update()
        read_clock(device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    print(profile.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=15,
                                       max_name_column_width=40))


def print_decoder(args, found):
    """Both stages together, a sample each."""
    if not {"unet1", "unet2"} <= set(found) or "ours" not in args.ways:
        return
    sizes = {name: args.batch_size or BATCH_SIZES[name] for name in found}
    for way in found["unet1"]:
        whole = {w: sum(found[name][w]["ms"] / sizes[name] for name in ("unet1", "unet2"))
                 for w in (way, "(c) ours")}
        print(f"| both stages | {way} | {1e3 / whole[way]:.2f} | | | | | "
              f"| {whole[way] / whole['(c) ours']:.2f}x |")


if __name__ == "__main__":
    main()
