"""Files that training leaves: checkpoints to resume from, and exports that describe themselves.

Everything is written beside its place, flushed and renamed, so that a process killed half way
leaves the file of before. An export is a safetensors file whose header holds the whole config.
"""

import json
import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

from dalle2.config import UserError

HEADER_KEY = "dalle2"


def replace_file(path, write):
    """Calls `write(temporary path)`, then renames what it wrote to `path`, durably."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def save_checkpoint(folder, step, state, keep=2):
    """Writes `state` as `<folder>/step_<step>.pt` and drops all but the newest `keep`."""
    replace_file(Path(folder) / f"step_{step:08d}.pt", lambda part: torch.save(state, part))
    for path in sorted(Path(folder).glob("step_*.pt"))[:-keep]:
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
