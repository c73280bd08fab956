import ast
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dalle2 import config as config_module
from dalle2.config import (
    PRESETS,
    Preset,
    PriorConfig,
    UnetConfig,
    config_from_dict,
    config_to_dict,
    validate_config,
)
from dalle2.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("name", ["small", "base"])
def test_networks_are_optimized_as_in_the_paper(name):
    """Ramesh et al. 2022, table 3."""
    prior, *stages = (config.train for config in (PRESETS[name].prior,
                                                  *PRESETS[name].decoder.unets))
    assert (prior.lr, prior.weight_decay, prior.adam_beta2, prior.adam_eps, prior.ema_decay) == (
        1.1e-4, 6e-2, 0.96, 1e-6, 0.9999)
    for stage in stages:
        assert (stage.lr, stage.weight_decay, stage.adam_beta2, stage.adam_eps,
                stage.ema_decay) == (1.2e-4, 0, 0.999, 1e-8, 0.9999)


def test_unknown_and_missing_fields_are_named():
    values = config_to_dict(PRESETS["toy"].prior)
    with pytest.raises(UserError, match="depht"):
        config_from_dict(type(PRESETS["toy"].prior), {**values, "depht": 3})
    del values["depth"]
    with pytest.raises(UserError, match="depth"):
        config_from_dict(type(PRESETS["toy"].prior), values)


@pytest.mark.parametrize("field, value", [
    ("lr", 0.0), ("lr", -1.0), ("num_steps", 0), ("batch_size", -4), ("ema_decay", 1.5),
    ("lr_schedule", "linear"), ("mixed_precision", "fp8"), ("lr", float("nan")),
    ("max_grad_norm", float("inf")), ("num_steps", 2 ** 63)])
def test_senseless_values_are_named(field, value):
    train = replace(PRESETS["toy"].prior.train, **{field: value})
    with pytest.raises(UserError, match=f"{field}"):
        validate_config(train)


@pytest.mark.parametrize("field, value", [
    ("depth", "4"), ("depth", 4.0), ("depth", True), ("depth", None), ("normformer", 1),
    ("train", [1]), ("beta_schedule", 1)])
def test_values_of_another_type_are_named(field, value):
    values = config_to_dict(PRESETS["toy"].prior)
    with pytest.raises(UserError, match="TrainConfig" if field == "train" else f"{field}: "):
        config_from_dict(PriorConfig, {**values, field: value})
    assert config_from_dict(PriorConfig, {**values, "cond_scale": 2}).cond_scale == 2
    with pytest.raises(UserError, match="dim_mults"):
        unet = config_to_dict(PRESETS["toy"].decoder.unets[0])
        config_from_dict(UnetConfig, {**unet, "dim_mults": [2, "4"]})
