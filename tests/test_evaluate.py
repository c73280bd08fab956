"""The evaluation command on untrained checkpoints: figures, resuming, the sweep, FID's plumbing."""

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TOY, change_unets, write_checkpoints, write_clip
from PIL import Image
from torch import multiprocessing

from dalle2 import evaluate as evaluation
from dalle2 import judge, metrics
from dalle2.clip import compute_fingerprint, load_clip
from dalle2.config import UserError
from dalle2.images import save_jpeg


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("shaken") / "clip.safetensors", noise=0.2)


@pytest.fixture(scope="module")
def flags(toy, clip_path, tmp_path_factory):
    """Flags of untrained checkpoints, 2 + 1 + 1 steps to 64 px, and of 24 captioned pictures."""
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoints = write_checkpoints(
        folder, clip_path, replace(TOY.prior, sample_timesteps=2), noise=0.1,
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
    return lambda *more: run_script("dalle2/evaluate.py", *flags, "--output_dir", tmp_path / "out",
                                    *more)


def list_times(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*.png")
            if path.name != "sweep.png"}


def embed(clip, paths):
    images = [torch.from_numpy(np.array(Image.open(path).resize((256, 256), Image.BICUBIC)))
              for path in paths]
    return clip.embed_image(torch.stack(images).permute(0, 3, 1, 2))


def test_figures_files_and_resuming(evaluate, toy, clip_path, store_dir, tmp_path, run_script,
                                    flags):
    out = tmp_path / "out"
    few = ["--samples_for_diversity", 3, "--batch_size", 4]
    assert evaluate("--num_images", 4, *few)[0] == 0
    before = list_times(out)
    assert len(before) == 4 + 4 * 2
    code, told, _ = evaluate("--num_images", 20, *few, "--train_img_path", toy / "train",
                             "--train_annot_path", toy / "captions_train.json")
    after = list_times(out)
    assert code == 0 and len(after) == 20 + 16 * 2 and before.items() <= after.items()

    result = json.loads((out / "evaluation.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())["images"]
    captions = {(c["image_id"], c["caption"]) for c in json.loads(
        (toy / "captions_val.json").read_text())["annotations"]}
    ids = [entry["image_id"] for entry in manifest]
    assert ids == sorted(ids) and len(set(ids)) == 20
    assert [entry["file"] for entry in manifest] == [f"images/{n}.png" for n in ids]
    assert all((e["image_id"], e["caption"]) in captions for e in manifest)
    assert all(Image.open(out / e["file"]).convert("L").size == (64, 64) for e in manifest)

    clip = load_clip("", str(clip_path))
    pictures = embed(clip, [out / entry["file"] for entry in manifest])
    text_embed = clip.embed_text(clip.tokenize([e["caption"] for e in manifest]))[0]
    found = result["metrics"]
    cosine = (pictures * text_embed).sum(-1)
    assert found["clip_score"] == pytest.approx(cosine.mean().item(), abs=0.01)
    assert [e["clip_score"] for e in manifest] == pytest.approx(cosine.tolist(), abs=0.03)
    names = {image["id"]: image["file_name"] for image in json.loads(
        (toy / "captions_val.json").read_text())["images"]}
    photos = embed(clip, [toy / "val" / names[n] for n in sorted(names)[:24]])
    assert found["cmmd"] == pytest.approx(metrics.compute_cmmd(pictures, photos)[0], rel=0.05)
    assert found["photo_clip_score"] == pytest.approx(
        (photos[:20] * text_embed).sum(-1).mean().item(), abs=1e-4)
    samples = torch.stack([embed(clip, [out / f"images/{n}.png", out / f"diversity/{n}_1.png",
                                        out / f"diversity/{n}_2.png"]) for n in ids[:16]])
    assert found["diversity"] == pytest.approx(metrics.compute_diversity(samples), rel=0.1)
    assert found["diversity"] > 1e-5 and 0 <= found["r_precision"] <= 1
    train = embed(clip, sorted((toy / "train").glob("*.jpg")))
    assert found["nearest_train_cosine"] == pytest.approx(
        (pictures @ train.T).amax(1).mean().item(), abs=0.01)
    elsewhere = [torch.cat([photos[:n], photos[n + 1:]]) for n in range(20)]  # not the own photo
    nearer = [(p @ train.T).max() > (p @ x.T).max() for p, x in zip(pictures, elsewhere)]
    assert found["nearer_to_train"] == pytest.approx(sum(nearer).item() / 20, abs=0.11)
    assert 0.3 < found["photo_nearer_to_train"] < 1
    assert found["fid"] is None and found["kid"] is None and found["seconds_a_picture"] > 0
    assert result["settings"]["sample_timesteps"] == [2, 1, 1]
    assert result["settings"]["cond_scale"] == 1.5 and result["counts"]["other_captions"] >= 20
    assert result["clip"]["same"] and result["clip"]["judge"]["fingerprint"]
    assert any("is the one that conditions" in line for line in result["warnings"])

    table = (out / "evaluation.md").read_text()
    head, _, row = [line.split("|")[1:-1] for line in table.splitlines() if line[:1] == "|"]
    cells = dict(zip(map(str.strip, head), map(str.strip, row)))
    assert table in told and len(head) == len(row) and cells["FID"] == "–"
    assert float(cells["CMMD"]) == pytest.approx(found["cmmd"], abs=1e-3)

    # the same pictures again, from the store: nothing rendered, about the same figures
    code, _, _ = evaluate("--num_images", 20, *few, "--train_img_path", toy / "train",
                          "--train_annot_path", toy / "captions_train.json",
                          "--store_dir", store_dir)
    again = json.loads((out / "evaluation.json").read_text())["metrics"]
    assert code == 0 and list_times(out) == after
    assert {k: v for k, v in again.items() if "train" not in k} \
        == {k: v for k, v in found.items() if "train" not in k}
    assert again["nearest_train_cosine"] == pytest.approx(found["nearest_train_cosine"], abs=1e-3)

    # other settings are refused, naming the flag
    for name, value in (("cond_scale", 3), ("prior_cond_scale", 2), ("sample_timesteps", 3),
                        ("seed", 1), ("sampler", "ddpm"), ("mixed_precision", "bf16"),
                        ("test_annot_path", toy / "captions_val.json")):
        code, _, error = evaluate("--num_images", 20, f"--{name}", value)
        assert code == 2 and error.startswith(f"error: --{name}: ") and error.count("\n") == 1
    assert list_times(out) == after

    # the pictures are those of test_dalle2.py
    code, _, error = run_script("test_dalle2.py", *flags[:-1], "--num_images", 5, "--output_dir",
                                tmp_path / "result")
    assert code == 0, error
    rendered = json.loads((tmp_path / "result" / "manifest.json").read_text())["images"]
    for mine, theirs in zip(manifest, rendered, strict=False):
        assert all(mine[key] == theirs[key] for key in ("caption", "image_id", "seed"))
        picture = torch.from_numpy(np.array(Image.open(out / mine["file"]))).permute(2, 0, 1)
        save_jpeg(picture, tmp_path / "mine.jpg")
        assert (tmp_path / "mine.jpg").read_bytes() \
            == (tmp_path / "result" / theirs["file"]).read_bytes()


def test_fid_and_kid_see_photos_as_real_and_pictures_as_fake(evaluate, monkeypatch, toy, tmp_path):
    pytest.importorskip("torchmetrics")
    seen, sides, compute_fid_kid = [], {}, metrics.compute_fid_kid

    def extract(image):  # in place of Inception: mean and spread of each color channel
        seen.append(image)
        return torch.cat([image.float().mean((2, 3)), image.float().std((2, 3))], 1)
    monkeypatch.setattr(metrics, "load_inception", lambda path, device: extract)
    monkeypatch.setattr(metrics, "compute_fid_kid", lambda real, fake: sides.update(
        real=real, fake=fake) or compute_fid_kid(real, fake))
    code, told, _ = evaluate("--num_images", 10, "--fid", "--samples_for_diversity", 2,
                             "--num_reference_images", 24)
    assert code == 0
    assert all(image.dtype == torch.uint8 and image.shape[1:] == (3, 256, 256)
               for image in seen)
    assert [len(image) for image in seen] == [24, 20]
    assert max(int(image.max()) for image in seen) > 200
    names = sorted((i["id"], i["file_name"]) for i in json.loads(
        (toy / "captions_val.json").read_text())["images"])[:24]
    photos = np.stack([np.asarray(Image.open(toy / "val" / name), dtype=float)
                       for _, name in names])
    assert np.allclose(sides["real"][:, :3], photos.mean((1, 2)), atol=0.5)
    pictures = np.stack([np.asarray(Image.open(tmp_path / "out" / "images" / f"{n}.png"),
                                    dtype=float) for n, _ in names[:10]])
    assert sides["fake"].shape == (10, 6)
    assert np.allclose(sides["fake"][:, :3], pictures.mean((1, 2)), atol=1.5)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["metrics"]["fid"] == pytest.approx(
        compute_fid_kid(sides["real"], sides["fake"])["fid"])
    assert found["metrics"]["kid"] is not None
    assert "FID of 10 pictures means nothing" in told


def extract_means(image):
    """In place of Inception."""
    return torch.cat([image.float().mean((2, 3)), image.float().std((2, 3))], 1)


def evaluate_alone(folder, flags):
    judge.EMBED_BATCH_SIZE, metrics.load_inception = 5, lambda path, device: extract_means
    sys.argv = ["evaluate", *map(str, flags), "--output_dir", str(folder / "out")]
    torch.set_num_threads(1)
    evaluation.main()


def evaluate_together(rank, folder, flags):
    """One process of two that evaluate, and are then refused with other settings."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    evaluate_alone(folder, flags)
    with pytest.raises(UserError, match="--seed: the pictures in"):
        evaluate_alone(folder, [*flags, "--seed", 1])


def test_two_processes_share_the_work_and_find_the_same_numbers(flags, toy, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    for owner, name in ((judge, "EMBED_BATCH_SIZE"), (metrics, "load_inception"), (sys, "argv")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    more = [*flags, "--num_images", 7, "--samples_for_diversity", 2, "--fid", "--train_img_path",
            toy / "train", "--train_annot_path", toy / "captions_train.json"]
    results, threads = [], torch.get_num_threads()
    evaluate_alone(tmp_path / "1", more)
    torch.set_num_threads(threads)
    (tmp_path / "2").mkdir()
    multiprocessing.spawn(evaluate_together, (tmp_path / "2", more), nprocs=2)
    for folder, device in ((tmp_path / "1", "CPU, 1 threads"),
                           (tmp_path / "2", "2 x CPU, 1 threads")):
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


def test_without_inception_fid_is_null_and_one_line_says_so(evaluate, monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(metrics, "INCEPTION_URL", "http://127.0.0.1:9/weights-1.pth")
    code, told, _ = evaluate("--num_images", 2, "--fid", "--samples_for_diversity", 1)
    assert code == 0 and "\nwarning: no FID and no KID: the Inception-v3 could not be" in told
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["metrics"]["fid"] is None and found["metrics"]["diversity"] is None
    assert any("no FID" in line for line in found["warnings"])
    code, _, error = evaluate("--fid", "--inception_weights", tmp_path / "absent.pth")
    assert code == 2 and error.startswith("error: --inception_weights: no such file")


def test_another_clip_judges(evaluate, tmp_path, clip_path):
    other = write_clip(tmp_path / "other.safetensors", 7, noise=0.2)
    few = ["--num_images", 3, "--samples_for_diversity", 1]
    code, told, _ = evaluate(*few, "--judge_clip_pretrained", other)
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert code == 0 and not result["clip"]["same"] and "warning" not in told
    fingerprint = compute_fingerprint(load_clip("", str(other)))
    assert result["clip"]["judge"]["fingerprint"] == fingerprint and fingerprint in told
    assert result["clip"]["condition"]["fingerprint"] != fingerprint
    assert evaluate(*few)[0] == 0
    own = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert own["clip_score"] != result["metrics"]["clip_score"]
    code, told, _ = evaluate(*few, "--judge_clip_pretrained", clip_path)  # the same, by its weights
    assert "is the one that conditions" in told


def test_photos_that_cannot_be_read_are_left_out(evaluate, flags, toy, tmp_path, monkeypatch):
    own_rows, compute_memorization = [], metrics.compute_memorization
    monkeypatch.setattr(metrics, "compute_memorization", lambda *args: own_rows.extend(
        args[3].tolist()) or compute_memorization(*args))
    whole = json.loads(flags[flags.index("--test_annot_path") + 1].read_text())
    whole["images"][1]["file_name"] = "absent.jpg"
    (tmp_path / "captions.json").write_text(json.dumps(whole))
    code, told, _ = evaluate("--test_annot_path", tmp_path / "captions.json", "--num_images", 3,
                             "--samples_for_diversity", 1, "--train_img_path", toy / "train",
                             "--train_annot_path", toy / "captions_train.json")
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert code == 0 and result["counts"]["reference_photos"] == 23
    assert own_rows == [0, -1, 1]  # of the photos that are left; the second picture has none
    assert "--test_img_path: 1 of 24 photos cannot be read and are left out" in told
    damaged = sorted((tmp_path / "out" / "images").iterdir())[0]
    damaged.write_bytes(b"no picture")
    code, _, error = evaluate("--test_annot_path", tmp_path / "captions.json", "--num_images", 3)
    assert code == 2 and damaged.name in error


def test_a_sweep_draws_tabulates_and_names_the_lowest_cmmd(evaluate, tmp_path):
    out = tmp_path / "out"
    grid = ["--sweep", "--cond_scale", 1, 4, "--sample_timesteps", 1, 2, "--num_images", 5,
            "--samples_for_diversity", 2]
    code, told, _ = evaluate(*grid)
    assert code == 0
    result = json.loads((out / "sweep.json").read_text())
    assert [(row["cond_scale"], row["sample_timesteps"]) for row in result["rows"]] \
        == [(scale, [steps] * 3) for scale in (1, 4) for steps in (1, 2)]
    assert all(row[name] is not None for row in result["rows"] for name in (
        "clip_score", "r_precision", "cmmd", "diversity", "seconds_a_picture"))
    assert len({row["cmmd"] for row in result["rows"]}) == 4
    assert result["best"]["cmmd"] == min(row["cmmd"] for row in result["rows"])
    best = result["best"]
    assert f"lowest CMMD: cond_scale {best['cond_scale']:g}, prior_cond_scale 1, " \
        f"sample_timesteps {best['steps']};" in told
    assert len([line for line in (out / "sweep.md").read_text().splitlines()
                if line[:1] == "|"]) == 6
    assert np.asarray(Image.open(out / "sweep.png").convert("L")).std() > 5
    times = list_times(out)
    assert len(times) == 4 * (5 + 5)
    assert evaluate(*grid)[0] == 0 and list_times(out) == times


@pytest.mark.parametrize("given, flag", [
    (["--num_images", 1], "num_images"), (["--cond_scale", 1, 2], "cond_scale"),
    (["--cond_scale", "nan"], "cond_scale"), (["--sample_timesteps", 0], "sample_timesteps"),
    (["--sample_timesteps", 1, 2], "sample_timesteps"),
    (["--sample_timesteps", 1001], "sample_timesteps"),
    (["--train_img_path", "x"], "train_annot_path"), (["--store_dir", "x"], "train_img_path"),
    (["--test_annot_path", "x"], "test_annot_path"), (["--prior_ckpt", "x"], "prior_ckpt"),
    (["--judge_clip_model", "ViT-B-32"], "judge_clip_pretrained"),
    (["--judge_clip_pretrained", "x.pt"], "judge_clip_pretrained")])
def test_a_bad_flag_is_one_line_and_nothing_is_written(evaluate, tmp_path, given, flag):
    code, _, error = evaluate(*given)
    assert code == 2 and error.startswith(f"error: --{flag}: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
