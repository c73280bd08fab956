"""The evaluation command on untrained checkpoints: figures, resuming, the sweep, FID's plumbing."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TOY,
    call,
    change_unets,
    extract_means,
    run_in_processes,
    write_checkpoints,
)
from PIL import Image

from dalle2.clip import load_clip
from dalle2.errors import UserError
from dalle2.tools import evaluate as evaluation
from dalle2.tools import judge, metrics

SCRIPT = "dalle2/tools/evaluate.py"


@pytest.fixture(scope="module")
def flags(toy, noisy_clip_path, tmp_path_factory):
    """Flags of untrained checkpoints, 2 + 1 + 1 steps to 64 px, and of 24 captioned pictures."""
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoints = write_checkpoints(
        folder, noisy_clip_path, replace(TOY.prior, sample_timesteps=2), noise=0.1,
        unets=change_unets(*({"sample_timesteps": 1, "image_size": n} for n in (32, 64))))
    whole = json.loads((toy / "captions_val.json").read_text())
    whole["images"] = sorted(whole["images"], key=lambda image: image["id"])[:24]
    (folder / "captions.json").write_text(json.dumps(whole | {"annotations": [
        a for a in whole["annotations"] if a["image_id"] in {i["id"] for i in whole["images"]}]}))
    return [*checkpoints, "--test_img_path", toy / "val",
            "--test_annot_path", folder / "captions.json", "--no-fid"]


@pytest.fixture
def evaluate(run_script, flags, tmp_path):
    """evaluate(*more flags) -> (exit code, stdout, stderr); later flags win."""
    return lambda *more: run_script(SCRIPT, *flags, "--output_dir", tmp_path / "out", *more)


@pytest.fixture(scope="module")
def evaluated(toy, flags, noisy_clip_path, tmp_path_factory):
    """Ten pictures, evaluated after four of them: what was printed and written, the times of the
    files after either call, the embeddings of pictures and photos."""
    out, clip = tmp_path_factory.mktemp("out"), load_clip("", str(noisy_clip_path))
    own = [*flags, "--output_dir", out, "--samples_for_diversity", 3, "--batch_size", 4,
           "--train_img_path", toy / "train", "--train_annot_path", toy / "captions_train.json"]
    call(SCRIPT, *own, "--num_images", 4)
    before = list_times(out)
    printed = call(SCRIPT, *own, "--num_images", 10)
    manifest = json.loads((out / "manifest.json").read_text())["images"]
    return SimpleNamespace(
        out=out, flags=own, printed=printed, times=[before, list_times(out)], manifest=manifest,
        clip=clip, result=json.loads((out / "evaluation.json").read_text()),
        pictures=embed(clip, [out / entry["file"] for entry in manifest]),
        photos=embed(clip, [toy / f"val/{number:06d}.jpg" for number in range(24)]))


def list_times(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*.png")
            if path.name != "sweep.png"}


def embed(clip, paths):
    images = [torch.from_numpy(np.array(Image.open(path).resize((256, 256), Image.BICUBIC)))
              for path in paths]
    return clip.embed_image(torch.stack(images).permute(0, 3, 1, 2))


def test_each_picture_is_rendered_once_for_a_caption_of_its_photo(evaluated, toy):
    before, after = evaluated.times
    assert (len(before), len(after)) == (4 * 3, 10 * 3) and before.items() <= after.items()
    captions = {(c["image_id"], c["caption"]) for c in json.loads(
        (toy / "captions_val.json").read_text())["annotations"]}
    for number, entry in enumerate(evaluated.manifest):
        assert entry["image_id"] == number and entry["file"] == f"images/{number}.png"
        assert (number, entry["caption"]) in captions


def test_the_figures_are_those_of_the_files(evaluated, toy):
    clip, pictures, photos = evaluated.clip, evaluated.pictures, evaluated.photos
    found, manifest = evaluated.result["metrics"], evaluated.manifest
    text_embed = clip.embed_text(clip.tokenize([e["caption"] for e in manifest]))[0]
    cosine = (pictures * text_embed).sum(-1)
    assert found["clip_score"] == pytest.approx(cosine.mean().item(), abs=0.01)
    assert [e["clip_score"] for e in manifest] == pytest.approx(cosine.tolist(), abs=0.03)
    assert found["cmmd"] == pytest.approx(metrics.compute_cmmd(pictures, photos)[0], rel=0.05)
    assert found["photo_clip_score"] == pytest.approx(
        (photos[:10] * text_embed).sum(-1).mean().item(), abs=1e-4)
    samples = torch.stack([embed(clip, [
        evaluated.out / name for name in (f"images/{n}.png", f"diversity/{n}_1.png",
                                          f"diversity/{n}_2.png")]) for n in range(10)])
    assert found["diversity"] == pytest.approx(metrics.compute_diversity(samples), rel=0.1)
    assert found["diversity"] > 1e-5 and 0 <= found["r_precision"] <= 1
    train = embed(clip, sorted((toy / "train").glob("*.jpg")))
    assert found["nearest_train_cosine"] == pytest.approx(
        (pictures @ train.T).amax(1).mean().item(), abs=0.01)
    assert found["pictures"] == 10 and found["seconds_a_picture"] > 0
    assert found["fid"] is None and found["kid"] is None
    result, table = evaluated.result, (evaluated.out / "evaluation.md").read_text()
    assert table in evaluated.printed and f"| {found['cmmd']:.3f} |" in table
    assert result["settings"]["sample_timesteps"] == [2, 1, 1]
    assert result["clip"]["same"] and result["counts"]["other_captions"] >= 10
    assert any("is the one that conditions" in line for line in result["warnings"])


def test_another_call_renders_nothing_and_other_settings_are_refused(evaluated, store_dir,
                                                                     run_script):
    found = evaluated.result["metrics"]
    call(SCRIPT, *evaluated.flags, "--num_images", 10, "--store_dir", store_dir)
    again = json.loads((evaluated.out / "evaluation.json").read_text())["metrics"]
    assert again == {name: pytest.approx(value, abs=1e-3) if "train" in name else value
                     for name, value in found.items()}
    for name, value in (("cond_scale", 3), ("seed", 1), ("lowres_noise_level", 1)):
        code, _, error = run_script(SCRIPT, *evaluated.flags, f"--{name}", value)
        assert code == 2 and error.startswith(f"error: --{name}: ") and error.count("\n") == 1
    assert list_times(evaluated.out) == evaluated.times[1]


def test_fid_and_kid_see_photos_as_real_and_pictures_as_fake(evaluate, monkeypatch, toy, tmp_path):
    pytest.importorskip("torchmetrics")
    seen, sides, compute_fid_kid = [], {}, metrics.compute_fid_kid
    monkeypatch.setattr(metrics, "load_inception", lambda path, device: lambda image: (
        seen.append(image.shape), extract_means(image))[1])
    monkeypatch.setattr(metrics, "compute_fid_kid", lambda real, fake: sides.update(
        real=real, fake=fake) or compute_fid_kid(real, fake))
    code, printed, _ = evaluate("--num_images", 5, "--fid", "--samples_for_diversity", 2,
                                "--num_reference_images", 24)
    assert code == 0 and "FID of 5 pictures means nothing" in printed
    assert seen == [(24, 3, 256, 256), (10, 3, 256, 256)]
    for side, paths in (("real", [toy / f"val/{n:06d}.jpg" for n in range(24)]),
                        ("fake", [tmp_path / f"out/images/{n}.png" for n in range(5)])):
        means = [np.asarray(Image.open(path), dtype=float).mean((0, 1)) for path in paths]
        assert np.allclose(sides[side][:, :3], means, atol=0.5 if side == "real" else 1.5)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert found["fid"] == pytest.approx(compute_fid_kid(sides["real"], sides["fake"])["fid"])
    assert found["kid"] is not None and sides["fake"].shape == (5, 6)


def evaluate_in_one_process(rank, folder, flags):
    judge.EMBED_BATCH_SIZE, metrics.load_inception = 5, lambda path, device: extract_means
    sys.argv = ["evaluate", *map(str, flags), "--output_dir", str(folder / "out")]
    evaluation.main()
    sys.argv += ["--seed", "1"]
    with pytest.raises(UserError, match="seed: the pictures in"):
        evaluation.main()


@pytest.mark.slow
def test_two_processes_share_the_work_and_find_the_same_numbers(flags, toy, tmp_path):
    pytest.importorskip("torchmetrics")
    more = [*flags, "--num_images", 7, "--samples_for_diversity", 2, "--fid", "--train_img_path",
            toy / "train", "--train_annot_path", toy / "captions_train.json"]
    results = []
    for processes, device in ((1, "CPU, 1 threads"), (2, "2 x CPU, 1 threads")):
        folder = tmp_path / f"{processes}"
        folder.mkdir()
        run_in_processes(evaluate_in_one_process, folder, more, processes=processes)
        result = json.loads((folder / "out" / "evaluation.json").read_text())
        assert result["metrics"].pop("seconds_a_picture") > 0
        assert result.pop("device") == device and result["flags"].pop("output_dir")
        pictures = {path.name: path.read_bytes() for path in folder.rglob("*.png")}
        results.append((result, pictures, (folder / "out" / "manifest.json").read_text()))
    assert results[0] == results[1] and len(pictures) == 14
    assert result["metrics"]["fid"] > 0 and result["counts"]["train_photos"] == 64
    shares = [len((folder / "out" / f".rendered-{rank}.jsonl").read_text().splitlines())
              for rank in (0, 1)]
    assert shares == [7, 7]


def test_what_cannot_be_had_is_left_out_and_told(evaluate, flags, toy, tmp_path, monkeypatch):
    """A photo, and Inception."""
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(metrics, "INCEPTION_URL", "http://127.0.0.1:9/weights-1.pth")
    own_rows, compute_memorization = [], metrics.compute_memorization
    monkeypatch.setattr(metrics, "compute_memorization", lambda *args: own_rows.extend(
        args[3].tolist()) or compute_memorization(*args))
    whole = json.loads(flags[flags.index("--test_annot_path") + 1].read_text())
    whole["images"][1]["file_name"] = "absent.jpg"
    (tmp_path / "captions.json").write_text(json.dumps(whole))
    few = ["--test_annot_path", tmp_path / "captions.json", "--num_images", 3]
    code, printed, _ = evaluate(*few, "--samples_for_diversity", 1, "--fid", "--train_img_path",
                                toy / "train", "--train_annot_path", toy / "captions_train.json")
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert code == 0 and result["counts"]["reference_photos"] == 23
    assert "\nwarning: no FID and no KID: the Inception-v3 could not be" in printed
    assert result["metrics"]["fid"] is None and result["metrics"]["diversity"] is None
    assert own_rows == [0, -1, 1]  # of the photos that are left; the second picture has none
    assert "--test_img_path: 1 of 24 photos cannot be read and are left out" in printed
    damaged = sorted((tmp_path / "out" / "images").iterdir())[0]
    damaged.write_bytes(b"no picture")
    code, _, error = evaluate(*few)
    assert code == 2 and damaged.name in error


def test_a_sweep_draws_tabulates_and_names_the_lowest_cmmd(evaluate, tmp_path):
    out = tmp_path / "out"
    grid = ["--sweep", "--cond_scale", 1, 4, "--sample_timesteps", 1, 2, "--num_images", 3,
            "--samples_for_diversity", 2]
    code, printed, _ = evaluate(*grid)
    assert code == 0
    result = json.loads((out / "sweep.json").read_text())
    assert [(row["cond_scale"], row["sample_timesteps"]) for row in result["rows"]] \
        == [(scale, [steps] * 3) for scale in (1, 4) for steps in (1, 2)]
    best = min(result["rows"], key=lambda row: row["cmmd"])
    assert result["best"] == best and len({row["cmmd"] for row in result["rows"]}) == 4
    assert f"lowest CMMD: cond_scale {best['cond_scale']:g}, prior_cond_scale " \
        f"{TOY.prior.cond_scale:g}, " in printed
    times = list_times(out)
    assert len(times) == 4 * (3 + 3)
    assert evaluate(*grid)[0] == 0 and list_times(out) == times
