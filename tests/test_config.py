"""The configs: every field is read, JSON brings them back, senseless values are named."""

import ast
import dataclasses
import json

import pytest
from helpers import ROOT, TOY

from dalle2 import config as config_module
from dalle2.config import (
    PRESETS,
    Preset,
    PriorConfig,
    config_from_dict,
    config_to_dict,
    validate_config,
)
from dalle2.errors import UserError

KINDS = [kind for kind in vars(config_module).values()
         if dataclasses.is_dataclass(kind) and isinstance(kind, type)]


def test_every_field_is_read_somewhere():
    read = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("dalle2/*.py")]:
        if path.name == "config.py":
            continue
        read |= {node.attr for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    fields = {item.name for kind in KINDS for item in dataclasses.fields(kind)}
    assert fields - read == set()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    preset = PRESETS[name]
    validate_config(preset)
    assert config_from_dict(Preset, json.loads(json.dumps(config_to_dict(preset)))) == preset


@pytest.mark.parametrize("changes, told", [
    ({"depht": 3}, "depht"), ({"train": [1]}, "TrainConfig"), ({"depth": "4"}, "depth"),
    ({"depth": 4.0}, "depth"), ({"depth": True}, "depth"), ({"depth": None}, "depth"),
    ({"normformer": 1}, "normformer"), ({"beta_schedule": "sine"}, "beta_schedule"),
    ({"depth": 0}, "depth: 0 must be positive"), ({"cond_scale": float("nan")}, "cond_scale"),
    ({"depth": 2 ** 63}, "depth"), ({"text_cond_drop_prob": 1.0}, "must be below 1")])
def test_senseless_values_are_named(changes, told):
    with pytest.raises(UserError, match=told):
        validate_config(config_from_dict(PriorConfig, {**config_to_dict(TOY.prior), **changes}))


def test_a_missing_field_is_named_and_a_whole_number_is_a_number():
    values = config_to_dict(TOY.prior)
    assert config_from_dict(PriorConfig, {**values, "cond_scale": 2}).cond_scale == 2
    del values["depth"]
    with pytest.raises(UserError, match="missing fields .'depth'"):
        config_from_dict(PriorConfig, values)
