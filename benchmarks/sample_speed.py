"""How fast rendering is: the stock DALLE2 of dalle2-pytorch against this project, same networks.

(a) published: DALLE2 with 1000 steps in prior and both stages, guidance on all three (the library
    guides the upsampler too). Its time is that of --measured_steps steps, scaled: every step costs
    the same;
(b) stock at equal steps: its DDIM with as many steps as ours;
(c) ours: the configs' settings.

Random weights; sampling time does not depend on them. The last row is the prior alone, where ours
reads the caption once. One process, in turn, medians over --rounds.

    python -m benchmarks.sample_speed --preset toy
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from dalle2.cli import pick_device  # noqa: E402
from dalle2.config import PRESETS  # noqa: E402
from dalle2.models import (  # noqa: E402
    build_prior,
    build_stock_decoder,
    build_stock_prior,
    build_unet,
)
from dalle2.sampling import build_stages, sample_image_embed, sample_images  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="toy", choices=list(PRESETS))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measured_steps", type=int, default=20, help="of the 1000")
    parser.add_argument("--cond_scale", type=float, default=2.0, help="of all networks in (a)")
    parser.add_argument("--prior_only", action="store_true")
    args = parser.parse_args()
    preset, device, batch = PRESETS[args.preset], pick_device(), args.batch_size
    dim = 128 if args.preset == "toy" else 768
    configs = preset.decoder.unets
    text_embed = torch.randn(batch, dim, device=device)
    text_encodings = torch.randn(batch, preset.prior.max_text_len, dim, device=device)
    image_embed = torch.nn.functional.normalize(text_embed, dim=-1)

    def build_networks():
        return (build_prior(preset.prior, dim).to(device).eval(),
                [build_unet(c, n, dim).to(device).eval() for n, c in enumerate(configs, start=1)])

    prior, unets = build_networks()
    stages, stock_networks = build_stages(unets, configs), build_networks()
    stock_prior = build_stock_prior(stock_networks[0], preset.prior, dim).to(device)
    stock_prior.can_classifier_guidance = True  # its own flag, set where it trains itself
    stock_decoder = build_stock_decoder(stock_networks[1], configs).to(device)

    def run_stock_prior(steps, scale):
        if steps == preset.prior.timesteps:  # no more of its steps than are measured
            x = torch.randn(batch, dim, device=device)
            text = dict(text_embed=text_embed, text_encodings=text_encodings)
            for t in range(args.measured_steps):
                x, _ = stock_prior.p_sample(x, torch.full((batch,), t, device=device),
                                            text_cond=text, cond_scale=scale)
        else:
            stock_prior.p_sample_loop((batch, dim), timesteps=steps + 1, cond_scale=scale,
                                      text_cond=dict(text_embed=text_embed,
                                                     text_encodings=text_encodings))

    def run_stock_decoder(steps, scales):
        decoder = stock_decoder
        if steps is None:
            for number, (unet, config) in enumerate(zip(decoder.unets, configs), start=1):
                shape = batch, 3, config.image_size, config.image_size
                lowres = {} if number == 1 else dict(
                    lowres_cond_img=torch.rand(shape, device=device),
                    lowres_noise_level=torch.full((batch,), 100, device=device))
                x = torch.randn(shape, device=device)
                for t in range(args.measured_steps):
                    x, _ = decoder.p_sample(
                        unet, x, torch.full((batch,), t, device=device), image_embed=image_embed,
                        cond_scale=scales[number - 1], noise_scheduler=decoder.noise_schedulers[0],
                        predict_v=config.objective == "v",
                        predict_x_start=config.objective == "x_start",
                        **lowres)
        else:
            decoder.sample_timesteps = steps
            decoder.sample(image_embed=image_embed, cond_scale=scales,
                           one_unet_in_gpu_at_time=False)

    def run_prior():
        sample_image_embed(prior, preset.prior, text_embed, text_encodings, range(batch))

    own_steps = tuple(config.sample_timesteps for config in configs)
    own_scales = tuple(config.cond_scale for config in configs)
    prior_steps, prior_scale = preset.prior.sample_timesteps, preset.prior.cond_scale
    scale, times = args.cond_scale, preset.prior.timesteps / args.measured_steps
    ways = {
        "(a) published": [(lambda: run_stock_prior(1000, scale), times),
                          (lambda: run_stock_decoder(None, (scale,) * len(configs)), times)],
        "(b) stock, equal steps": [(lambda: run_stock_prior(prior_steps, prior_scale), 1),
                                   (lambda: run_stock_decoder(own_steps, own_scales), 1)],
        "(c) ours": [(run_prior, 1),
                     (lambda: sample_images(stages, image_embed, range(batch)), 1)]}
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, preset {args.preset}, "
          f"batch {batch}, steps {(prior_steps, *own_steps)}, medians of {args.rounds}")
    if not args.prior_only:
        print_rows(measure(ways, args.rounds, device), batch)
    wide = replace(preset.prior, cond_scale=2.0)
    guided = measure({"(b)": [(lambda: run_stock_prior(prior_steps, 2.0), 1)], "(c)": [(
        lambda: sample_image_embed(prior, wide, text_embed, text_encodings, range(batch)), 1)]},
        args.rounds, device)
    print(f"prior, {prior_steps} steps, guidance 2: stock {guided['(b)'][0] / batch:.4f}, ours "
          f"{guided['(c)'][0] / batch:.4f} s a picture: {guided['(b)'][0] / guided['(c)'][0]:.1f}x")


def print_rows(found, batch):
    print("| way | prior, s a picture | decoder, s a picture | both | ours is | prior, ours is |\n"
          "|---|---|---|---|---|---|")
    ours = found["(c) ours"]
    for way, (a, b) in found.items():
        print(f"| {way} | {a / batch:.4f} | {b / batch:.3f} | {(a + b) / batch:.3f} "
              f"| {(a + b) / sum(ours):.1f}x | {a / ours[0]:.1f}x |")


@torch.no_grad()
def measure(ways, rounds, device):
    """{way: [median seconds of each part]}; the ways take turns. A part: (function, factor)."""
    times = {way: [[] for _ in parts] for way, parts in ways.items()}
    for round_number in range(rounds + 1):  # the first warms up
        for way, parts in ways.items():
            for number, (function, factor) in enumerate(parts):
                start = read_clock(device)
                with contextlib.redirect_stderr(io.StringIO()):
                    function()
                if round_number:
                    times[way][number].append((read_clock(device) - start) * factor)
    return {way: [statistics.median(part) for part in parts] for way, parts in times.items()}


def read_clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
