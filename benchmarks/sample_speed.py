"""Speed of rendering: the DALLE2 class of dalle2-pytorch against this project, same networks.

(a) published: DALLE2 with 1000 steps in the prior and in both stages, and guidance on all three
    (the library guides the upsampler too). Only --measured_steps of the steps are run, and their
    time is scaled, because every step costs the same;
(b) stock, equal steps: the library's DDIM with as many steps as (c);
(c) ours: the settings of the configs.

The weights are random, which does not change the time. The last line compares the prior alone with
guidance; this project reads the caption once, the library at each step. All variants run in one
process and take turns; medians over --rounds.

    python -m benchmarks.sample_speed --preset toy
"""

import contextlib
import io
from dataclasses import replace

import torch

from benchmarks.common import (
    build_networks,
    compute_medians,
    describe_machine,
    get_embed_dim,
    print_header,
    print_row,
    time_in_turns,
)
from dalle2 import cli
from dalle2.config import PRESETS
from dalle2.sampling import build_stages, sample_image_embed, sample_images
from dalle2.tools.convert import build_stock_decoder, build_stock_prior

LIBRARY_STEPS = 1000


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--preset", default="toy", choices=list(PRESETS))
    parser.add_argument("--batch_size", type=cli.at_least(1), default=4)
    parser.add_argument("--rounds", type=cli.at_least(1), default=3)
    parser.add_argument("--measured_steps", type=cli.at_least(1), default=20,
                        help="how many of the 1000 steps of (a) are run")
    parser.add_argument("--cond_scale", type=float, default=2.0,
                        help="guidance of all networks in (a)")
    parser.add_argument("--prior_only", action="store_true",
                        help="measure only the prior with guidance")
    return parser.parse_args()


def main():
    args = parse_args()
    preset, device, batch_size = PRESETS[args.preset], cli.pick_device(), args.batch_size
    embed_dim, configs = get_embed_dim(args.preset), preset.decoder.unets
    text_embed = torch.randn(batch_size, embed_dim, device=device)
    text_encodings = torch.randn(batch_size, preset.prior.max_text_len, embed_dim, device=device)
    image_embed = torch.nn.functional.normalize(text_embed, dim=-1)

    # ---- the library's sampling and ours, of networks of the same sizes
    prior, unets = move(build_networks(preset, embed_dim), device)
    stages = build_stages(unets, configs)
    library = Library(preset, embed_dim, args.measured_steps, text_embed, text_encodings,
                      image_embed)

    def sample_prior(config=preset.prior):
        sample_image_embed(prior, config, text_embed, text_encodings, range(batch_size))
    steps, scale = preset.prior.sample_timesteps, preset.prior.cond_scale
    stage_steps, stage_scales = zip(*((c.sample_timesteps, c.cond_scale) for c in configs))
    functions = {  # (variant, network)
        ("(a) published", "prior"): lambda: library.run_prior_steps(args.cond_scale),
        ("(a) published", "decoder"): lambda: library.run_decoder_steps(args.cond_scale),
        ("(b) stock, equal steps", "prior"): lambda: library.sample_prior(steps, scale),
        ("(b) stock, equal steps", "decoder"): lambda: library.sample_decoder(stage_steps,
                                                                              stage_scales),
        ("(c) ours", "prior"): sample_prior,
        ("(c) ours", "decoder"): lambda: sample_images(stages, image_embed, range(batch_size))}

    # ---- measure
    print(f"{describe_machine()}, preset {args.preset}, batch {batch_size}, steps "
          f"{(steps, *stage_steps)}, medians of {args.rounds}")
    if not args.prior_only:
        seconds = measure(functions, args.rounds)
        for network in ("prior", "decoder"):
            seconds["(a) published", network] *= LIBRARY_STEPS / args.measured_steps
        print_table(seconds, batch_size)
    guided = replace(preset.prior, cond_scale=2.0)
    seconds = measure({"stock": lambda: library.sample_prior(steps, 2.0),
                       "ours": lambda: sample_prior(guided)}, args.rounds)
    print(f"prior, {steps} steps, guidance 2: stock {seconds['stock'] / batch_size:.4f}, ours "
          f"{seconds['ours'] / batch_size:.4f} s a picture: "
          f"{seconds['stock'] / seconds['ours']:.1f}x")


class Library:
    """The samplers of dalle2-pytorch around networks of a preset, and what they are given."""

    def __init__(self, preset, embed_dim, measured_steps, text_embed, text_encodings, image_embed):
        self.configs, self.measured_steps = preset.decoder.unets, measured_steps
        self.image_embed, self.device = image_embed, image_embed.device
        self.text_cond = dict(text_embed=text_embed, text_encodings=text_encodings)
        prior, unets = move(build_networks(preset, embed_dim), self.device)
        self.prior = build_stock_prior(prior, preset.prior, embed_dim).to(self.device)
        self.prior.can_classifier_guidance = True  # the library sets it when it trains the prior
        self.decoder = build_stock_decoder(unets, self.configs).to(self.device)

    def sample_prior(self, steps, cond_scale):
        self.prior.p_sample_loop(self.image_embed.shape, timesteps=steps + 1,
                                 cond_scale=cond_scale, text_cond=self.text_cond)

    def sample_decoder(self, steps, cond_scales):
        self.decoder.sample_timesteps = steps
        self.decoder.sample(image_embed=self.image_embed, cond_scale=cond_scales,
                            one_unet_in_gpu_at_time=False)

    def run_prior_steps(self, cond_scale):
        """`measured_steps` of the steps that its DDPM takes."""
        x_t = torch.randn_like(self.image_embed)
        for t in self.iterate_timesteps():
            x_t, _ = self.prior.p_sample(x_t, t, text_cond=self.text_cond, cond_scale=cond_scale)

    def run_decoder_steps(self, cond_scale):
        """`measured_steps` of the steps that its DDPM takes in each stage."""
        for number, (unet, config) in enumerate(zip(self.decoder.unets, self.configs), start=1):
            shape = len(self.image_embed), 3, config.image_size, config.image_size
            lowres = {} if number == 1 else dict(
                lowres_cond_img=torch.rand(shape, device=self.device),
                lowres_noise_level=torch.full(shape[:1], 100, device=self.device))
            x_t = torch.randn(shape, device=self.device)
            for t in self.iterate_timesteps():
                x_t, _ = self.decoder.p_sample(
                    unet, x_t, t, image_embed=self.image_embed, cond_scale=cond_scale,
                    noise_scheduler=self.decoder.noise_schedulers[0],
                    predict_v=config.objective == "v",
                    predict_x_start=config.objective == "x_start", **lowres)

    def iterate_timesteps(self):
        for t in range(self.measured_steps):
            yield torch.full((len(self.image_embed),), t, device=self.device)


def move(networks, device):
    """(prior, [U-Nets]) on the device, in evaluation mode."""
    prior, unets = networks
    return prior.to(device).eval(), [unet.to(device).eval() for unet in unets]


@torch.no_grad()
def measure(functions, rounds):
    """{key: median seconds}, without the library's progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        return compute_medians(time_in_turns(functions, rounds))


def print_table(seconds, batch_size):
    print_header("variant", "prior, s a picture", "decoder, s a picture", "both", "ours is",
                 "prior, ours is")
    ours = [seconds["(c) ours", network] for network in ("prior", "decoder")]
    for variant in dict.fromkeys(variant for variant, _ in seconds):
        prior, decoder = (seconds[variant, network] for network in ("prior", "decoder"))
        print_row(variant, f"{prior / batch_size:.4f}", f"{decoder / batch_size:.3f}",
                  f"{(prior + decoder) / batch_size:.3f}", f"{(prior + decoder) / sum(ours):.1f}x",
                  f"{prior / ours[0]:.1f}x")


if __name__ == "__main__":
    cli.run(main)
