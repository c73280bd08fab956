"""The configs: senseless values are named; every field changes something: each is walked, and what
comes out is compared; what a task draws and validates."""

import ast
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from helpers import ROOT, TOY, D, RandomStore, shake_module
from test_train_loop import CONFIG, run_training

from dalle2 import cli
from dalle2 import config as kinds
from dalle2.checkpoint import save_export
from dalle2.clip import build_clip
from dalle2.config import (
    PRESETS,
    Preset,
    PriorConfig,
    config_from_dict,
    config_to_dict,
    validate_config,
)
from dalle2.errors import UserError
from dalle2.images import resize
from dalle2.models import build_prior, build_unet
from dalle2.rng import BatchRandom
from dalle2.sampling import build_stages, sample_image_embed, sample_images
from dalle2.tasks import ClipTask, PriorTask, UnetTask
from dalle2.train_state import TrainState
from dalle2.validation import ROWS


def test_every_field_is_read_somewhere():
    paths = {*ROOT.glob("*.py"), *ROOT.glob("dalle2/*.py")} - {ROOT / "dalle2" / "config.py"}
    read = {node.attr for path in paths for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    for kind in (kinds.TrainConfig, kinds.ClipConfig, PriorConfig, kinds.UnetConfig):
        assert {item.name for item in fields(kind)} <= read


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


TRAIN = dict(num_steps=7, batch_size=6, lr=2e-2, muon_lr=0.01, lr_schedule="constant",
             warmup_steps=5, weight_decay=0.9, adam_beta2=0.5, adam_eps=1e-2,
             max_grad_norm=0.01, ema_decay=0.2, device_batch_size=1, seed=1, save_every=3,
             save_minutes=1e-9, validate_every=3, snapshot_every=4)
CLIP = dict(embed_dim=64, image_size=64, vision_width=24, vision_layers=(2, 1, 1, 1),
            text_layers=3, text_heads=2, context_length=20, logit_scale=5.0, min_crop_scale=0.5,
            color_jitter=0.5, word_dropout=0.5)
PRIOR = dict(depth=3, heads=2, dim_head=16, max_text_len=20, normformer=True, discrete_time=True,
             timesteps=500, beta_schedule="cosine", text_cond_drop_prob=0.9, sample_timesteps=3,
             num_candidates=9, cond_scale=4.0)
UNET = dict(image_size=16, dim=32, dim_mults=(2, 4), num_resnet_blocks=1,
            self_attn=(False, False, True, True), attn_heads=2, attn_dim_head=16,
            memory_efficient=False, cond_dim=32, num_image_tokens=3, init_conv_kernel_size=0,
            objective="v", timesteps=500, beta_schedule="cosine",
            min_snr_gamma=5.0, last_timestep_share=0.9, image_cond_drop_prob=0.9,
            image_embed_noise=0.5, sample_timesteps=3, cond_scale=3.0)
UPSAMPLER = dict(crop_size=32, lowres_noise_max_level=10, lowres_noise_level=300)  # second stage


@pytest.fixture(scope="module")
def seen():
    """What the unchanged configs give, computed once."""
    return {}


def differs(one, other):
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(differs(one[name], other[name]) for name in one)
    if torch.is_tensor(one):
        return one.shape != other.shape or not torch.equal(one, other)
    return one != other


def assert_changes(seen, kind, run, before, after):
    if kind not in seen:
        seen[kind] = run(before)
    assert differs(seen[kind], run(after))


def test_the_walks_leave_no_field_out():
    tested_elsewhere = {"mixed_precision", "channels_last", "compile", "cuda_graphs", "fsdp"}
    in_test_clip = {"vision_timm", "lock_vision", "swap_weight"}
    for kind, walked in ((kinds.TrainConfig, {*TRAIN, *tested_elsewhere}),
                         (kinds.ClipConfig, {*CLIP, *in_test_clip}),
                         (kinds.PriorConfig, PRIOR),
                         (kinds.UnetConfig, {**UNET, **UPSAMPLER})):
        assert {item.name for item in fields(kind)} - {"train", "gradient_checkpointing"} == \
            set(walked)


@pytest.mark.parametrize("field", TRAIN)
def test_training(field, tmp_path, seen):
    def run(config):
        events = []

        def validate(module, brief):
            events.append("validate")
            return {"val_loss": 1.0}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        exported, raw, metrics = run_training(
            folder, config, validate=validate, num_val=1, at_step=events.append,
            can_sample=True, sample=lambda module: events.append("sample"))
        return {"exported": exported, "raw": raw, "events": events,
                "snapshots": len(list((folder / "averages").glob("*"))),
                "lr": [m["lr"] for m in metrics]}
    config = replace(CONFIG, num_steps=9, validate_every=5, save_every=5)
    # the clock is looked at when a step is logged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dalle2.train_loop.LOG_EVERY", 2)
        assert_changes(seen, "train", run, config, replace(config, **{field: TRAIN[field]}))


def test_channels_last(store, tmp_path):
    """Kernels lie with their channels innermost, also when they are exported; the loss stays what
    it was."""
    task, losses = UnetTask(1, TOY.decoder, Accelerator(cpu=True), store), []
    for channels_last in (False, True):
        torch.manual_seed(0)
        unet = shake_module(build_unet(task.config, 1, D))
        state = TrainState(unet, replace(task.config.train, batch_size=2,
                                         channels_last=channels_last), task.accelerator)
        kernels = [p for p in unet.parameters() if p.ndim == 4 and min(p.shape) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) == channels_last
                   for p in kernels)
        batch = task.load(store, np.arange(2), BatchRandom("data", batch_size=2))
        losses.append(state.compute_gradients(0, batch, task.loss).item())
        save_export(tmp_path / "unet.safetensors", "decoder", {}, state.collect_average())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_precision_is_accelerates_and_what_does_not_go_with_fsdp_is_refused(monkeypatch):
    for name in ("bf16", "no"):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.build_accelerator(name).mixed_precision == name
    for other in ({"compile": True}, {"mixed_precision": "fp16"}):
        with pytest.raises(UserError, match="fsdp: goes with neither"):
            kinds.validate_config(replace(CONFIG, fsdp=True, **other))
    monkeypatch.setattr("accelerate.Accelerator.distributed_type",
                        property(lambda self: DistributedType.FSDP))
    with pytest.raises(UserError, match="LAUNCH_ARGS: .*FSDP"):
        cli.build_accelerator("no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("field", CLIP)
def test_clip(field, seen, store):
    @torch.no_grad()
    def run(config):
        torch.manual_seed(0)
        model = build_clip(config).eval()
        loss = compute_task_loss(ClipTask(config, Accelerator(cpu=True), store), model)
        image, text = torch.ones(2, 3, config.image_size, config.image_size), torch.arange(
            2 * config.context_length).view(2, -1)
        return {**model.state_dict(), "loss": loss, "image": model.encode_image(image),
                "text": model.encode_text(text)}
    assert_changes(seen, "clip", run, TOY.clip, replace(TOY.clip, **{field: CLIP[field]}))


def compute_task_loss(task, module, rows=4):
    """(rows,) losses of the first step's batch."""
    key = dict(batch_size=rows)
    batch = task.load(task.train_store, np.arange(rows), BatchRandom("data", **key))
    with torch.no_grad():
        return task.loss(module, batch, BatchRandom("noise", **key))


@pytest.fixture(scope="module")
def store():
    return RandomStore()


@pytest.mark.parametrize("field", PRIOR)
def test_prior(field, seen, store):
    def run(config):
        torch.manual_seed(0)
        prior = shake_module(build_prior(config, D)).eval()
        losses = compute_task_loss(PriorTask(config, Accelerator(cpu=True), store), prior)
        text_embed = torch.from_numpy(store.text_embed[:2]).float()
        text_encodings = store.load_text_encodings([0, 1], config.max_text_len).float()
        return {"loss": losses, "sample": sample_image_embed(prior, config, text_embed,
                                                             text_encodings, [1, 2])}
    assert_changes(seen, "prior", run, TOY.prior, replace(TOY.prior, **{field: PRIOR[field]}))


@pytest.mark.parametrize("number, field", [*((1, field) for field in UNET),
                                           *((2, field) for field in UPSAMPLER)])
def test_decoder(number, field, seen, store):
    def run(config):
        configs = [*TOY.decoder.unets[:number - 1], config]
        torch.manual_seed(0)
        unets = [shake_module(build_unet(c, n, D)).eval() for n, c in enumerate(configs, start=1)]
        decoder = kinds.DecoderConfig(unets=tuple(configs))
        task = UnetTask(number, decoder, Accelerator(cpu=True), store)
        embed = torch.from_numpy(store.image_embed[:1]).float()
        return {"loss": compute_task_loss(task, unets[-1]),
                "sample": sample_images(build_stages(unets, configs), embed, [1])}
    config = TOY.decoder.unets[number - 1]
    if field == "memory_efficient":  # without it the library wants a first multiple of one
        config, seen = replace(config, dim_mults=(1, 2, 4)), {}
    value = {**UNET, **UPSAMPLER}[field]
    assert_changes(seen, f"unet{number}", run, config, replace(config, **{field: value}))


def test_the_upsampler_sees_the_place_that_it_draws(store):
    """Where target and condition are cut out at different corners, little can be learned."""
    upsampler, seen = replace(TOY.decoder.unets[1], lowres_noise_max_level=0), []
    task = UnetTask(2, replace(TOY.decoder, unets=(TOY.decoder.unets[0], upsampler)),
                    Accelerator(cpu=True), store)

    def keep(x_t, t, *, lowres_cond_img, lowres_noise_level):
        seen.extend(resize(part, 8).flatten(1) for part in (x_t, lowres_cond_img))
        return x_t
    batch = task.load(store, np.arange(4), BatchRandom("data", batch_size=4))
    batch["t"] = torch.zeros(4, dtype=torch.long)  # hardly any noise
    task.loss(keep, batch, BatchRandom("noise", batch_size=4))
    assert torch.nn.functional.cosine_similarity(*seen).min() > 0.5


def test_a_share_of_the_rows_is_trained_at_the_last_timestep(store):
    stage = replace(TOY.decoder.unets[0], timesteps=500, last_timestep_share=0.75)
    task = UnetTask(1, replace(TOY.decoder, unets=(stage,)), Accelerator(cpu=True), store)
    t = task.draw_t(BatchRandom("t", batch_size=4000))
    assert (t == 499).float().mean() == pytest.approx(0.75, abs=0.03)
    assert t[t != 499].float().mean() == pytest.approx(250, abs=20)  # the others: anywhere


@pytest.mark.parametrize("name", ["prior", "unet1"])
def test_validation_drops_no_condition(name, store):
    """The loss of a dropped one is several times as large, and luck says how many there are."""
    dropped = []

    def spy(x_t, t, *, text_cond_drop_prob=None, image_cond_drop_prob=None, **condition):
        dropped.append(image_cond_drop_prob if text_cond_drop_prob is None else text_cond_drop_prob)
        return x_t
    if name == "prior":
        config = replace(TOY.prior, text_cond_drop_prob=0.9)
        task = PriorTask(config, Accelerator(cpu=True), store, store)
    else:
        stage = replace(TOY.decoder.unets[0], image_cond_drop_prob=0.9)
        task = UnetTask(1, replace(TOY.decoder, unets=(stage,)), Accelerator(cpu=True), store,
                        store)
    assert np.isfinite(task.validate(spy, brief=True)["val_loss"])
    assert len(torch.cat(dropped)) == task.num_val and not torch.cat(dropped).any()


@pytest.mark.parametrize("number", [1, 2])
def test_pictures_that_a_gpu_holds_give_the_batch_of_those_on_disk(number, monkeypatch):
    def draw():
        task = UnetTask(number, TOY.decoder, Accelerator(cpu=True), RandomStore())
        batch = task.load(task.train_store, np.array([3, 0, 5]), BatchRandom("data", batch_size=3))
        return batch.keys() - {"index", "corner", "image_embed"}, task.complete(
            dict(batch), task.train_store)
    read, wanted = draw()

    def hold(store, size, device):
        pictures = store.images if size == 256 else store.load_small_images(size)
        return torch.from_numpy(pictures)
    monkeypatch.setattr("dalle2.tasks.load_pictures", hold)
    copied, found = draw()
    assert read == ({"image"} if number == 1 else {"image", "lowres_cond_img"}) and not copied
    assert found.keys() == wanted.keys() and found["image"].shape[-1] == (32, 64)[number - 1]
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_the_prior_draws_for_a_slice_of_the_validation_pictures_at_a_time():
    config = replace(TOY.prior, sample_timesteps=1, cond_scale=1.0)
    store = RandomStore(ROWS + 2)
    task = PriorTask(config, Accelerator(cpu=True), store, store)
    prior, rows = build_prior(config, D), []
    prior.register_forward_pre_hook(lambda prior, args: rows.append(len(args[0])))
    assert task.predict(prior).shape == (ROWS + 2, D)
    assert rows == [config.num_candidates * ROWS, config.num_candidates * 2]
