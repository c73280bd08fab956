"""Puts a trained model into one folder that can be shared: `python -m dalle2.tools.publish`.

The folder holds prior.safetensors, decoder.safetensors, the CLIP where it is a file of one's own,
and README.md, a model card to complete. `python test_dalle2.py --model FOLDER` renders from it.
"""

import shutil
from pathlib import Path

from dalle2 import cli
from dalle2.checkpoint import load_export, save_export
from dalle2.errors import UserError, rename_argument
from dalle2.files import replace_file
from dalle2.pipeline import load_pipeline

CARD = """---
license: other  # choose one
library_name: dalle2-from-scratch
pipeline_tag: text-to-image
---

# {name}

A text-to-image model: a diffusion prior and a cascaded decoder in the manner of DALL-E 2
(Ramesh et al. 2022), on the CLIP {clip}. Trained on: (fill in the data and its licence).

    python test_dalle2.py --model FOLDER --prompt "a red bus"

{picture}| network | parameters | steps | batch | pictures seen |
|---|---|---|---|---|
{rows}

{report}## Limits

(fill in: what it draws badly, what it must not be used for)
"""


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_checkpoint_flags(parser)
    parser.add_argument("--output_dir", required=True, help="the folder, new or empty")
    parser.add_argument("--grid", help="a picture to show on the card, such as result/grid.jpg")
    return parser.parse_args()


def main():
    args = parse_args()
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", "output_dir")
    if args.grid and not Path(args.grid).is_file():
        raise UserError(f"no such file: {args.grid}", "grid")
    pipeline = load_pipeline(args, cli.pick_device())  # raises where they do not belong together
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(pipeline.header["clip"])
    if pipeline.clip_path:
        shutil.copyfile(pipeline.clip_path, folder / "clip.safetensors")
        record |= {"clip_pretrained": "clip.safetensors", "relative_path": "clip.safetensors"}
    networks = [("prior", pipeline.prior.network, pipeline.header)]
    for kind, path in pipeline.files.items():
        with rename_argument(path=f"{kind}_ckpt"):
            header, weights = load_export(path, kind)
        save_export(folder / f"{kind}.safetensors", kind, header | {"clip": record}, weights)
    networks += [(f"stage {stage.unet_number}, {stage.config.image_size} px", stage.unet, own)
                 for stage, own in zip(pipeline.stages, header["stages"])]
    write_card(folder, args, record, networks)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}; complete "
          f"README.md, then: hf upload NAME/MODEL {folder}")


def write_card(folder, args, record, networks):
    """README.md. networks: [(name, module, what its export records)]."""
    rows = []
    for name, module, header in networks:
        train = header["config"]["train"]
        params = sum(p.numel() for p in module.parameters()) / 1e6
        rows.append(f"| {name} | {params:.1f} M | {header['step']} | {train['batch_size']} | "
                    f"{header['step'] * train['batch_size']} |")
    if args.grid:
        shutil.copyfile(args.grid, folder / "grid.jpg")
    report = Path(args.prior_ckpt).parent / "report_card.md"
    card = CARD.format(
        name=folder.name, clip=record["relative_path"] or
        f"{record['clip_model']} of open_clip ({record['clip_pretrained']})",
        rows="\n".join(rows), picture="![pictures](grid.jpg)\n\n" if args.grid else "",
        report=f"The prior on held-out pictures:\n\n{report.read_text()}\n"
        if report.is_file() else "")
    replace_file(folder / "README.md", lambda part: part.write_text(card))


if __name__ == "__main__":
    cli.run(main)
