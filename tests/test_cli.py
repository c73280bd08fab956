"""Bad input: one clear line, exit code 2, nothing written."""

import argparse
import re

import pytest
import torch
from helpers import TOY, check_refused, write_checkpoints, write_clip, write_decoder

from dalle2 import cli
from dalle2.checkpoint import read_export_header
from dalle2.config import UserError


@pytest.fixture(scope="module")
def checkpoints(clip_path, tmp_path_factory):
    """Folder with untrained exports of the toy preset."""
    folder = tmp_path_factory.mktemp("ckpt")
    write_checkpoints(folder, clip_path)
    clip = read_export_header(folder / "prior.safetensors", "prior")["clip"]
    write_decoder(folder / "half.safetensors", clip, (TOY.decoder.unets[0], None))
    write_clip(folder / "other_clip.safetensors", seed=1)
    (folder / "broken.safetensors").write_bytes(b"not a checkpoint")
    return folder


@pytest.mark.parametrize("script", ["train_prior.py", "train_decoder.py"])
@pytest.mark.parametrize("flags, told", [
    (["--train_img_path", "no/such"], "--train_img_path: no such folder: no/such"),
    (["--train_annot_path", "no.json"], "--train_annot_path: no such file: no.json"),
    (["--clip_pretrained", "no/clip.safetensors"], "--clip_pretrained: no such file"),
    (["--clip_pretrained", "README.md", "--clip_model", "nope"], "--clip_model"),
    (["--batch_size", "0"], "--batch_size: 0 must be positive"),
    (["--lr", "fast"], "--lr"), (["--unknown", "1"], "--unknown"),
    (["--preset", "huge"], "--preset")])
def test_training_refuses(run_script, data_flags, clip_path, tmp_path, script, flags, told):
    result = run_script(script, *data_flags, "--clip_pretrained", clip_path, "--preset", "toy",
                        "--output_dir", tmp_path / "run", *flags)
    check_refused(result, re.escape(told))
    assert not (tmp_path / "run").exists()


def test_training_refuses_what_is_no_captions_file(run_script, data_flags, clip_path, tmp_path):
    path = tmp_path / "instances.json"
    path.write_text('{"images": [], "annotations": 3}')
    result = run_script("train_prior.py", *data_flags, "--clip_pretrained", clip_path, "--preset",
                        "toy", "--output_dir", tmp_path / "run", "--train_annot_path", path)
    check_refused(result, "--train_annot_path: .*is not a COCO captions file")
    assert not (tmp_path / "run").exists()


def test_a_stage_that_is_not_there_is_refused(run_script, data_flags, clip_path, tmp_path):
    result = run_script("train_decoder.py", *data_flags, "--clip_pretrained", clip_path,
                        "--preset", "toy", "--unet_number", 3)
    check_refused(result, "--unet_number: 3")


@pytest.mark.parametrize("script", ["train_clip.py", "train_prior.py", "train_decoder.py"])
def test_dry_run_writes_nothing(run_script, data_flags, clip_path, tmp_path, script):
    flags = [] if script == "train_clip.py" else ["--clip_pretrained", clip_path]
    code, out, _ = run_script(script, *data_flags, *flags, "--preset", "toy", "--dry_run",
                              "--store_dir", tmp_path / "store", "--output_dir", tmp_path / "run")
    assert code == 0 and "M parameters" in out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, told", [
    ([], "--prompt: nothing to render"), (["--prompt", " "], "--prompt: a prompt is empty"),
    (["--prompt", "x", "--num_images", "0"], "--num_images"),
    (["--test_img_path", "tests"], "--test_annot_path: needed"),
    (["--prompt_file", "no.txt"], "--prompt_file: no such file"),
    (["--test_img_path", "no/such", "--test_annot_path", "x.json"],
     "--test_img_path: no such folder"),
    (["--prompt", "x", "--init_from_true_embedding"], "--init_from_true_embedding")])
def test_rendering_refuses_its_input(run_script, tmp_path, flags, told):
    check_refused(run_script("test_dalle2.py", "--output_dir", tmp_path / "r", *flags),
                  re.escape(told))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("change, told", [
    ({"--prior_ckpt": "decoder"}, "--prior_ckpt: .* is a decoder export, a prior export is needed"),
    ({"--decoder_ckpt": "prior"}, "--decoder_ckpt: .* is a prior export"),
    ({"--prior_ckpt": "missing"}, "--prior_ckpt: no such file"),
    ({"--decoder_ckpt": "broken"}, "--decoder_ckpt: .* is no export of this project"),
    ({"--decoder_ckpt": "half"}, "--decoder_ckpt: stage 2 is not trained yet"),
    ({"--clip_pretrained": "other_clip"}, "--clip_pretrained: .* is not the CLIP")])
def test_rendering_refuses_the_wrong_checkpoint(run_script, checkpoints, tmp_path, change, told):
    files = {"--prior_ckpt": "prior", "--decoder_ckpt": "decoder"} | change
    flags = [x for flag, name in files.items()
             for x in (flag, checkpoints / f"{name}.safetensors")]
    check_refused(run_script("test_dalle2.py", "--prompt", "a red bus", "--output_dir",
                             tmp_path / "r", *flags), told)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("script, count", [
    ("train_clip.py", 9), ("train_prior.py", 9), ("train_decoder.py", 10), ("test_dalle2.py", 7),
    ("dalle2/evaluate.py", 7), ("dalle2/explore.py", 15), ("dalle2/doctor.py", 2),
    ("dalle2/app.py", 1), ("dalle2/convert.py", 0), ("data/coco_prepare.py", 1),
    ("data/toy_coco.py", 4), ("data/coco_download.py", 1)])
def test_no_flag_takes_a_number_that_is_none(run_script, monkeypatch, capsys, script, count):
    """`count` is at least how many numeric flags the script has."""
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", lambda self: parsers.append(self) or exit(0))
        run_script(script)
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    numeric = [(parser, action.option_strings[0]) for parser in parsers
               for action in parser._actions if action.type]
    assert len(numeric) >= count
    for parser, flag in numeric:
        for value in ("nan", "inf", "-inf", "1e999", "x"):
            with pytest.raises(SystemExit, match="2"):
                parser.parse_args([f"{flag}={value}"])
            err = capsys.readouterr().err
            assert err.startswith(f"error: {flag}: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("script, flags, told", [
    ("test_dalle2.py", ["--cond_scale", "-1"], "--cond_scale: -1 must be at least 0"),
    ("test_dalle2.py", ["--seed", "9" * 30], "--seed: 9{30} is not finite, or too large"),
    ("test_dalle2.py", ["--sample_timesteps", "5", "0"], "--sample_timesteps: 0 must be at least"),
    ("train_prior.py", ["--num_val_images", "0"], "--num_val_images: 0 must be at least 1"),
    ("train_prior.py", ["--save_minutes", "-1"], "--save_minutes: -1.0 must be positive"),
    ("train_decoder.py", ["--unet_number", "-1"], "--unet_number: -1 must be at least 0"),
    ("data/toy_coco.py", ["--num_train", "0"], "--num_train: 0 must be at least 1"),
    ("data/toy_coco.py", ["--judge", "no.json"], "--judge: no such file")])
def test_numbers_out_of_range_are_refused(run_script, script, flags, told):
    check_refused(run_script(script, *flags), told)


def test_another_run_in_the_folder_is_refused(run_script, data_flags, clip_path, tmp_path):
    flags = [*data_flags, "--clip_pretrained", clip_path, "--preset", "toy", "--num_steps", 1,
             "--output_dir", tmp_path, "--batch_size"]
    assert run_script("train_prior.py", *flags, 4)[0] == 0
    code, _, err = run_script("train_prior.py", *flags, 8)
    assert code == 2 and "batch_size: 4 before, 8 now" in err


def test_defaults_are_those_of_the_readme(run_script):
    for script in ("train_prior.py", "train_decoder.py", "test_dalle2.py"):
        code, out, _ = run_script(script, "--help")
        assert code == 0 and "--output_dir" in out


@pytest.mark.parametrize("capability, given, resolved", [
    ((8, 0), "auto", "bf16"), ((7, 5), "auto", "fp16"), ((7, 5), "bf16", "bf16"),
    (None, "auto", "no"), (None, "bf16", "bf16")])
def test_precision_is_what_the_gpu_computes_in(monkeypatch, capability, given, resolved):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert cli.resolve_precision(given) == resolved
    if capability is None:
        with pytest.raises(UserError, match="--mixed_precision: fp16 needs a GPU"):
            cli.resolve_precision("fp16")
