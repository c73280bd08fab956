"""Averages of the weights, put together from snapshots; and the command that chooses among them, on
untrained networks."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TOY, D, change_unets, extract_means, write_checkpoints

from dalle2 import sampling
from dalle2.checkpoint import load_export, read_export_header
from dalle2.clip import load_clip
from dalle2.config import config_to_dict
from dalle2.ema import PowerAverages, save_snapshot
from dalle2.images import to_uint8
from dalle2.models import build_prior, build_unet, load_decoder, load_prior
from dalle2.prepare import prepare_store
from dalle2.rng import derive_seed
from dalle2.tools import metrics
from dalle2.tools.averages import list_snapshots, solve_weights, synthesize
from dalle2.tools.candidates import open_run, write_chosen

STEPS, EVERY, WALKS = 400, 20, 64


class Weights(torch.nn.Module):
    """At step n `weight` begins with 1 in place n of STEPS zeros, so that an average of it is the
    average's own profile; behind it random walks."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(STEPS + WALKS))
        self.constant = torch.nn.Parameter(torch.full((3,), 0.7))
        self.frozen = torch.nn.Parameter(torch.tensor(1 / 3), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def train_to(self, step):
        self.weight[:STEPS] = torch.arange(1, STEPS + 1) == step
        self.weight[STEPS:] += 0.01 * torch.randn(WALKS, generator=self.generator)
        self.count += 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, averages of lengths that were tracked for comparison)."""
    folder, module = tmp_path_factory.mktemp("run"), Weights()
    tracked, wanted = PowerAverages(module), PowerAverages(module, (0.075, 0.15))
    for step in range(1, STEPS + 1):
        module.train_to(step)
        tracked.update(step)
        wanted.update(step)
        if step % EVERY == 0:
            save_snapshot(folder, step, tracked.collect(), {"config": {"a": 1}})
    return folder, wanted.state_dict() | tracked.state_dict()


@pytest.mark.parametrize("sigma_rel", ["0.05", "0.1", "0.15"])
def test_a_length_is_the_deviation_of_the_profile(run, sigma_rel):
    profile, place = run[1][sigma_rel]["weight"][:STEPS].double(), torch.arange(STEPS) / STEPS
    mean = (profile * place).sum()
    assert profile.sum() == pytest.approx(1, abs=1e-4)
    assert (profile * (place - mean) ** 2).sum().sqrt() == pytest.approx(float(sigma_rel), rel=0.02)


@pytest.mark.parametrize("sigma_rel", [0.075, 0.15])
def test_another_length_comes_out_as_if_it_had_been_tracked(run, sigma_rel):
    folder, averages = run
    state, wanted = synthesize(folder, STEPS, sigma_rel), averages[str(sigma_rel)]["weight"]
    _, mismatch = solve_weights(list(list_snapshots(folder)), STEPS, sigma_rel)
    assert state["weight"].dtype == torch.float32 and mismatch < 0.01
    # the profiles differ by the mismatch, which is of continuous ones: 1 / EVERY of it more
    profile, right = state["weight"][:STEPS], wanted[:STEPS]
    assert (profile - right).norm() / right.norm() == pytest.approx(mismatch, rel=0.3)
    # fp16 rounds the snapshots by up to 2^-11, with weights of norm 1: twice that of the walks; the
    # tracked average of the nearest length lies 20 times as far away
    walk, right = state["weight"][STEPS:], wanted[STEPS:]
    assert (walk - right).norm() < 2 ** -10 * right.norm()
    near = averages["0.1"]["weight"][STEPS:]
    assert (near - right).norm() > 20 * (walk - right).norm()
    assert state["count"] == STEPS and state["frozen"] == pytest.approx(1 / 3, abs=1e-6)


def test_one_snapshot_gives_weights_of_the_right_size(run):
    folder, averages = run
    weights, mismatch = solve_weights([(EVERY, 0.05), (EVERY, 0.1)], EVERY, 0.2)
    assert weights.sum() == pytest.approx(1) and 0.3 < mismatch < 1
    assert synthesize(folder, EVERY, 0.2)["constant"].tolist() == pytest.approx([0.7] * 3, rel=1e-3)
    # a length that was tracked is its own snapshot; later ones take no part
    exact = synthesize(folder, STEPS, 0.05)["weight"]
    assert torch.equal(exact, averages["0.05"]["weight"].half().float())
    assert not synthesize(folder, STEPS // 2, 0.15)["weight"][STEPS // 2:STEPS].any()


PRIOR = replace(TOY.prior, sample_timesteps=2)
UNETS = change_unets({"image_size": 16, "sample_timesteps": 1}, {"image_size": 32})
N = 8
SEEDS = [derive_seed(0, row) for row in range(N)]


@pytest.fixture(scope="module")
def folder(noisy_clip_path, tmp_path_factory):
    """Run folder of a prior, and below it of a first stage, with exports of other weights."""
    folder = tmp_path_factory.mktemp("runs")
    write_checkpoints(folder, noisy_clip_path, PRIOR, UNETS, noise=0.1)
    clip = read_export_header(folder / "prior.safetensors", "prior")["clip"]
    torch.manual_seed(1)  # with others the export may be the best
    for run_dir, network, config in ((folder, build_prior(PRIOR, D), PRIOR),
                                     (folder / "unet1", build_unet(UNETS[0], 1, D), UNETS[0])):
        averages = PowerAverages(network)
        header = {"config": config_to_dict(config), "lowres_size": 0}  # the latter of a stage
        for step in (1, 2, 3, 4):
            with torch.no_grad():
                for param in averages.params:
                    param += 0.05 * torch.randn_like(param)
            averages.update(step)
            if step in (2, 4):
                save_snapshot(run_dir, step, averages.collect(), header)
        (run_dir / "config.json").write_text(json.dumps(
            {**header, "embed_dim": D, "clip": clip}))
    return folder


@pytest.fixture
def store(toy, store_dir, noisy_clip_path):
    return prepare_store(toy / "val", toy / "captions_val.json", store_dir, max_images=N,
                         clip=load_clip("", str(noisy_clip_path)), progress=False)


@pytest.fixture
def choose(run_script, toy, store_dir):
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


def test_a_prior_is_chosen_by_cosine_and_written(choose, folder, store, monkeypatch):
    network, _, _ = load_prior(folder / "prior.safetensors")
    rows, true = store.caption_start[:-1], torch.tensor(store.image_embed[:]).float()
    texts = (torch.tensor(store.text_embed[rows]).float(),
             store.load_text_encodings(rows, PRIOR.max_text_len).float())
    cosines = {}
    for key, state in load_candidates(folder, network.state_dict()).items():
        network.load_state_dict(state)
        drawn = sampling.sample_image_embed(network, PRIOR, *texts, SEEDS)
        cosines[key] = (drawn * torch.nn.functional.normalize(true, dim=-1)).sum(-1)
    code, printed, error = choose(folder, "--batch_size", 5)
    assert code == 0, error
    assert read_scores(folder) == {key: pytest.approx(value.mean().item(), abs=1e-5)
                                   for key, value in cosines.items()}
    (step, sigma_rel), best = max(cosines.items(), key=lambda pair: pair[1].mean())
    assert f"\nbest: step {step}, sigma_rel {sigma_rel:g}; of 4 others " in printed
    result = json.loads((folder / "choice.json").read_text())
    for row in result["candidates"]:  # so few that each photo is left out on its own
        cosine = cosines[row["step"], row["sigma_rel"]]
        assert row["error"] == pytest.approx(cosine.std().item() / N ** 0.5, rel=1e-3)
        assert row["gap"] == pytest.approx((best - cosine).mean().item(), abs=1e-5)

    # again: nothing is drawn; the best is written and no longer beside itself
    monkeypatch.setattr("dalle2.tools.candidates.sample_image_embed", None)
    assert choose(folder, "--write")[0] == 0
    written, _, header = load_prior(folder / "prior.safetensors")
    assert header["chosen"] == {"step": step, "sigma_rel": sigma_rel, "metric": "cosine",
                                "score": result["best"]["score"]}
    state = synthesize(folder, step, sigma_rel)
    assert all(torch.equal(value, state[name]) for name, value in written.state_dict().items())
    assert choose(folder)[0] == 0 and (0, None) not in read_scores(folder)
    with pytest.raises(TypeError):  # other settings are drawn anew
        choose(folder, "--metric", "cmmd")


@pytest.mark.parametrize("metric, described", [
    ("cmmd", ", which also conditions the decoder"), ("kid", "Inception-v3")])
def test_a_first_stage_is_chosen_by_its_pictures(choose, folder, store, noisy_clip_path,
                                                 monkeypatch, metric, described):
    clip = load_clip("", str(noisy_clip_path))

    def compare(x, y):
        if metric == "kid":
            return (x @ y / len(x) + 1) ** 3
        return 1000 * torch.exp(-(x - y).square().sum() / 200)

    def extract(image):
        return (extract_means(to_uint8(image)) if metric == "kid"
                else clip.embed_image(image)).double()
    monkeypatch.setattr(metrics, "load_inception", lambda path, device: extract_means)
    stages, _, _ = load_decoder(folder / "decoder.safetensors")
    true, expected = extract(torch.tensor(store.load_small_images(16)) / 255), {}
    for key, state in load_candidates(folder / "unet1", stages[1].state_dict()).items():
        stages[1].load_state_dict(state)
        drawn = extract(sampling.sample_images(
            sampling.build_stages([stages[1]], UNETS[:1]),
            torch.tensor(store.image_embed[:]).float(), SEEDS))
        expected[key] = np.mean([compare(drawn[i], drawn[j]) + compare(true[i], true[j])
                                 - compare(drawn[i], true[j]) - compare(drawn[j], true[i])
                                 for i in range(N) for j in range(N) if i != j])
    code, printed, error = choose(folder / "unet1", "--metric", metric)
    assert code == 0 and described in printed, error
    assert read_scores(folder / "unet1") == {key: pytest.approx(value, rel=1e-3)
                                             for key, value in expected.items()}


def test_a_stage_is_written_beside_the_others(folder, tmp_path):
    run = open_run(shutil.copytree(folder, tmp_path / "run") / "unet1")
    before = load_export(run.export, "decoder")
    best = {"export": None, "step": 4, "sigma_rel": 0.2, "score": 1.0}
    write_chosen(run, best, "cmmd")
    header, weights = load_export(run.export, "decoder")
    assert header["stages"][1] == before[0]["stages"][1] and header["stages"][0]["step"] == 4
    state = synthesize(run.folder, 4, 0.2)
    assert weights.keys() == before[1].keys()
    for name, value in weights.items():
        assert torch.equal(value, state[name.removeprefix("unets.0.")] if "unets.0." in name
                           else before[1][name])
