"""Files that training leaves: checkpoints to resume from, and exports that describe themselves.

An export is a safetensors file whose header holds the whole config.
"""

import json
import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dalle2.config import UserError
from dalle2.files import replace_file

HEADER_KEY = "dalle2"


def save_checkpoint(folder, state, must=False, keep=2):
    """Writes `state` as `<folder>/step_<step>.pt` and drops all but the newest `keep`.

    A full disk leaves the checkpoints of before: a warning, or a UserError where this one `must` be
    written.
    """
    folder = Path(folder)
    path = folder / f"step_{state['step']:08d}.pt"
    try:
        replace_file(path, lambda part: torch.save(state, part))
    except (OSError, RuntimeError) as error:
        path.with_name(path.name + ".part").unlink(missing_ok=True)
        left = sorted(folder.glob("step_*.pt"))
        told = (f"{path} could not be written ({str(error).splitlines()[0]}); the last good "
                f"checkpoint is {left[-1].name if left else 'none'}")
        if must:
            raise UserError(f"--output_dir: {told}; make room and run the same command") from error
        tqdm.write(f"warning: {told}")
        return
    for path in sorted(folder.glob("step_*.pt"))[:-keep]:
        path.unlink()


def load_newest_checkpoint(folder):
    """The newest checkpoint in `folder` that loads, or None. A damaged one is passed over."""
    for path in sorted(Path(folder).glob("step_*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            print(f"warning: {path} is damaged and passed over ({str(error).splitlines()[0]})")
    return None


def save_export(path, kind, header, state):
    """Writes `state` {name: tensor} with `header` (JSON) into a safetensors file."""
    metadata = {HEADER_KEY: json.dumps({"kind": kind, **header})}
    # clones: safetensors refuses tensors that share memory, as the layers of the prior do theirs
    state = {name: value.detach().cpu().clone() for name, value in state.items()}
    replace_file(path, lambda part: save_file(state, part, metadata))


def read_export_header(path, kind, flag="file"):
    """Header of an export; None for a file of another origin where `kind` is None.

    Raises UserError, naming `flag`, where the file is absent or of another kind than `kind`.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag}: no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "null"))
    except (safetensors.SafetensorError, OSError):
        header = None
    if kind is not None and (header is None or header["kind"] != kind):
        found = "no export of this project" if header is None else f"a {header['kind']} export"
        raise UserError(f"{flag}: {path} is {found}, a {kind} export is needed")
    return header


def load_export(path, kind, flag):
    """(header, {name: tensor}) of an export of `kind`; raises UserError like read_export_header."""
    return read_export_header(path, kind, flag), load_file(path)
