"""Exports with a damaged header, other tensors or lost bytes: one line, or they load."""

import copy
import json

import pytest
from helpers import change_unets, write_checkpoints, write_clip
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dalle2.checkpoint import HEADER_KEY
from dalle2.clip import load_clip
from dalle2.errors import UserError
from dalle2.models import load_decoder, load_prior

LOADERS = {"prior": load_prior, "decoder": load_decoder,
           "clip": lambda path: load_clip("", str(path))}
ARGUMENTS = {"prior": "path", "decoder": "path", "clip": "clip_pretrained"}
VALUES = [None, True, "word", "", [], {}, [1, [2]], 0, -1, 1.5, 3, float("nan"), float("inf"),
          10 ** 9, 10 ** 18, 10 ** 400, -10 ** 400]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{kind: (header, {name: tensor})} of small exports."""
    folder = tmp_path_factory.mktemp("exports")
    write_checkpoints(folder, write_clip(folder / "clip.safetensors"), unets=change_unets(
        {"dim": 8, "dim_mults": (1, 2)}, {"dim": 8, "dim_mults": (1, 2)}))
    paths = {kind: folder / f"{kind}.safetensors" for kind in LOADERS}
    return {kind: (read_header(path), load_file(path)) for kind, path in paths.items()}


def read_header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[HEADER_KEY])


def write(path, header, weights):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(weights, path, {HEADER_KEY: text})


def load_or_refuse(kind, path):
    """The UserError of one line that names argument and file, or None where the file loads."""
    try:
        LOADERS[kind](path)
    except UserError as error:
        assert str(error).startswith(f"{ARGUMENTS[kind]}: {path} is "), error
        assert "\n" not in str(error) and len(str(error)) < 500
        return str(error)


@pytest.mark.parametrize("kind, place, value, message", [
    ("prior", ("kind",), None, "kind None is unknown"),
    ("prior", ("config", "depth"), 10 ** 9, "depth: 1000000000 must be at most 1000"),
    ("prior", ("embed_dim",), 2 ** 30, "is damaged"),
    ("prior", ("clip", "fingerprint"), 5, "clip.fingerprint in its header cannot be 5"),
    ("decoder", ("stages", 1), None, "none of its 2 stages"),
    ("decoder", ("stages", 0, "config", "dim_mults"), [1, 10 ** 12], "is damaged"),
    ("clip", ("config", "context_length"), 10 ** 9, "has shape"),
    ("clip", ("config", "text_heads"), 7, "is damaged")])
def test_what_is_wrong_is_told(exports, tmp_path, kind, place, value, message):
    header, weights = copy.deepcopy(exports[kind])
    parent = header
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    write(tmp_path / "x", header, weights)
    assert message in load_or_refuse(kind, tmp_path / "x")
