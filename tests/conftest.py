"""Fixtures: a small toy data set, an untrained CLIP of its own kind, and the command line."""

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import toy_coco
from accelerate.state import AcceleratorState
from helpers import ROOT, name_data, run_script, write_clip

CHROMIUM = "chromium", "chromium-browser", "google-chrome"


@pytest.fixture(autouse=True)
def run_at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    yield
    gc.unfreeze()  # cli.import_late is for a process that runs one script
    torch.set_flush_denormal(False)
    AcceleratorState._reset_state()  # it keeps the precision of the first Accelerator


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder with 64 train and 120 val pictures and their captions."""
    folder = tmp_path_factory.mktemp("toy")
    with patch("toy_coco.ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1)):
        for split, count in (("train", 64), ("val", 120)):
            toy_coco.write_split(folder, split, count, seed=0, num_workers=1)
    return folder


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.safetensors")


@pytest.fixture(scope="session")
def noisy_clip_path(tmp_path_factory):
    """A CLIP whose embeddings differ more from each other than an untrained one's."""
    return write_clip(tmp_path_factory.mktemp("noisy") / "clip.safetensors", noise=0.2)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))


@pytest.fixture(scope="module")
def browser():
    """A Chromium of playwright's; a test that wants it is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def data_flags(toy, store_dir):
    return [*name_data(toy), "--num_val_images", "16", "--store_dir", str(store_dir)]


@pytest.fixture(name="run_script")
def give_run_script():
    return run_script
