"""The command that chooses a run's weights, on untrained networks that snapshots were taken of."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    TOY,
    D,
    change_unets,
    check_refused,
    extract_means,
    write_checkpoints,
    write_clip,
)

from dalle2 import sampling
from dalle2.checkpoint import load_export, read_export_header
from dalle2.clip import load_clip
from dalle2.config import config_to_dict
from dalle2.diffusion import build_diffusion
from dalle2.ema import PowerAverages, save_snapshot, synthesize
from dalle2.models import build_prior, build_unet, load_decoder, load_prior
from dalle2.prepare import prepare_store
from dalle2.rng import derive_seed
from dalle2.tools import metrics
from dalle2.tools.candidates import open_run, write_chosen

PRIOR = replace(TOY.prior, sample_timesteps=2)
UNETS = change_unets({"image_size": 16, "sample_timesteps": 1},
                     {"image_size": 32, "sample_timesteps": 2})
N = 8
SEEDS = [derive_seed(0, row) for row in range(N)]


@pytest.fixture(scope="module")
def folder(noisy_clip_path, tmp_path_factory):
    """Run folder of a prior, and of both stages of a decoder, with exports of other weights."""
    tmp_path = tmp_path_factory.mktemp("runs")
    write_checkpoints(tmp_path, noisy_clip_path, PRIOR, UNETS, noise=0.1)
    clip = read_export_header(tmp_path / "prior.safetensors", "prior")["clip"]
    for run_dir, network, header in (
            (tmp_path, build_prior(PRIOR, D), {"config": config_to_dict(PRIOR)}),
            *((tmp_path / f"unet{n}", build_unet(config, n, D),
               {"config": config_to_dict(config), "lowres_size": 16 * (n - 1)})
              for n, config in enumerate(UNETS, start=1))):
        averages = PowerAverages(network)
        for step in (1, 2, 3, 4):
            with torch.no_grad():
                for param in averages.params:
                    param += 0.05 * torch.randn_like(param)
            averages.update(step)
            if step in (2, 4):
                save_snapshot(run_dir, step, averages.collect(), header)
        (run_dir / "config.json").write_text(json.dumps(
            {**header, "embed_dim": D, "clip": clip}))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"config": {"text_layers": 2}}')
    return tmp_path


@pytest.fixture
def store(toy, store_dir, noisy_clip_path, folder):
    return prepare_store(toy / "val", toy / "captions_val.json", store_dir,
                         clip=load_clip("", str(noisy_clip_path)),
                         max_images=N, progress=False)


@pytest.fixture
def choose(run_script, toy, store_dir, folder):
    """choose(run folder, *flags) -> (exit code, stdout, stderr)."""
    return lambda run_dir, *flags: run_script(
        "dalle2/tools/choose.py", "--run_dir", run_dir, "--val_img_path", toy / "val",
        "--val_annot_path", toy / "captions_val.json", "--num_images", N, "--store_dir",
        store_dir, "--sigma_rel", 0.05, 0.2, *flags)


def load_candidates(run_dir, export):
    """{(step, sigma_rel): state dict}, (0, None) what was exported."""
    return {(0, None): export, **{(step, sigma_rel): synthesize(run_dir, step, sigma_rel)
                                  for step in (2, 4) for sigma_rel in (0.05, 0.2)}}


def read_scores(run_dir):
    rows = json.loads((run_dir / "choice.json").read_text())["candidates"]
    return {(row["step"], row["sigma_rel"]): row["score"] for row in rows}


def compute_mmd(kernel, drawn, true):
    """Over all pairs of different photos, one by one."""
    return np.mean([kernel(drawn[i], drawn[j]) + kernel(true[i], true[j])
                    - kernel(drawn[i], true[j]) - kernel(drawn[j], true[i])
                    for i in range(N) for j in range(N) if i != j])


def list_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_prior_is_chosen_by_cosine_and_written(choose, folder, store, monkeypatch):
    network, _, _ = load_prior(folder / "prior.safetensors")
    rows, true = store.caption_start[:-1], torch.tensor(store.image_embed).float()
    texts = (torch.tensor(store.text_embed[rows]).float(),
             store.load_text_encodings(rows, PRIOR.max_text_len).float())
    cosines = {}
    for key, state in load_candidates(folder, network.state_dict()).items():
        network.load_state_dict(state)
        drawn = sampling.sample_image_embed(network, PRIOR, *texts, SEEDS)
        cosines[key] = (drawn * torch.nn.functional.normalize(true, dim=-1)).sum(-1)
    code, told, error = choose(folder, "--batch_size", 5)
    assert code == 0, error
    assert read_scores(folder) == {key: pytest.approx(value.mean().item(), abs=1e-5)
                                   for key, value in cosines.items()}
    (step, sigma_rel), best = max(cosines.items(), key=lambda pair: pair[1].mean())
    assert f"\nbest: step {step}, sigma_rel {sigma_rel:g}; of 4 others " in told
    assert f": a {'longer' if sigma_rel == 0.2 else 'shorter'} average may be better still" in told
    result = json.loads((folder / "choice.json").read_text())
    for row in result["candidates"]:  # so few that each photo is left out on its own
        cosine = cosines[row["step"], row["sigma_rel"]]
        assert row["error"] == pytest.approx(cosine.std().item() / N ** 0.5, rel=1e-3)
        assert row["gap"] == pytest.approx((best - cosine).mean().item(), abs=1e-5)
        assert row["gap_error"] == pytest.approx((best - cosine).std().item() / N ** 0.5, rel=1e-2,
                                                 abs=1e-7)

    # again: nothing is drawn; the best is written and no longer beside itself
    def fail(*args, **options):
        raise RuntimeError("drawn again")
    with monkeypatch.context() as patch:
        patch.setattr("dalle2.tools.candidates.sample_image_embed", fail)
        assert choose(folder, "--write")[0] == 0
        written, _, header = load_prior(folder / "prior.safetensors")
        assert header["chosen"] == {"step": step, "sigma_rel": sigma_rel, "metric": "cosine",
                                    "score": result["best"]["score"]}
        assert header["step"] == step and header["clip"]["fingerprint"]
        state = synthesize(folder, step, sigma_rel)
        assert all(torch.equal(value, state[name]) for name, value in written.state_dict().items())
        assert choose(folder)[0] == 0 and (0, None) not in read_scores(folder)
        with pytest.raises(RuntimeError, match="drawn again"):  # other settings are drawn anew
            choose(folder, "--metric", "cmmd")


def test_a_first_stage_is_chosen_by_cmmd_in_the_eyes_of_a_judge(choose, folder, store, tmp_path,
                                                                noisy_clip_path):
    stages, _, _ = load_decoder(folder / "decoder.safetensors")
    drawn, true = {}, torch.tensor(store.load_small_images(16)) / 255
    for key, state in load_candidates(folder / "unet1", stages[1].state_dict()).items():
        stages[1].load_state_dict(state)
        drawn[key] = sampling.sample_images(sampling.build_stages([stages[1]], UNETS[:1]),
                                            torch.tensor(store.image_embed).float(), SEEDS)
    other = write_clip(tmp_path / "other.safetensors", seed=1, noise=0.2)
    for judge, flags, which in ((noisy_clip_path, [], ", which conditions the decoder too"),
                                (other, ["--judge_clip_pretrained", other], " pictures, CLIP ")):
        clip = load_clip("", str(judge))
        expected = {key: compute_mmd(lambda x, y: 1000 * math.exp(-(x - y).square().sum() / 200),
                                     clip.embed_image(image).double(),
                                     clip.embed_image(true).double())
                    for key, image in drawn.items() if key[0] != 2}
        code, told, error = choose(folder / "unet1", "--last_steps", 1, *flags)
        assert code == 0 and which in told, error
        assert read_scores(folder / "unet1") == {key: pytest.approx(value, rel=1e-3)
                                                 for key, value in expected.items()}


def test_a_later_stage_draws_from_true_small_pictures(choose, folder, store, monkeypatch):
    monkeypatch.setattr(metrics, "load_inception", lambda path, device: extract_means)
    stages, _, _ = load_decoder(folder / "decoder.safetensors")
    config, shape = UNETS[1], (3, 32, 32)
    lowres = torch.tensor(store.load_small_images(16)) / 255
    true, expected = extract_means(torch.tensor(store.load_small_images(32))), {}
    levels = sampling.compute_levels(build_diffusion(config, "cpu"), config.sample_timesteps)
    for key, state in load_candidates(folder / "unet2", stages[2].state_dict()).items():
        stages[2].load_state_dict(state)
        with torch.no_grad():
            image = sampling.SAMPLERS[sampling.SAMPLER](
                sampling.build_denoiser(stages[2], config, sampling.condition_upsampler(
                    lowres, config.image_size, config.lowres_noise_level,
                    sampling.draw_part(SEEDS, shape, "cpu", "lowres", 2))),
                sampling.draw_part(SEEDS, shape, "cpu", "unet", 2), levels)
        image = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
        expected[key] = compute_mmd(lambda x, y: (x @ y / 6 + 1).item() ** 3,
                                    extract_means(image).double(), true.double())
    code, told, error = choose(folder / "unet2", "--metric", "kid", "--steps", 4)
    assert code == 0 and "kid of 8 pictures, Inception-v3" in told, error
    assert read_scores(folder / "unet2") == {key: pytest.approx(value, rel=0.05)
                                             for key, value in expected.items() if key[0] != 2}


def test_a_stage_is_written_beside_the_others(folder, tmp_path, capsys):
    run = open_run(shutil.copytree(folder, tmp_path / "run") / "unet2")
    before = load_export(run.export, "decoder")
    best = {"export": "decoder.safetensors", "step": 0, "sigma_rel": None, "score": 1.0}
    write_chosen(run, best, "cmmd")
    assert "holds the best already" in capsys.readouterr().out
    assert load_export(run.export, "decoder")[0] == before[0]
    write_chosen(run, best | {"export": None, "step": 4, "sigma_rel": 0.2}, "cmmd")
    header, weights = load_export(run.export, "decoder")
    assert header["stages"][0] == before[0]["stages"][0]
    assert header["stages"][1] == {**before[0]["stages"][1], "step": 4, "chosen": {
        "step": 4, "sigma_rel": 0.2, "metric": "cmmd", "score": 1.0}}
    state = synthesize(run.folder, 4, 0.2)
    assert weights.keys() == before[1].keys()
    for name, value in weights.items():
        assert torch.equal(value, state[name.removeprefix("unets.1.")] if "unets.1." in name
                           else before[1][name])


@pytest.mark.parametrize("where, flags, message", [
    ("", ["--sigma_rel", 0.5], "--sigma_rel: 0.5"), ("", ["--steps", 3], "--steps: .*step 3"),
    ("", ["--metric", "kid"], "--metric: a prior"),
    ("clip", [], "--run_dir: .*neither a prior nor")])
def test_a_bad_flag_is_one_line(choose, folder, where, flags, message):
    before = list_times(folder)
    check_refused(choose(folder / where, *flags), message)
    assert list_times(folder) == before
