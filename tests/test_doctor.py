"""The look at data, CLIP and machine before a training."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import name_data, write_coco
from PIL import Image

from dalle2.config import PRESETS, DecoderConfig
from dalle2.tools import doctor


@pytest.fixture
def run_doctor(monkeypatch, capsys, tmp_path):
    """run_doctor(flags) -> (exit code, its lines)."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["doctor", "--preset", "toy", "--output_dir",
                                          str(tmp_path / "doctor"), *flags])
        with pytest.raises(SystemExit) as stopped:
            doctor.main()
        return stopped.value.code, capsys.readouterr().out.splitlines()
    return run


def find(lines, word):
    (line,) = [line for line in lines if word in line]
    return line


def test_good_data_is_looked_at_from_all_sides(run_doctor, toy, clip_path, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "REPEATS", 1)
    monkeypatch.setattr(doctor, "find_rows", partial(doctor.find_rows, budget=0))
    code, lines = run_doctor(*name_data(toy), "--clip_pretrained", str(clip_path),
                             "--store_dir", str(tmp_path))
    assert all(line.split()[0] in ("ok", "warning", "error") for line in lines)
    assert find(lines, "train:") == ("ok       train: 64 pictures, 320 captions, 5 to 5 a picture, "
                                     "COCO captions file")
    assert find(lines, "val:").startswith("ok       val: 120 pictures, 600 captions")
    assert find(lines, "can be read").startswith("ok       64 of 64")
    assert find(lines, "tokens:").startswith("ok") and "0.00 % longer" in find(lines, "tokens:")
    assert find(lines, "image embeddings").startswith("ok") or code == 1
    assert find(lines, "recall@1").startswith("warning")  # this CLIP is untrained
    assert "hours" in find(lines, "prior: about") and "hours" in find(lines, "unet 2: about")
    assert find(lines, "disk:").startswith("ok")
    pairs = Image.open(tmp_path / "doctor" / "pairs.jpg")
    assert pairs.width > 5 * 256 and pairs.getextrema() != ((255, 255),) * 3


def test_bad_data_is_told_with_what_to_do(run_doctor, clip_path, tmp_path, monkeypatch, full_disk):
    annot_path = write_coco(
        tmp_path, {"a.jpg": Image.new("RGB", (64, 64), "white"), "b.jpg": b"junk"},
        {"a.jpg": ["word " * 90], "b.jpg": ["one"], "missing.jpg": ["two"]})
    flags = ["--train_img_path", f"{tmp_path}/img", "--train_annot_path", str(annot_path),
             "--val_annot_path", "", "--clip_pretrained", str(clip_path),
             "--store_dir", str(tmp_path)]
    monkeypatch.setattr(doctor, "time_step", lambda *args: (8, 0.4, 0.5))
    _, lines = run_doctor(*flags)
    assert "1 pictures are missing" in find(lines, "train:")
    assert find(lines, "b.jpg: ").startswith("warning")
    assert find(lines, "pictures of one color").startswith("warning")
    assert "--image_format jpeg" in find(lines, "disk:")
    assert "give --val_annot_path" in find(lines, "no validation")
    code, lines = run_doctor(*flags[:-3], str(tmp_path / "no_clip.pt"))
    assert code == 1 and find(lines, "no such file").startswith("error    --clip_pretrained")


@pytest.mark.parametrize("cost, most, told", [
    (lambda rows: 1.0, 48, 48),                          # launch-bound: the more the better
    (lambda rows: max(1.0, rows / 8), 512, 8),           # full at 8 rows
    (lambda rows: 1.0 + (rows == 2), 64, 64),            # one bad measurement does not end it
    (lambda rows: 1.0 if rows < 32 else None, 512, 16),  # no memory for 32
    (lambda rows: 30.0 * rows, 512, 1)])                 # no time for more than one
def test_as_many_rows_are_timed_as_pay(monkeypatch, cost, most, told):
    clock = [0.0]

    def compute(rows):
        if cost(rows) is None:
            raise torch.cuda.OutOfMemoryError
        clock[0] += cost(rows)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock[0])
    assert doctor.find_rows(compute, most, budget=100) == (told, cost(told))


def test_training_time_counts_rows_updates_and_devices(monkeypatch, capsys):
    prior, asked = PRESETS["toy"].prior, []
    train = replace(prior.train, num_steps=3600, batch_size=100, device_batch_size=20)
    preset = replace(PRESETS["toy"], prior=replace(prior, train=train),
                     decoder=DecoderConfig(unets=()))
    monkeypatch.setattr(doctor, "time_step", lambda *args: asked.append(args[-1]) or (8, 0.4, 0.5))
    for devices, most, hours in ((0, 20, "5.5"), (4, 20, "1.8")):
        monkeypatch.setattr("torch.cuda.device_count", lambda devices=devices: devices)
        doctor.estimate_training(preset, 128, doctor.Report())
        assert asked.pop() == most and f"prior: about {hours} hours" in capsys.readouterr().out


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16),
                                              ("fp16", torch.float16)])
def test_a_step_is_timed_in_the_precision_of_training(monkeypatch, precision, dtype):
    """A card before Ampere trains in fp16: bf16, which it emulates, would be far slower."""
    monkeypatch.setattr(doctor.cli, "resolve_precision", lambda given, training: precision)
    monkeypatch.setattr(doctor, "REPEATS", 1)
    layer, seen = torch.nn.Linear(8, 8), set()
    layer.register_forward_hook(lambda layer, args, output: seen.add(output.dtype))
    rows, *_ = doctor.time_step(layer, PRESETS["base"].prior.train,
                                lambda rows: ((torch.ones(rows, 8),), {}), most=2)
    assert seen == {dtype} and rows in (1, 2)
