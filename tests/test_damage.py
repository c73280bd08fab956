"""Exports with a damaged header, other tensors or lost bytes: one line that names the file."""

import copy
import json
import struct

import pytest
import torch
from helpers import change_unets, write_checkpoints, write_clip
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dalle2.checkpoint import HEADER_KEY
from dalle2.clip import load_clip
from dalle2.errors import UserError
from dalle2.models import load_decoder, load_prior

LOADERS = {"prior": load_prior, "decoder": load_decoder,
           "clip": lambda path: load_clip("", str(path))}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{kind: (header, {name: tensor})} of small exports."""
    folder, exports = tmp_path_factory.mktemp("exports"), {}
    write_checkpoints(folder, write_clip(folder / "clip.safetensors"), unets=change_unets(
        *[{"dim": 8, "dim_mults": (1, 2)}] * 2))
    for kind in LOADERS:
        with safe_open(folder / f"{kind}.safetensors", framework="pt") as file:
            header = json.loads(file.metadata()[HEADER_KEY])
        exports[kind] = header, load_file(folder / f"{kind}.safetensors")
    return exports


def refuse(kind, path, header, weights):
    """What is said of an export with this header, a dict or text, and these weights."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(weights, path, {HEADER_KEY: text})
    return read_refusal(kind, path)


def read_refusal(kind, path):
    with pytest.raises(UserError) as error:
        LOADERS[kind](path)
    argument = "clip_pretrained" if kind == "clip" else "path"
    assert str(error.value).startswith(f"{argument}: {path} is ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", LOADERS)
def test_tensors_lost_bytes_and_headers_that_are_no_json(exports, kind, tmp_path):
    (header, weights), path = exports[kind], tmp_path / "x.safetensors"
    name, value = max(weights.items(), key=lambda item: item[1].numel())
    rest = {key: other for key, other in weights.items() if key != name}
    for changed, told in ((rest, "is missing"), ({**rest, name: value[None]}, "has shape"),
                          ({**weights, "unets.7.other": value.clone()}, "belongs to n")):
        assert told in refuse(kind, path, header, changed)
    for text in ("", "{", "3", "[]", '{"kind": []}', "[" * 100_000, "9" * 5000):
        assert "is damaged" in refuse(kind, path, text, {"a": torch.zeros(1)})
    save_file(weights, path, {HEADER_KEY: json.dumps(header)})
    content = path.read_bytes()
    for length in (0, 7, 8, 100, struct.unpack("<Q", content[:8])[0], len(content) - 1):
        path.write_bytes(content[:length])
        if kind != "clip":  # a file of any other origin may be a CLIP of open_clip's
            read_refusal(kind, path)


@pytest.mark.parametrize("kind, place, value, told", [
    ("prior", ("kind",), None, "kind None is unknown"),
    ("prior", ("config",), [1, [2]], "config in its header cannot be"),
    ("prior", ("config", "depth"), 10 ** 9, "depth: 1000000000 must be at most 1000"),
    ("prior", ("config", "depth"), 10 ** 400, "depth: "),
    ("prior", ("config", "cond_scale"), float("nan"), "cond_scale: nan must be at least 0"),
    ("prior", ("config", "train", "lr"), "word", "lr: 'word' is no float"),
    ("prior", ("embed_dim",), 2 ** 30, "is damaged"),
    ("prior", ("clip", "fingerprint"), 5, "clip.fingerprint in its header cannot be 5"),
    ("decoder", ("stages",), [], "none of its 0 stages"),
    ("decoder", ("stages", 1), None, "none of its 2 stages"),
    ("decoder", ("stages", 0), {}, "config is missing"),
    ("decoder", ("stages", 0, "config", "dim_mults"), [1, 10 ** 12], "is damaged"),
    ("decoder", ("stages", 0, "config", "memory_efficient"), 1, "memory_efficient: 1 is no bool"),
    ("clip", ("config", "context_length"), 10 ** 9, "has shape"),
    ("clip", ("config", "text_heads"), 7, "is damaged")])
def test_what_is_wrong_is_told(exports, tmp_path, kind, place, value, told):
    header, weights = copy.deepcopy(exports[kind])
    parent = header
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    assert told in refuse(kind, tmp_path / "x", header, weights)
