"""A trained model as one folder to share, and rendering from it."""

import json
import shutil
from unittest.mock import Mock

import pytest
from helpers import call, change_unets, write_checkpoints

from dalle2.errors import UserError
from dalle2.pipeline import find_model
from dalle2.tools import publish


@pytest.fixture(scope="module")
def flags(clip_path, tmp_path_factory):
    """That name untrained checkpoints."""
    return write_checkpoints(tmp_path_factory.mktemp("ckpt"), clip_path,
                             unets=change_unets({"dim": 8}, {"dim": 8}))


@pytest.fixture
def call_publish(monkeypatch, flags):
    def call(*more):
        monkeypatch.setattr("sys.argv", ["publish", *flags, *map(str, more)])
        publish.main()
    return call


def test_a_published_folder_renders_the_same_wherever_it_lies(flags, call_publish, tmp_path):
    prompt = ["--prompt", "a red bus", "--sample_timesteps", 1]
    call("test_dalle2.py", *prompt, *flags, "--output_dir", tmp_path / "grid")
    call_publish("--output_dir", tmp_path / "model", "--grid", tmp_path / "grid" / "grid.jpg")
    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert {path.name for path in (tmp_path / "moved").iterdir()} == {
        "README.md", "clip.safetensors", "decoder.safetensors", "grid.jpg", "prior.safetensors"}
    call("test_dalle2.py", *prompt, "--output_dir", tmp_path / "b", "--model", tmp_path / "moved")
    assert (tmp_path / "b" / "a red bus.jpg").read_bytes() == (
        tmp_path / "grid" / "a red bus.jpg").read_bytes()
    settings = json.loads((tmp_path / "b" / "manifest.json").read_text())["settings"]
    assert settings["clip"]["clip_pretrained"] == "clip.safetensors"
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "| prior | " in card and "| stage 2, 256 px | " in card and "](grid.jpg)" in card
    assert "on the CLIP clip.safetensors." in card and str(tmp_path) not in card


def test_what_cannot_be_published_or_found_is_named(call_publish, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("mine")
    with pytest.raises(UserError, match="output_dir: .* is not empty"):
        call_publish("--output_dir", tmp_path)
    with pytest.raises(UserError, match="grid: no such file"):
        call_publish("--output_dir", tmp_path / "new", "--grid", tmp_path / "no.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=OSError("404\nmore")))
    with pytest.raises(UserError, match="model: a/b is neither a folder nor .* \\(404\\)"):
        find_model("a/b")
