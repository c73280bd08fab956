"""Bad input: one clear line, exit code 2, nothing written."""

import gc
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import (
    TOY,
    D,
    RandomStore,
    call,
    check_refused,
    write_checkpoints,
    write_clip,
    write_decoder,
)

from dalle2 import cli
from dalle2.checkpoint import read_export_header
from dalle2.config import config_to_dict
from dalle2.errors import UserError
from dalle2.tasks import PriorTask
from dalle2.train_loop import check_same_run


@pytest.mark.parametrize("script, flags, message", [
    ("prior", ["--train_img_path", "no/such"], "--train_img_path: no such folder: no/such"),
    ("prior", ["--train_annot_path", "README.md"],
     "--train_annot_path: README.md is not a COCO captions"),
    ("prior", ["--clip_pretrained", "no/clip.safetensors"], "--clip_pretrained: no such file"),
    ("prior", ["--batch_size", "0"], "--batch_size: 0 must be positive"),
    ("prior", ["--lr", "1e999"], "--lr: 1e999 is not finite"),
    ("prior", ["--seed", "9" * 400], "--seed: 9.* is not finite, or too large"),
    ("prior", ["--num_views", "0"], "--num_views: 0 must be at least 1"),
    ("prior", ["--config", "README.md"], "--config: README.md is no config.json of such a network"),
    ("prior", ["--unknown", "1"], "unrecognized arguments: --unknown"),
    ("decoder", ["--unet_number", "3"], "--unet_number: 3 is not one of 0 to 2"),
    ("decoder", ["--dim", "32"], "--dim: each stage has its own; name one by --unet_number"),
    ("clip", ["--device_batch_size", 8],
     "--device_batch_size: the loss of a CLIP compares all pairs of a batch")])
def test_training_refuses(run_script, data_flags, clip_path, tmp_path, script, flags, message):
    clip = [] if script == "clip" else ["--clip_pretrained", clip_path]
    check_refused(run_script(f"train_{script}.py", *data_flags, *clip, "--preset", "toy",
                             "--output_dir", tmp_path / "run", *flags), message)
    assert not (tmp_path / "run").exists()


def test_a_flag_comes_before_the_file_and_the_file_before_the_preset(
        data_flags, clip_path, tmp_path):
    """--config is a run's own config.json; --dry_run prints the plan and writes nothing."""
    run = replace(TOY.prior, depth=3, heads=2, train=replace(TOY.prior.train, lr=0.5, seed=7))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": config_to_dict(run)}))
    data = [*data_flags, "--clip_pretrained", clip_path, "--preset", "toy", "--dry_run",
            "--store_dir", tmp_path / "store", "--output_dir", tmp_path / "run"]

    def print_plan(script, *flags):
        printed = call(script, *data, *flags)
        assert "M parameters" in printed and list(tmp_path.iterdir()) == [path]
        return {line.strip() for line in printed.splitlines()}
    plan = print_plan("train_prior.py", "--config", path, "--heads", 1, "--seed", 9)
    assert {"depth: 3 (file)", "heads: 1 (flag)", "lr: 0.5 (file)", "seed: 9 (flag)"} <= plan
    plan = print_plan("train_prior.py", "--lr", 0.25)
    assert {f"depth: {TOY.prior.depth} (preset)", "lr: 0.25 (flag)"} <= plan
    stage = replace(TOY.decoder.unets[1], dim=32)
    path.write_text(json.dumps({"config": config_to_dict(stage)}))
    plan = print_plan("train_decoder.py", "--config", path, "--unet_number", 2, "--crop_size", 32)
    assert {"dim: 32 (file)", "crop_size: 32 (flag)", "image_size: 256 (file)"} <= plan


def test_a_run_is_not_resumed_on_another_data_set(tmp_path):
    header = {"embed_dim": D, "clip": {"fingerprint": "x"}}
    accelerator = Accelerator(cpu=True)
    before, larger, other = (
        PriorTask(TOY.prior, accelerator, RandomStore(*options), header=header).describe_run()
        for options in ((6, 0), (7, 0), (6, 1)))
    check_same_run(before, before, tmp_path)
    with pytest.raises(UserError, match="output_dir: .*data.num_images: 6 before, 7 now"):
        check_same_run(before, larger, tmp_path)
    with pytest.raises(UserError, match="data.annotations: 0000000000000000 before, 1111"):
        check_same_run(before, other, tmp_path)


def test_a_run_that_was_moved_is_resumed_with_the_same_clip_only(tmp_path):
    def describe(path, fingerprint):
        return {"clip": {"clip_model": "toy", "clip_pretrained": path,
                         "relative_path": f"../{path}", "fingerprint": fingerprint}}
    check_same_run(describe("a/clip", "x"), describe("b/clip", "x"), tmp_path)
    with pytest.raises(UserError, match="clip.fingerprint: x before, y now"):
        check_same_run(describe("a/clip", "x"), describe("a/clip", "y"), tmp_path)


def test_a_field_that_an_older_run_lacks_has_its_default(tmp_path):
    now = {"config": config_to_dict(TOY.decoder.unets[0])}
    before = {"config": {name: value for name, value in now["config"].items()
                         if name != "last_timestep_share"}}
    check_same_run(before, now, tmp_path)
    changed = {"config": now["config"] | {"last_timestep_share": 0.5}}
    with pytest.raises(UserError, match="config.last_timestep_share: 0.0 before, 0.5 now"):
        check_same_run(before, changed, tmp_path)


def test_a_resumed_run_may_be_sampled_otherwise(tmp_path):
    def describe(**changes):
        return {"config": config_to_dict(replace(TOY.prior, **changes))}
    check_same_run(describe(), describe(cond_scale=9.0, sample_timesteps=7, num_candidates=5),
                   tmp_path)
    with pytest.raises(UserError, match="config.depth: 2 before, 3 now"):
        check_same_run(describe(), describe(depth=3, cond_scale=9.0), tmp_path)


def test_rendering_refuses_the_wrong_checkpoint(run_script, clip_path, tmp_path):
    flags = write_checkpoints(tmp_path, clip_path)
    clip = read_export_header(tmp_path / "prior.safetensors", "prior")["clip"]
    write_decoder(tmp_path / "half", clip, (TOY.decoder.unets[0], None))
    write_clip(tmp_path / "other_clip", seed=1)
    (tmp_path / "broken").write_bytes(b"not a checkpoint")
    for flag, name, message in (
            ("prior_ckpt", "decoder.safetensors", "is a decoder export, a prior export is needed"),
            ("decoder_ckpt", "broken", "is no export of this project"),
            ("decoder_ckpt", "half", "stage 2 is not trained yet"),
            ("clip_pretrained", "other_clip", "is not the CLIP")):
        check_refused(run_script("test_dalle2.py", *flags, f"--{flag}", tmp_path / name, "--prompt",
                                 "a red bus", "--output_dir", tmp_path / "r"),
                      f"--{flag}: .*{message}")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("script", ["train_prior.py", "train_decoder.py"])
def test_the_clip_is_gone_before_training_begins(run_script, data_flags, clip_path, tmp_path,
                                                 monkeypatch, script):
    """On a GPU it would take memory from the network that is trained."""
    loaded, trained = [], []

    def load(args, load=cli.load_clip):
        clip = load(args)
        loaded.append(weakref.ref(clip))
        return clip

    def train(*, task, **parts):
        gc.collect()
        assert [clip() for clip in loaded] == [None]
        trained.append(task)
        raise UserError("far enough")
    monkeypatch.setattr(cli, "load_clip", load)
    monkeypatch.setattr("dalle2.train_loop.train", train)
    run_script(script, *data_flags, "--clip_pretrained", clip_path, "--preset", "toy",
               "--output_dir", tmp_path)
    assert trained


@pytest.mark.parametrize("capability, given, resolved", [
    ((8, 0), "auto", "bf16"), ((7, 5), "auto", "fp16"), ((7, 5), "bf16", "bf16"),
    (None, "auto", "no"), (None, "bf16", "bf16")])
def test_precision_is_what_the_gpu_computes_in(monkeypatch, capability, given, resolved):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert cli.resolve_precision(given) == resolved
    if capability is None:
        with pytest.raises(UserError, match="mixed_precision: fp16 needs a CUDA GPU"):
            cli.resolve_precision("fp16")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_cpu_trains_in_bf16_if_it_computes_in_it_and_renders_in_fp32(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert cli.resolve_precision("auto", training=True) == ("bf16" if has_bf16 else "no")
    assert cli.resolve_precision("auto") == cli.resolve_precision("no", training=True) == "no"
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # a private function of torch
    assert cli.resolve_precision("auto", training=True) == "no"


def test_the_device_is_a_gpu_of_either_kind_unless_the_cpu_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert cli.pick_device().type == "mps" and cli.resolve_precision("auto") == "no"
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: SimpleNamespace(
        distributed_type=None, **options))
    assert not cli.build_accelerator("auto").cpu and "mps" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert cli.pick_device().type == "cpu" and cli.build_accelerator("auto").cpu


def test_an_entry_script_ends_its_launch(tmp_path):
    """A process that exits with Gloo's threads alive may abort after all its work is done."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        cli.run(lambda: distributed.barrier())
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_tiny_numbers_become_zero_where_a_script_computes():
    tiny = torch.full((1,), 1e-39)
    assert (tiny * 0.5).item() > 0
    with cli.import_late():
        assert (tiny * 0.5).item() == 0
    assert (tiny * 0.5).item() == 0
