"""The scripts in a row, as a user calls them, with a few steps each."""

import json
import os
import subprocess
import sys

import pytest
import torch
import toy_coco
from helpers import ROOT, call, name_data, write_tars
from PIL import Image
from safetensors.torch import load_file

from dalle2.checkpoint import load_newest_checkpoint


def launch(*command):
    """Runs a command at the root with this interpreter's environment and number of threads, on
    which a sum's last bit depends; returns what it printed."""
    environment = {**os.environ, "VENV": sys.prefix,
                   "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_entries(folder, count):
    """The manifest's entries; each has a picture and a score."""
    entries = json.loads((folder / "manifest.json").read_text())["images"]
    assert len(entries) == count == len({entry["file"] for entry in entries})
    for entry in entries:
        with Image.open(folder / entry["file"]) as picture:
            assert picture.size == (256, 256) and picture.format == "JPEG"
        assert -1 <= entry["clip_score"] <= 1
    return entries


@pytest.fixture(scope="module")
def chain(tmp_path_factory, toy):
    out = tmp_path_factory.mktemp("chain")
    data = [*name_data(toy), "--num_val_images", 8, "--store_dir", out / "store"]
    train = [*data, "--preset", "toy", "--num_steps", 4, "--batch_size", 4]
    clip = ["--clip_pretrained", out / "clip" / "clip.safetensors"]
    call("train_clip.py", *train, "--output_dir", out / "clip")
    assert "64 pictures, 320 captions" in call("data/coco_prepare.py", *data, *clip)
    for name in ("prior", "decoder"):
        call(f"train_{name}.py", *train, *clip, "--output_dir", out / name)
    # once more: nothing is left to train, and the report card stays as it is
    again = call("train_prior.py", *train, *clip, "--output_dir", out / "prior")
    assert again == f"{out}/prior: finished, 4 of 4 steps done\n"
    return out


def render(chain, folder, *flags, processes=1):
    flags = ["test_dalle2.py", "--output_dir", folder, "--sample_timesteps", 2,
             "--prior_ckpt", chain / "prior" / "prior.safetensors",
             "--decoder_ckpt", chain / "decoder" / "decoder.safetensors", *flags]
    if processes == 1:
        return call(*flags)
    return launch(sys.executable, "-m", "torch.distributed.run", "--standalone",
                  "--nproc_per_node", processes, *flags)


def test_captions_of_a_coco_file_are_rendered(chain, toy, tmp_path):
    render(chain, tmp_path, "--test_img_path", toy / "val", "--test_annot_path",
           toy / "captions_val.json", "--num_images", 3, "--lowres_noise_level", 30,
           "--num_candidates", 3)
    captions = {(c["image_id"], c["caption"]) for c in json.loads(
        (toy / "captions_val.json").read_text())["annotations"]}
    page = (tmp_path / "index.html").read_text()
    for entry in read_entries(tmp_path, 3):
        assert (entry["image_id"], entry["caption"]) in captions and entry["caption"] in page
    assert page.count("data:image/jpeg") == 3
    columns = toy_coco.judge_manifests([tmp_path / "manifest.json"], toy / "captions_val.json")
    assert {"chance", tmp_path.name} == set(columns)
    settings = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert settings["lowres_noise_level"] == [30] and settings["num_candidates"] == 3
    assert settings["sample_timesteps"] == [2, 2, 2]


def test_captions_of_tars_are_rendered(chain, tmp_path):
    write_tars(tmp_path / "tars", (1, 2))
    render(chain, tmp_path / "r", "--test_img_path", tmp_path / "tars", "--test_annot_path", "",
           "--num_images", 2, "--init_from_true_embedding")
    assert {entry["caption"] for entry in read_entries(tmp_path / "r", 2)} == {
        "caption 0", "caption 1"}
    assert (tmp_path / "r" / "index.html").read_text().count("data:image/jpeg") == 2


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.jpg")
            if path.name != "grid.jpg"}


@pytest.mark.slow
def test_a_picture_depends_on_prompt_and_seed_alone(chain, tmp_path):
    """Not on the batch that it is in, its neighbours, or the number of processes."""
    prompts = ["--prompt", "a red box / circle", "--prompt", "ünïcode ☃ " + "and more " * 9,
               "--samples_per_prompt", 3]
    for folder, processes, *flags in (("a", 1, "--batch_size", 1), ("b", 1), ("d", 1, "--seed", 1),
                                      ("c", 2, "--batch_size", 2)):
        render(chain, tmp_path / folder, *prompts, *flags, processes=processes)
    assert len({entry["seed"] for entry in read_entries(tmp_path / "a", 6)}) == 6
    for process in (0, 1):
        record = tmp_path / "c" / f".rendered-{process}.jsonl"
        assert len(record.read_text().splitlines()) == 3
    a, b, c, d = (read_files(tmp_path / folder) for folder in "abcd")
    assert a == b == c and len({*a.values(), *d.values()}) == 12
    manifests = {(tmp_path / folder / "manifest.json").read_text() for folder in "abc"}
    assert len(manifests) == 1


def test_true_embeddings_and_the_nearest_training_picture(chain, toy, tmp_path):
    photos = ["--test_img_path", toy / "val", "--test_annot_path", toy / "captions_val.json",
              "--num_images", 1]
    render(chain, tmp_path / "a", *photos, "--init_from_true_embedding", "--store_dir",
           chain / "store", "--train_img_path", toy / "train",
           "--train_annot_path", toy / "captions_train.json")
    render(chain, tmp_path / "b", *photos)
    assert read_files(tmp_path / "a") != read_files(tmp_path / "b")
    (entry,) = read_entries(tmp_path / "a", 1)
    assert (toy / "train" / entry["nearest_train"]["file"]).is_file()
    assert "nearest in training" in (tmp_path / "a" / "index.html").read_text()


def test_exports_hold_the_average_under_the_librarys_names_and_no_clip(chain):
    prior = load_file(chain / "prior" / "prior.safetensors")
    state = load_newest_checkpoint(chain / "prior" / "checkpoints")
    assert all(name.startswith("net.") for name in prior)
    for name, value in prior.items():
        assert torch.equal(value, state["ema"][name.removeprefix("net.")])
    assert any(not torch.equal(value, state["module"][name.removeprefix("net.")])
               for name, value in prior.items())
    decoder = load_file(chain / "decoder" / "decoder.safetensors")
    assert {name.split(".")[1] for name in decoder} == {"0", "1"}
    assert not any("clip" in name or "visual" in name for name in [*prior, *decoder])


@pytest.mark.slow
def test_what_a_gpu_is_checked_with_runs_its_tests_without_a_package_index(tmp_path):
    """Without a GPU they are skipped, but found."""
    printed = launch("env", "PIP_NO_INDEX=1", f"OUT={tmp_path}", "sh", "benchmarks/gpu_check.sh",
                     "tests")
    assert "passed" in printed and (torch.cuda.is_available() or "no GPU" in printed)
