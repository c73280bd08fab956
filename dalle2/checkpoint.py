"""Files that training leaves: checkpoints to resume from, and exports that describe themselves.

An export is a safetensors file whose header holds the whole config.
"""

import contextlib
import json
import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dalle2.errors import UserError
from dalle2.files import replace_file

HEADER_KEY = "dalle2"
_CLIP = {"clip_model": str, "clip_pretrained": str, "relative_path": str, "fingerprint": str}
HEADERS = {  # what a header must hold, by the kind of its export; more may be there
    "clip": {"config": dict},
    "prior": {"config": dict, "embed_dim": int, "clip": _CLIP},
    "decoder": {"embed_dim": int, "clip": _CLIP, "stages": list},
    "snapshot": {"step": int, "sigma_rel": float}}


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
        message = (f"{path} could not be written ({str(error).splitlines()[0]}); the last good "
                f"checkpoint is {left[-1].name if left else 'none'}")
        if must:
            raise UserError(f"{message}; make room and run the same command",
                            "output_dir") from error
        tqdm.write(f"warning: {message}")
        return
    for path in sorted(folder.glob("step_*.pt"))[:-keep]:
        path.unlink()


def load_newest_checkpoint(folder):
    """The newest checkpoint in `folder` that loads, or None. A damaged one is skipped."""
    for path in sorted(Path(folder).glob("step_*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            print(f"warning: {path} is damaged and skipped ({str(error).splitlines()[0]})")
    return None


def save_export(path, kind, header, state):
    """Writes `state` {name: tensor} with `header` (JSON) into a safetensors file."""
    metadata = {HEADER_KEY: json.dumps({"kind": kind, **header})}
    # clones: safetensors refuses tensors that share memory, as the layers of the prior do theirs,
    # and those whose channels are innermost
    state = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
             for name, value in state.items()}
    replace_file(path, lambda part: save_file(state, part, metadata))


def read_export_header(path, kind):
    """Header of an export; None for a file of another origin where `kind` is None.

    Raises UserError where the file is absent, damaged or of another kind than `kind`.
    """
    if not os.path.isfile(path):
        raise UserError(f"no such file: {path}", "path")
    metadata, why = {}, ""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        why = f" ({str(error).splitlines()[0]})"
    if HEADER_KEY not in metadata:
        if kind is None:
            return None
        raise UserError(f"{path} is no export of this project{why}, a {kind} export is needed",
                        "path")
    with explain_damage(path):
        header = json.loads(metadata[HEADER_KEY])
        found = header.get("kind") if isinstance(header, dict) else None
        if found not in tuple(HEADERS):
            raise UserError(f"its kind {found!r:.40} is unknown")
        if kind in (None, found):
            check_header(header, HEADERS[found])
            return header
    raise UserError(f"{path} is a {found} export, a {kind} export is needed", "path")


def check_header(header, wanted, prefix=""):
    """Raises UserError naming the first field of `header` that is missing or not of the type
    in `wanted`."""
    if not isinstance(header, dict):
        raise UserError(f"{header!r:.40} in its header is no object with fields")
    for name, kind in wanted.items():
        if name not in header:
            raise UserError(f"{prefix}{name} is missing from its header")
        value, is_nested = header[name], isinstance(kind, dict)
        if type(value) is not (dict if is_nested else kind) or (kind is int and value < 1):
            raise UserError(f"{prefix}{name} in its header cannot be {value!r:.40}")
        if is_nested:
            check_header(value, kind, f"{prefix}{name}.")


def load_export(path, kind):
    """(header, {name: tensor}) of an export of `kind`; raises UserError like read_export_header."""
    header = read_export_header(path, kind)
    with explain_damage(path):
        return header, load_file(path)


@contextlib.contextmanager
def explain_damage(path):
    """Turns whatever goes wrong with the contents of the export `path`, in a network's constructor
    for example, into a UserError of one line that names the file."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        what = " ".join(what.split())
        raise UserError(f"{path} is damaged: {what:.300}", "path") from error


def load_network(build, weights):
    """The network that `build()` gives, with `weights`, in eval mode. Raises UserError where names
    or shapes do not fit, before anything of its size is allocated."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in build().state_dict().items()}
    for name in wanted.keys() | weights.keys():
        if name not in weights:
            raise UserError(f"tensor {name} is missing")
        if name not in wanted:
            raise UserError(f"tensor {name} belongs to no part of the network")
        if weights[name].shape != wanted[name]:
            raise UserError(f"tensor {name} has shape {tuple(weights[name].shape)}, not "
                            f"{tuple(wanted[name])}")
    network = build()
    network.load_state_dict(weights)
    return network.eval()
