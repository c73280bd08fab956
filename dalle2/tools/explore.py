"""Changes photos with trained checkpoints: `python -m dalle2.tools.explore COMMAND --photo FILE`.

Section 3 of Ramesh et al. 2022 (arXiv 2204.06125). A photo is represented by its CLIP image
embedding and by the noise x_T from which DDIM reconstructs it in the decoder's first stage. A
command changes one of them and writes a JPEG strip of 256 px pictures. The later stages work as in
test_dalle2.py.
"""

import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from dalle2 import cli
from dalle2.diffusion import build_diffusion
from dalle2.errors import UserError
from dalle2.images import (
    STORE_IMAGE_SIZE,
    arrange,
    load_image,
    make_file_stem,
    resize,
    save_jpeg,
)
from dalle2.pipeline import load_pipeline
from dalle2.rng import derive_seed
from dalle2.rowwise import in_groups
from dalle2.sampling import (
    GROUP,
    SampleOptions,
    build_denoiser,
    compute_levels,
    draw_part,
    sample_ddim,
    sample_images,
)

INVERSION_STEPS = 50  # minimum; squared error of the toy decoder: .0023 with 10, .0015 with 50, 250
MAX_ERROR = 1.5       # in units of sigma; that of a perfect network is about 1


def build_command_parser(prog, description, **_):
    """A cli.Parser for one command; argparse calls it."""
    parser = cli.Parser(description)
    parser.prog = prog
    return parser


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True,
                                     parser_class=build_command_parser)
    for name, function in COMMANDS.items():
        summary = " ".join(function.__doc__.split("\n\n")[0].split())
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--photo", action="append", required=True,
                             help="a picture file" + "; give it twice" * (name in TWO_PHOTOS))
        if name == "textdiff":
            command.add_argument("--from", dest="from_caption", required=True,
                                 help="caption of the photo")
            command.add_argument("--to", dest="to_caption", required=True,
                                 help="caption of the wanted picture")
            command.add_argument("--theta", type=float, default=0.5,
                                 help="how far to go, 1 is all the way; the paper uses .25 to .50")
        if name == "variations":
            command.add_argument("--eta", type=float, default=1.0,
                                 help="of DDIM: 0 repeats the photo, 1 varies it most")
        if name != "reconstruct":
            command.add_argument("--num", type=int, default=7, help="pictures beside the photo")
        command.add_argument("--output_dir", default="explore", help="folder for the strip")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--sample_timesteps", type=int,
                             help="DDIM steps of the first stage (None: the config's)")
        command.add_argument("--cond_scale", type=float,
                             help="guidance of the first stage, 1 is none (None: the "
                             "config's)")
        cli.add_checkpoint_flags(command)
    return parser.parse_args()


def main():
    args = parse_args()
    check_args(args)
    photos = torch.stack([load_photo(path) for path in args.photo])  # (N, 3, 256, 256) uint8
    pipeline = load_pipeline(args, cli.pick_device())
    strip = COMMANDS[args.command](pipeline, photos, args)
    title = [args.command, *(Path(path).stem for path in args.photo)]
    if args.command == "textdiff":
        title += ["to", args.to_caption]
    path = Path(args.output_dir) / f"{make_file_stem(' '.join(title))}.jpg"
    save_jpeg(arrange(strip, columns=len(strip)), path)
    print(path)


def check_args(args):
    """Raises UserError for a value that makes no sense."""
    count = 2 if args.command in TWO_PHOTOS else 1
    if len(args.photo) != count:
        raise UserError(f"{args.command} takes {count}, {len(args.photo)} given", "photo")
    least = 1 if args.command == "variations" else 2
    for name, low, high in (("num", least, 1000), ("sample_timesteps", 2, 1000), ("eta", 0, 1),
                            ("theta", 0, 1), ("cond_scale", 0, 1000)):
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise UserError(f"{value} is not between {low} and {high}", name)
    for flag in ("from", "to"):
        if not getattr(args, f"{flag}_caption", "none").strip():
            raise UserError("the caption is empty", flag)
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise UserError(f"{args.output_dir} is not a folder", "output_dir")


def load_photo(path):
    """(3, 256, 256) uint8; UserError if there is no such picture."""
    if not os.path.isfile(path):
        raise UserError(f"no such file: {path}", "photo")
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}", "photo") from error


# ----------------------------------------------------------------------------------------------
# commands: photos (N, 3, 256, 256) uint8 -> strip (B, 3, 256, 256) in [0, 1]


def variations(pipeline, photos, args):
    """The photo, and pictures drawn from its embedding and inverted noise by DDIM with --eta > 0.

    Section 3.1. The pictures share what the embedding holds, and the layout, which the noise holds.
    """
    image_embed = pipeline.embed_images(photos)  # (1, D)
    x_t = invert(pipeline, photos, image_embed, args)
    seeds = [derive_seed(args.seed, index) for index in range(args.num)]
    return join(photos, decode(pipeline, image_embed, x_t, seeds, args, eta=args.eta))


def reconstruct(pipeline, photos, args):
    """The photo, its reconstruction from the inverted noise, and a picture from random noise.

    Section 3.1, DDIM with eta 0. The third picture shows what the embedding alone holds.
    """
    image_embed = pipeline.embed_images(photos)  # (1, D)
    x_t = invert(pipeline, photos, image_embed, args)
    x_t = torch.cat([x_t, draw_part([args.seed], x_t.shape[1:], x_t.device, "unet", 1)])
    return join(photos, decode(pipeline, image_embed, x_t, [args.seed] * 2, args))


def interpolate(pipeline, photos, args):
    """Two photos, and between them --num pictures that change from the first to the second.

    Section 3.2, the first of its two methods: embeddings and inverted noises are both interpolated
    by slerp, so that the first and the last step are reconstructions (DDIM with eta 0).
    """
    image_embed = pipeline.embed_images(photos)  # (2, D)
    x_t = invert(pipeline, photos, image_embed, args)
    t = torch.linspace(0, 1, args.num)
    strip = decode(pipeline, slerp(*image_embed.split(1), t), slerp(*x_t.split(1), t),
                   [args.seed] * args.num, args)
    return join(photos[:1], strip, photos[1:])


def textdiff(pipeline, photos, args):
    """The photo, and --num pictures that change from the caption --from to the caption --to.

    Section 3.3: slerp of the image embedding towards norm(z_text - z_text_0), from 0 to --theta;
    the inverted noise stays the same (DDIM with eta 0).
    """
    before, after = pipeline.embed_captions([args.from_caption, args.to_caption])[0]  # (D,) each
    image_embed = pipeline.embed_images(photos)  # (1, D)
    x_t = invert(pipeline, photos, image_embed, args)
    path = slerp(image_embed, F.normalize(after - before, dim=0)[None],
                 torch.linspace(0, args.theta, args.num))  # (num, D)
    return join(photos, decode(pipeline, path, x_t, [args.seed] * args.num, args))


TWO_PHOTOS = {"interpolate"}
COMMANDS = {function.__name__: function
            for function in (variations, reconstruct, interpolate, textdiff)}


# ----------------------------------------------------------------------------------------------
# inversion and decoding


def slerp(a, b, t):
    """From a at t = 0 to b at t = 1 along the great circle (Shoemake 1985), row by row.

    a, b: (B, ...), each row one vector; t: a number or (B,); B may be 1 in any of them. Unit
    vectors stay unit vectors. Parallel and opposite vectors, for which the great circle is not
    unique, are interpolated linearly.
    """
    shape = -1, *(1,) * (a.ndim - 1)
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device).view(shape)
    u, v = (F.normalize(x.flatten(1), dim=1) for x in (a, b))
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)).view(shape)
    flat = angle.sin() < 1e-5
    sine = torch.where(flat, 1, angle.sin())
    return (torch.where(flat, 1 - t, ((1 - t) * angle).sin() / sine) * a
            + torch.where(flat, t, (t * angle).sin() / sine) * b)


@torch.no_grad()
def invert(pipeline, photos, image_embed, args):
    """The first stage's noise x_T (B, 3, h, w) for photos (B, 3, 256, 256) uint8 and image_embed
    (B, D), by DDIM inversion with the guidance of `decode` and INVERSION_STEPS or more steps. The
    photos are inverted one by one."""
    stage, photos = pipeline.stages[0], photos.to(image_embed.device)

    def invert_photo(photo, embed):
        denoise = build_first_denoiser(stage, embed, args)
        x_start = resize(photo, stage.config.image_size) / 127.5 - 1
        noise = draw_part([args.seed] * len(photo), x_start.shape[1:], x_start.device, "invert")
        levels = compute_levels(build_diffusion(stage.config, "cpu"),
                                max(INVERSION_STEPS, args.sample_timesteps or 0))
        x_t, levels = find_start(denoise, x_start, noise, levels)
        return invert_ddim(denoise, x_t, levels)
    return torch.cat([in_groups(invert_photo, GROUP)(photo, embed)
                      for photo, embed in zip(photos.split(1), image_embed.split(1))])


def invert_ddim(denoise, x_start, levels):
    """The noise of the first level from which DDIM draws x_start (B, ...), about: its steps walked
    backwards. Ramesh et al. 2022, sec. 3.1; Dhariwal and Nichol 2021, appendix F."""
    x_t = x_start  # taken for the least noisy level's
    for after, level in pairwise(reversed(levels[:-1])):
        x_start = denoise(x_t, after)
        noise = (x_t - after.alpha * x_start) / after.sigma
        x_t = level.alpha * x_start + level.sigma * noise
    return x_t


def build_first_denoiser(stage, image_embed, args):
    """denoise(x_t, level) of the first stage, guided by --cond_scale."""
    options = SampleOptions(cond_scale=args.cond_scale).fill(stage.config)
    return build_denoiser(stage.unet, stage.config, {"image_embed": image_embed},
                          options.cond_scale)


def find_start(denoise, x_start, noise, levels):
    """Where the inversion starts: (x_t, levels down to it). x_t is x_start (1, 3, h, w) noised to
    the least noisy level at which the error of `denoise` is below MAX_ERROR sigma.

    A DDIM step divides that error by sigma. If the inversion of a network that predicts x_start
    started nearer to the clean picture, it would end in noise that is many times too large. The
    photo is noised because the network has never seen a clean picture at a noisy level.
    """
    for index in reversed(range(len(levels) - 1)):
        level = levels[index]
        x_t = level.alpha * x_start + level.sigma * noise
        if (denoise(x_t, level) - x_start).square().mean().sqrt() < MAX_ERROR * level.sigma:
            break
    return x_t, [*levels[:index + 1], levels[-1]]


@torch.no_grad()
def decode(pipeline, image_embed, x_t, seeds, args, eta=0.0):
    """image (B, 3, 256, 256) in [0, 1] of image_embed (B or 1, D) and the first stage's noise x_t
    (B or 1, 3, h, w), by DDIM. seeds: B, for all other noise."""
    first, *later = pipeline.stages
    levels = compute_levels(build_diffusion(first.config, "cpu"),
                            args.sample_timesteps or first.config.sample_timesteps)

    def sample_first(embed, x_t, seeds):
        draw = partial(draw_part, seeds, x_t.shape[1:], x_t.device, "unet", 1)
        return sample_ddim(build_first_denoiser(first, embed, args), x_t, levels, draw, eta)
    x_start = in_groups(sample_first, GROUP)(
        image_embed.expand(len(seeds), -1), x_t.expand(len(seeds), -1, -1, -1), seeds)
    return sample_images(later, (x_start.clamp(-1, 1) + 1) / 2, seeds)


def join(*parts):
    """Photos (uint8) and pictures (float) as one strip (B, 3, 256, 256) in [0, 1]."""
    return torch.cat([resize(part.cpu() / 255 if part.dtype == torch.uint8 else part.cpu(),
                             STORE_IMAGE_SIZE) for part in parts])


if __name__ == "__main__":
    cli.run(main)
