"""The configs: every field is read, JSON brings them back, senseless values are named."""

import ast
import dataclasses
import json
from dataclasses import replace

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


def test_base_is_optimized_as_in_the_paper():
    """Ramesh et al. 2022, table 3."""
    base = PRESETS["base"]
    prior, *stages = (config.train for config in (base.prior, *base.decoder.unets))
    assert (prior.lr, prior.weight_decay, prior.adam_beta2, prior.adam_eps, prior.ema_decay) == (
        1.1e-4, 6e-2, 0.96, 1e-6, 0.9999)
    for stage in stages:
        assert (stage.lr, stage.weight_decay, stage.adam_beta2, stage.adam_eps,
                stage.ema_decay) == (1.2e-4, 0, 0.999, 1e-8, 0.9999)


def test_unknown_and_missing_fields_and_other_types_are_named():
    values = config_to_dict(TOY.prior)
    for name, value in (("depht", 3), ("depth", "4"), ("depth", 4.0), ("depth", True),
                        ("depth", None), ("normformer", 1), ("beta_schedule", 1)):
        with pytest.raises(UserError, match=name):
            config_from_dict(PriorConfig, {**values, name: value})
    with pytest.raises(UserError, match="TrainConfig"):
        config_from_dict(PriorConfig, {**values, "train": [1]})
    with pytest.raises(UserError, match="depth"):
        config_from_dict(PriorConfig, {k: v for k, v in values.items() if k != "depth"})
    assert config_from_dict(PriorConfig, {**values, "cond_scale": 2}).cond_scale == 2


@pytest.mark.parametrize("field, value", [
    ("lr", 0.0), ("num_steps", 0), ("ema_decay", 1.5), ("lr_schedule", "linear"),
    ("lr", float("nan")), ("max_grad_norm", float("inf")), ("num_steps", 2 ** 63)])
def test_senseless_values_are_named(field, value):
    with pytest.raises(UserError, match=field):
        validate_config(replace(TOY.prior.train, **{field: value}))
