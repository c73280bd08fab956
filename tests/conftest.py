"""Fixtures: a small toy data set, an untrained CLIP of its own kind, and the command line."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import toy_coco
from helpers import write_clip

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def run_at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder with 64 train and 120 val pictures and their captions."""
    folder = tmp_path_factory.mktemp("toy")
    for split, count in (("train", 64), ("val", 120)):
        toy_coco.write_split(folder, split, count, seed=0, num_workers=2)
    return folder


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.safetensors")


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def data_flags(toy, store_dir):
    return ["--train_img_path", f"{toy}/train", "--train_annot_path", f"{toy}/captions_train.json",
            "--val_img_path", f"{toy}/val", "--val_annot_path", f"{toy}/captions_val.json",
            "--num_val_images", "16", "--store_dir", str(store_dir)]


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script("train_prior.py", "--flag", ...) -> (exit code, stdout, stderr), in process."""
    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code or 0
        return code, *capsys.readouterr()
    return run
