"""Compares samplers, spacings and numbers of steps with a reference of many steps.

Works with any checkpoints and the photos of a COCO captions file. Prior, base stage and upsamplers
are sampled one by one, each setting from the same noise: the prior from true captions, the base
stage from the photos' embeddings, an upsampler from the photos in the size of the stage before. The
reference is DPM-Solver++ with --reference_steps steps, evenly spaced in log-SNR.

Prints for the prior the relative difference of its embedding from the reference's; for pictures in
[0, 1] the RMSE and the amplitude in four octaves of rising frequency (cycles a pixel), divided by
the reference's. The reference's own amplitudes, divided by the photos', are printed above the
table. Writes samplers.png, the errors against the number of steps.

    python -m benchmarks.sampler_sweep --prior_ckpt P --decoder_ckpt D --test_img_path .. \\
        --test_annot_path .. --output_dir output/sampler_sweep
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from benchmarks.common import print_header, print_row
from dalle2 import cli
from dalle2.diffusion import Diffusion, build_diffusion
from dalle2.images import load_image, resize
from dalle2.pipeline import load_pipeline
from dalle2.render import list_coco_captions
from dalle2.sampling import (
    SAMPLERS,
    Level,
    SampleOptions,
    build_denoiser,
    build_prior_denoiser,
    compute_levels,
    condition_upsampler,
    draw_part,
)
from dalle2.validation import compute_recall

SETTINGS = [("ddim", "timestep"), ("dpmpp_2m", "timestep"), ("ddim", "log-SNR"),
            ("dpmpp_2m", "log-SNR")]  # sampler, and in what its levels are evenly spaced
BANDS = 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2  # cycles a pixel
CANDIDATES = 1, 2, 4


def main():
    args = parse_args()
    pipeline = load_pipeline(args, cli.pick_device())
    device = pipeline.clip.device
    captions, _, paths = zip(*list_coco_captions(args.test_annot_path, args.test_img_path))
    seeds = list(range(args.num_images))
    photos = torch.stack([load_image(path) for path in paths[:args.num_images]]).to(device)
    text = pipeline.embed_captions(captions)
    config, errors = pipeline.prior.config, {}
    errors["prior"] = sweep(
        "prior", args, build_prior_denoiser(pipeline.prior.network, *text, config.cond_scale),
        draw_part(range(len(paths)), text[0].shape[1:], device, "prior"),
        Diffusion(config.timesteps, config.beta_schedule), config.discrete_time, score_embeds)
    for stage in pipeline.stages:
        number, config = stage.unet_number, stage.config
        true = resize(photos, config.image_size) / 255
        condition = {"image_embed": pipeline.embed_images(photos)} if number == 1 else \
            condition_upsampler(
                resize(photos, pipeline.stages[number - 2].config.image_size) / 255,
                config.image_size, config.lowres_noise_level,
                draw_part(seeds, true.shape[1:], device, "lowres", number))
        denoise = build_denoiser(stage.unet, config, condition, config.cond_scale)
        errors[f"unet {number}"] = sweep(
            f"unet {number}, {config.image_size} px, cond_scale {config.cond_scale:g}", args,
            denoise, draw_part(seeds, true.shape[1:], device, "unet", number),
            build_diffusion(config, "cpu"), False,
            lambda x, reference, true=true: score_pictures(x, reference, true))
    plot(Path(args.output_dir) / "samplers.png", args.steps, errors)
    compare_candidates(pipeline, paths, text)


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_checkpoint_flags(parser)
    parser.add_argument("--test_img_path", required=True, help="picture folder")
    parser.add_argument("--test_annot_path", required=True, help="COCO captions file")
    parser.add_argument("--num_images", type=cli.at_least(1), default=16,
                        help="photos for the stages of the decoder, the first ones of the file")
    parser.add_argument("--steps", type=cli.at_least(1), nargs="+", default=[5, 8, 12, 16, 25, 50],
                        help="numbers of steps to compare")
    parser.add_argument("--reference_steps", type=cli.at_least(1), default=200)
    parser.add_argument("--output_dir", default="output/sampler_sweep",
                        help="folder for samplers.png")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------
# the sweep


@torch.no_grad()
def sweep(title, args, denoise, x_t, diffusion, discrete_time, score):
    """Prints a table. Returns {"sampler, spacing": list of errors, one a number of steps}."""
    def sample(sampler, spacing, steps):
        levels = compute_even_levels(diffusion, steps) if spacing == "timestep" \
            else compute_levels(diffusion, steps, discrete_time)
        return SAMPLERS[sampler](denoise, x_t, levels)
    reference = sample("dpmpp_2m", "log-SNR", args.reference_steps)
    note, columns, _ = score(reference, reference)
    print(f"\n{title}; {len(x_t)} rows; the reference: {note}\n")
    print_header("sampler", "spacing", "steps", *columns)
    errors = {}
    for sampler, spacing in SETTINGS:
        curve = errors[f"{sampler}, {spacing}"] = []
        for steps in [*args.steps, args.reference_steps]:
            if (sampler, spacing, steps) == ("dpmpp_2m", "log-SNR", args.reference_steps):
                continue
            *_, (error, *amplitudes) = score(sample(sampler, spacing, steps), reference)
            curve.append(error)
            print_row(sampler, spacing, steps, f"{error:.4f}", *(f"{x:.2f}" for x in amplitudes))
    return errors


def compute_even_levels(diffusion, sample_timesteps):
    """Levels evenly spaced in the timestep, from the last timestep of training to the first."""
    times = torch.linspace(diffusion.timesteps - 1, 0, sample_timesteps).round().long().tolist()
    return [*(Level(t, diffusion.alpha[t].item(), diffusion.sigma[t].item()) for t in times),
            Level(-1, 1.0, 0.0)]


def score_embeds(x, reference):
    """(note, columns, [relative difference of x (B, D) to the reference])."""
    x, reference = F.normalize(x, dim=-1), F.normalize(reference, dim=-1)
    return "unit norm", ["relative difference"], [(x - reference).norm() / reference.norm()]


def score_pictures(x, reference, true):
    """(note, columns, [RMSE, amplitude in each band]) of x (B, 3, H, W) in [-1, 1] against the
    reference; true: the photos in [0, 1]."""
    image, reference = ((part.clamp(-1, 1) + 1) / 2 for part in (x, reference))
    own = compute_amplitudes(reference)
    note = "amplitudes of " + " ".join(f"{x:.2f}" for x in own / compute_amplitudes(true))
    columns = ["RMSE", *(f"1/{1 / low:.0f} to 1/{1 / high:.0f}"
                         for low, high in zip(BANDS, BANDS[1:]))]
    rmse = (image - reference).square().mean().sqrt()
    return note, columns, [rmse, *(compute_amplitudes(image) / own)]


def compute_amplitudes(image):
    """(4,) root mean square amplitude of image (B, 3, H, W) in each of BANDS."""
    size = image.shape[-1]
    power = torch.fft.fft2(image).abs().square().mean((0, 1))                      # (H, W)
    axis = torch.fft.fftfreq(size, device=image.device)
    frequency = (axis[:, None].square() + axis.square()).sqrt()                    # (H, W)
    return torch.stack([power[(low <= frequency) & (frequency < high)].mean().sqrt()
                        for low, high in zip(BANDS, BANDS[1:])])


def plot(path, steps, errors):
    """errors: {network: what `sweep` returns}."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(errors)), errors.items()):
        for label, curve in curves.items():
            axes.plot(steps, [float(error) for error in curve[:len(steps)]], marker="o",
                      label=label)
        axes.set(xscale="log", yscale="log", xlabel="steps", title=name,
                 ylabel="relative difference" if name == "prior" else "RMSE")
        axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


# ----------------------------------------------------------------------------------------------
# candidates of the prior


def compare_candidates(pipeline, paths, text):
    """Prints what is gained by keeping the best of several embeddings, over all photos."""
    true = torch.cat([pipeline.embed_images(load_image(path)[None]) for path in paths])
    print(f"\nprior, {len(paths)} captions, four seeds each\n")
    print_header("candidates", "cosine to the photo", "to the caption", "R@1", "R@5", "R@10")
    for count in CANDIDATES:
        rows = []
        for seed in range(4):
            embed = pipeline.prior.sample(
                *text, range(seed * len(paths), (seed + 1) * len(paths)),
                SampleOptions(num_candidates=count))
            recall = compute_recall(embed, true, (1, 5, 10))
            rows.append([(embed * true).sum(-1).mean(), (embed * text[0]).sum(-1).mean(),
                         *recall.values()])
        print_row(count, *(f"{x:.4f}" for x in torch.tensor(rows).mean(0)))


if __name__ == "__main__":
    cli.run(main)
