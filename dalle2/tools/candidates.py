"""The weights of a run that can be chosen, and what its network draws with them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dalle2.checkpoint import load_export, read_export_header, save_export
from dalle2.config import PriorConfig, UnetConfig, config_from_dict
from dalle2.errors import UserError
from dalle2.files import hold_lock
from dalle2.models import build_prior, build_unet
from dalle2.sampling import Stage, sample_image_embed
from dalle2.tools.averages import list_snapshots, solve_weights, synthesize


@dataclass
class Run:
    """A run folder of a prior (unet_number 0) or of a stage of a decoder (1-based)."""

    folder: Path
    header: dict  # its config.json
    unet_number: int

    def __post_init__(self):
        number, folder = self.unet_number, self.folder
        self.config = config_from_dict(UnetConfig if number else PriorConfig, self.header["config"])
        self.kind, self.prefix, folder = ("decoder", f"unets.{number - 1}.", folder.parent) \
            if number else ("prior", "net.", folder)
        self.export = folder / f"{self.kind}.safetensors"

    def build_network(self):
        embed_dim = self.header["embed_dim"]
        return build_unet(self.config, self.unet_number, embed_dim) if self.unet_number \
            else build_prior(self.config, embed_dim)


def open_run(folder):
    """The Run in `folder`; UserError if there is none."""
    folder = Path(folder).resolve()
    try:
        header = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no config.json of a run", "run_dir") from None
    number = re.fullmatch(r"unet([1-9]\d*)", folder.name)
    is_prior = "max_text_len" in header.get("config", {})
    if not is_prior and not (number and "lowres_size" in header):
        raise UserError(f"{folder} is neither the run of a prior nor of a decoder stage", "run_dir")
    return Run(folder, header, 0 if is_prior else int(number[1]))


def list_candidates(args, run):
    """[{"step", "sigma_rel", "mismatch", "export", "sources"}], first the averages, then the
    exports, whose sigma_rel and mismatch are None. sources: the files with the weights.
    """
    saved_steps = sorted({step for step, _ in list_snapshots(run.folder)})
    for step in set(args.steps or ()) - set(saved_steps):
        raise UserError(f"{run.folder} has no averages of step {step}, only of "
                        f"{', '.join(map(str, saved_steps)) or 'none'}", "steps")
    candidates = []
    for step in sorted(set(args.steps or saved_steps))[-args.last_steps:]:  # -0: all
        snapshots = list_snapshots(run.folder, step)
        candidates += [{"step": step, "sigma_rel": sigma_rel, "export": None,
                        "mismatch": solve_weights(list(snapshots), step, sigma_rel)[1],
                        "sources": list(snapshots.values())}
                       for sigma_rel in sorted(set(args.sigma_rel))]
    for path in (run.export, run.export.with_stem(f"{run.kind}_last")):
        record = read_export_header(path, run.kind) if path.is_file() else None
        if record and run.unet_number:
            record = record["stages"][run.unet_number - 1]
        if record and "chosen" not in record:  # chosen weights are candidates already
            candidates.append({"step": record["step"], "sigma_rel": None, "export": path.name,
                               "mismatch": None, "sources": [path]})
    if not candidates:
        raise UserError(f"{run.folder} has neither averages nor an export", "run_dir")
    return candidates


def describe(candidate):
    return candidate["export"] or f"step {candidate['step']}, sigma_rel {candidate['sigma_rel']:g}"


def load_weights(run, candidate):
    """The candidate's state dict."""
    if not candidate["export"]:
        return synthesize(run.folder, candidate["step"], candidate["sigma_rel"])
    _, weights = load_export(run.export.with_name(candidate["export"]), run.kind)
    return {name.removeprefix(run.prefix): value for name, value in weights.items()
            if name.startswith(run.prefix)}


def write_chosen(run, best, metric):
    """Writes the weights of the candidate `best` into the run's export."""
    if best["export"] == run.export.name:
        return print(f"{run.export} already holds the best weights")
    with hold_lock(run.folder / ".lock", UserError(
            f"{run.folder} is in use by another process", "write")):
        record = {"step": best["step"], "chosen": {
            "step": best["step"], "sigma_rel": best["sigma_rel"], "metric": metric,
            "score": best["score"]}}
        weights = {run.prefix + name: value for name, value in load_weights(run, best).items()}
        header = {**run.header, **record}
        if run.unet_number:
            source = run.export if run.export.is_file() else run.export.with_stem("decoder_last")
            header, others = load_export(source, "decoder")
            header["stages"][run.unet_number - 1] = {"config": run.header["config"], **record}
            weights |= {name: value for name, value in others.items()
                        if not name.startswith(run.prefix)}
        save_export(run.export, run.kind, header, weights)
    print(f"{run.export}: now {describe(best)}")


# ----------------------------------------------------------------------------------------------
# drawing


def load_true_and_conditions(run, store):
    """(true, conditions): what the network should draw, image_embed (N, D) or image (N, 3, H, W) in
    [0, 1], and a list of tensors (N, ...) that it draws it from."""
    def load_images(size):
        images = store.images if size == store.images.shape[-1] else store.load_small_images(size)
        return torch.tensor(images[:]) / 255
    image_embed = torch.tensor(store.image_embed[:]).float()
    if run.unet_number == 0:
        rows = store.caption_start[:-1]
        encodings = store.load_text_encodings(rows, run.config.max_text_len).float()
        return F.normalize(image_embed, dim=-1), [torch.tensor(store.text_embed[rows]).float(),
                                                  encodings]
    return load_images(run.config.image_size), [
        image_embed if run.unet_number == 1 else load_images(run.header["lowres_size"])]


def draw(run, network, conditions, seeds):
    """image_embed (B, D), or image (B, 3, H, W) in [0, 1]."""
    if run.unet_number == 0:
        return sample_image_embed(network, run.config, *conditions, seeds)
    stage = Stage(network, run.config, run.unet_number)  # a later stage draws from photos
    return stage.sample(*conditions, seeds)
