"""Exports with a damaged header, other tensors or lost bytes: one line, or they load."""

import copy
import json
import random
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


def list_places(value, found=()):
    """Paths to every value of nested dicts and lists, the whole first."""
    yield found
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in pairs:
            yield from list_places(part, (*found, key))


def damage_header(header, place, chance):
    """A copy of `header` whose value at `place` is gone, renamed or another one."""
    header = copy.deepcopy(header)
    parent = header
    for key in place[:-1]:
        parent = parent[key]
    how = chance.choice(["drop", "add", "change", "change", "change"])
    if how == "drop" or (how == "add" and isinstance(parent, list)):
        del parent[place[-1]]
    elif how == "add":
        parent["unknown"] = 1
    else:
        parent[place[-1]] = chance.choice(VALUES)
    return header


def damage_weights(weights, chance):
    weights, name = dict(weights), chance.choice(sorted(weights))
    value = weights.pop(name)
    changed = [None, value[None], value.flatten()[:1], value.double(), value.bool(),
               torch.zeros(0)][chance.randrange(6)]
    if changed is None:
        weights[chance.choice(["net.", "unets.7.", ""]) + "other"] = value
    elif chance.random() < 0.8:
        weights[name] = changed.contiguous()
    return weights


def load_or_refuse(kind, path):
    """The UserError of one line that names argument and file, or None where the file loads."""
    try:
        LOADERS[kind](path)
    except UserError as error:
        assert str(error).startswith(f"{ARGUMENTS[kind]}: {path} is "), error
        assert "\n" not in str(error) and len(str(error)) < 500
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
def test_every_value_of_a_header_can_be_damaged(exports, kind, tmp_path):
    (header, weights), chance, refused = exports[kind], random.Random(kind), []
    for place in list(list_places(header))[1:]:
        if "train" not in place[:-1] or chance.random() < 0.2:
            write(tmp_path / "x", damage_header(header, place, chance), weights)
            refused.append(load_or_refuse(kind, tmp_path / "x"))
    assert sum(map(bool, refused)) > len(refused) / 2


@pytest.mark.parametrize("kind", LOADERS)
def test_tensors_that_are_not_the_networks_are_refused(exports, kind, tmp_path):
    (header, weights), chance, refused = exports[kind], random.Random(kind), []
    for _ in range(12):
        write(tmp_path / "x", header, damage_weights(weights, chance))
        refused.append(load_or_refuse(kind, tmp_path / "x"))
    assert sum(map(bool, refused)) > 4


@pytest.mark.parametrize("kind", LOADERS)
def test_lost_bytes_and_headers_that_are_no_json(exports, kind, tmp_path):
    header, weights = exports[kind]
    write(tmp_path / "whole", header, weights)
    content = (tmp_path / "whole").read_bytes()
    for length in (0, 7, 8, 100, struct.unpack("<Q", content[:8])[0], len(content) - 1):
        (tmp_path / "x.safetensors").write_bytes(content[:length])
        if kind != "clip":  # a file of any other origin may be a CLIP of open_clip's
            assert load_or_refuse(kind, tmp_path / "x.safetensors")
    for text in ("", "{", "3", "[]", '{"kind": []}', "[" * 100_000, "9" * 5000):
        write(tmp_path / "x", text, weights)
        assert "is damaged" in load_or_refuse(kind, tmp_path / "x")


@pytest.mark.parametrize("kind, place, value, told", [
    ("prior", ("kind",), None, "kind None is unknown"),
    ("prior", ("config", "depth"), 10 ** 9, "depth: 1000000000 must be at most 1000"),
    ("prior", ("config", "cond_scale"), float("nan"), "cond_scale: nan must be at least 0"),
    ("prior", ("embed_dim",), 2 ** 30, "is damaged"),
    ("prior", ("clip", "fingerprint"), 5, "clip.fingerprint in its header cannot be 5"),
    ("decoder", ("stages",), [], "none of its 0 stages"),
    ("decoder", ("stages", 1), None, "none of its 2 stages"),
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
    write(tmp_path / "x", header, weights)
    assert told in load_or_refuse(kind, tmp_path / "x")
