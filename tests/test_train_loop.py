"""The optimizers; and the loop: resuming, averages, signals, lack of memory; on a network of three
layers."""

import contextlib
import json
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from helpers import run_in_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dalle2.checkpoint import load_newest_checkpoint, save_checkpoint
from dalle2.config import PRESETS, TrainConfig
from dalle2.errors import UserError
from dalle2.files import hold_lock, replace_file
from dalle2.logger import MetricsLog, open_tracker, read_metrics
from dalle2.optimizer import Muon, build_optimizers, orthogonalize
from dalle2.rng import BatchRandom
from dalle2.train_loop import BATCHES_AHEAD, check_same_run, compute_lr_factor, train
from dalle2.train_state import count_rows, take_step

DECAYING = replace(PRESETS["base"].prior.train, weight_decay=0.1)


def build_module():
    return nn.Sequential(nn.Linear(9, 12), nn.GroupNorm(1, 12), nn.Conv2d(12, 16, 3),
                         nn.Conv2d(16, 3, 3), nn.Embedding(40, 16))


def test_only_matrices_decay_and_muon_takes_those_of_layers():
    module = build_module()
    (optimizer,) = build_optimizers(module, DECAYING)
    decayed, others = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [2, 4, 4, 2] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in others["params"]} == {1} and others["weight_decay"] == 0
    adamw, muon = build_optimizers(module, replace(DECAYING, muon_lr=0.05))
    (group,) = muon.param_groups
    assert [id(p) for p in group["params"]] == [id(module[0].weight), id(module[2].weight)]
    assert group["peak_lr"] == 0.05 and group["weight_decay"] == 0.1
    assert [g["peak_lr"] for g in adamw.param_groups] == [DECAYING.lr] * 2
    assert sum(len(g["params"]) for g in adamw.param_groups) + 2 == len(list(module.parameters()))


@pytest.mark.parametrize("shape", [(8, 8), (8, 300), (128, 200)])
def test_orthogonalized_matrices_keep_their_directions(shape):
    """Singular values near 1, singular vectors those of before; against the iteration on X."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    out = orthogonalize(matrices)
    values = torch.linalg.svdvals(out)
    assert values.max() < 1.3 and values.median() > 0.6
    x = matrices / matrices.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(out, x, atol=2e-3, rtol=0)


def test_muon_moves_each_matrix_by_its_learning_rate():
    weight, kernel = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16, 3, 3))
    before = weight.detach().clone(), kernel.detach().clone()
    optimizer = Muon([weight, kernel], lr=0.1)
    weight.grad, kernel.grad = 1e3 * torch.randn(16, 8), 1e-3 * torch.randn(8, 16, 3, 3)
    optimizer.step()
    for param, old, scale in ((weight, before[0], 2 ** 0.5), (kernel, before[1], 1)):
        moved = torch.linalg.svdvals((param.detach() - old).flatten(1)) / 0.1 / scale
        assert 0.5 < moved.min() and moved.max() < 1.3


def test_muon_decays_weights_and_a_step_that_is_left_out_leaves_no_trace():
    weight = nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.zeros(8, 8)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((8, 8), 0.95))
    weights = []
    for seeds in ((1, 2), (1, None, 2)):
        weight = nn.Parameter(torch.ones(8, 8))
        optimizer = Muon([weight], lr=0.1)
        for seed in seeds:
            weight.grad = torch.full((8, 8), torch.nan) if seed is None else torch.randn(
                8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.found_inf = torch.tensor(float(seed is None))
            optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)


CONFIG = TrainConfig(num_steps=8, batch_size=4, lr=1e-2, warmup_steps=2, weight_decay=0.1,
                     ema_decay=0.9, save_every=4, validate_every=4)


class SmallTask:
    """Fixed numbers in, fewer out: what the loop asks of a task. at_step: called with the number of
    each step; stop_at: the step at which the process dies."""

    num_val, can_split, can_sample = 0, True, False

    def __init__(self, config, start=0, stop_at=None, at_step=None):
        self.config, self.stop_at, self.at_step = SimpleNamespace(train=config), stop_at, at_step
        self.rows_seen = start * config.batch_size
        self.exported, self.last_exported = {}, {}

    def describe_run(self):
        return {"lr": self.config.train.lr}

    def draw(self, step, rows, random):
        if step == self.stop_at:
            raise KeyboardInterrupt
        return {"x": random.rand(3)}

    def loss(self, module, batch, random):
        batch_size = self.config.train.batch_size
        if self.at_step and self.rows_seen % batch_size == 0:
            self.at_step(self.rows_seen // batch_size)
        self.rows_seen += len(batch["x"])
        return (module(batch["x"] + random.randn(3)) - batch["x"][:, :2]).square().mean(1)

    def score(self, metrics):
        return metrics["val_loss"]

    def export(self, state, step, last):
        into = self.last_exported if last else self.exported
        into.update({name: value.clone() for name, value in state.items()})


def run_training(folder, config=CONFIG, module=None, stop_at=None, at_step=None, **parts):
    """Trains a small network; returns (exported weights, raw weights, metrics). No curves are
    drawn: it takes longer than all the rest. parts: of the SmallTask that are replaced: loss, draw,
    validate, sample, num_val, can_split."""
    torch.manual_seed(0)
    module = module or nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(),
                                     nn.Linear(8, 2))
    checkpoint = load_newest_checkpoint(folder / "checkpoints")
    task = SmallTask(config, checkpoint["step"] if checkpoint else 0, stop_at, at_step)
    for name, part in parts.items():
        setattr(task, name, part)
    with contextlib.suppress(KeyboardInterrupt), patch("dalle2.run_folder.save_curves"):
        train(task=task, module=module, run_dir=folder, accelerator=Accelerator(cpu=True),
              log_with="none")
    path = folder / "metrics.jsonl"  # the first process writes it
    return task.exported, module.state_dict(), read_metrics(path) if path.exists() else []


def test_exported_weights_are_the_average_and_not_the_raw_ones(tmp_path):
    seen = []

    def loss(module, batch, random):
        seen.append([p.detach().clone() for p in module.parameters()])
        return loss_of_noise(module, batch, random)
    exported, raw, _ = run_training(tmp_path, loss=loss)
    average = seen[0]
    for step, weights in enumerate([*seen[1:], raw.values()]):
        decay = min(CONFIG.ema_decay, (1 + step) / (10 + step)) if step else 0
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights)]
    state = load_newest_checkpoint(tmp_path / "checkpoints")
    for (name, value), wanted in zip(exported.items(), average, strict=True):
        torch.testing.assert_close(value, wanted)
        assert torch.equal(value, state["ema"][name]) and not torch.equal(value, raw[name])
        assert torch.equal(raw[name], state["module"][name])


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_the_same_command_resumes_to_the_same_bits(tmp_path, end):
    """Killed after step 6 the run is left with the checkpoint of step 4 and the metrics of step 5;
    stopped by a signal in step 3 it saves first."""
    config = replace(CONFIG, muon_lr=0.02, snapshot_every=5)
    whole, _, metrics = run_training(tmp_path / "whole", config)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    if end == "killed":
        run_training(tmp_path / "parts", config, stop_at=6)
    else:
        with pytest.raises(SystemExit) as stopped:
            run_training(tmp_path / "parts", config,
                         at_step=lambda step: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
        assert stopped.value.code == 128 + signal.SIGTERM
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    saved = load_newest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert saved["step"] == (4 if end == "killed" else 3)
    resumed, _, again = run_training(tmp_path / "parts", config)
    finished, *_ = run_training(tmp_path / "parts", config, stop_at=0)  # no step is taken
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) and torch.equal(value, finished[name])
    snapshots = [{path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*sigma*")}
                 for folder in ("whole", "parts")]
    assert snapshots[0] == snapshots[1] and len(snapshots[0]) == 2
    assert [m["step"] for m in again] == [m["step"] for m in metrics] == list(range(1, 9))
    assert [m["loss"] for m in again] == [m["loss"] for m in metrics]


def test_learning_rate_warms_up_and_falls(tmp_path):
    config = replace(CONFIG, num_steps=100, warmup_steps=9)
    factors = [compute_lr_factor(config, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == pytest.approx(1)
    assert factors.index(max(factors)) == 9 and factors[99] < 0.01
    assert compute_lr_factor(replace(config, lr_schedule="constant"), 99) == 1
    *_, metrics = run_training(tmp_path)
    assert [m["lr"] for m in metrics] == [CONFIG.lr * compute_lr_factor(CONFIG, step)
                                          for step in range(8)]


def test_the_same_numbers_whatever_the_number_of_processes():
    def build(step=3, **options):
        return BatchRandom(0, step, "noise", batch_size=8, **options)
    whole, ranks = build(), [build(rows=slice(4 * r, 4 * r + 4)) for r in range(2)]
    for draw in (lambda r: r.randn(2), lambda r: r.randint(1000), lambda r: r.rand()):
        parts = [draw(rank) for rank in ranks]
        assert torch.equal(torch.cat(parts), draw(whole)) and not torch.equal(*parts)
    assert not torch.equal(build(4).randn(2), build(3).randn(2))
    with pytest.raises(UserError, match="batch_size: 10 does not divide among 4 processes"):
        count_rows(10, 4)


def test_another_runs_folder_is_refused_by_field(tmp_path):
    run_training(tmp_path)
    with pytest.raises(UserError, match="lr: 0.01 before, 0.02 now"):
        run_training(tmp_path, replace(CONFIG, lr=0.02))
    check_same_run({"train": {"num_steps": 5}}, {"train": {"num_steps": 9}}, tmp_path)
    with hold_lock(tmp_path / ".lock", ""), pytest.raises(UserError, match="in use by another"):
        run_training(tmp_path)


def test_a_write_that_dies_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "x"
    path.write_text("good")
    with pytest.raises(TypeError):  # half way
        replace_file(path, lambda part: (part.write_text("half"), part.write_text(None)))
    assert path.read_text() == "good"


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step})
    before, newest = sorted(tmp_path.iterdir())
    assert (before.name, newest.name) == ("step_00000002.pt", "step_00000003.pt")
    newest.write_bytes(newest.read_bytes()[:40])
    assert load_newest_checkpoint(tmp_path) == {"step": 2}
    assert "damaged" in capsys.readouterr().out


def test_metrics_of_a_run_that_was_cut_off_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + '\n{"ste')
    with MetricsLog(tmp_path, step=1, log_with="tensorboard") as log:
        log.write([{"step": 2, "loss": 3.0, "grad_norm": float("nan")}])
        log.tracker.log_picture(torch.zeros(3, 8, 12), 2)
    tracker = open_tracker("tensorboard", tmp_path, 2)
    tracker.log_text("report_card", "| a |")
    tracker.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 3.0, "grad_norm": None}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 3 and "grad_norm" not in events.scalars.Keys()
    assert events.Tensors("report_card/text_summary")[0].tensor_proto.string_val == [b"| a |"]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].step) == (12, 2)


# ----------------------------------------------------------------------------------------------
# several processes


def train_in_parts(rank, folder):
    for steps in (4, 8):
        run_training(folder / f"machine{rank}", replace(CONFIG, num_steps=steps))


def train_with_little_memory(rank, folder):
    run_training(folder / "small", module=SmallDevice(1 if rank else 4), loss=loss_of_noise)


def loss_of_noise(module, batch, random):
    return module(batch["x"] + random.randn(3)).square().mean(1)


def assert_same_training(one, other, rel):
    for row, again in zip(one, other, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(again[name], rel=rel)


@pytest.mark.slow
def test_two_processes_resume_alike_and_take_the_rows_that_the_smaller_one_can(tmp_path, capfd):
    """Each has a run folder of its own at first, and only the first one's holds checkpoints; then
    the second lacks memory."""
    for function in (train_in_parts, train_with_little_memory):
        run_in_processes(function, tmp_path)
        (tmp_path / "meet").unlink(missing_ok=True)
    assert capfd.readouterr().out.count("out of memory with 2 rows at a time: now 1") == 1
    assert not (tmp_path / "machine1" / "checkpoints").exists()
    train_in_parts(1, tmp_path)
    *_, large = run_training(tmp_path / "large", module=SmallDevice(4), loss=loss_of_noise)
    for alone, folder in ((read_metrics(tmp_path / "machine1" / "metrics.jsonl"), "machine0"),
                          (large, "small")):
        assert_same_training(alone, read_metrics(tmp_path / folder / "metrics.jsonl"), rel=1e-4)


# ----------------------------------------------------------------------------------------------
# guards, the best checkpoint, lack of memory


def test_a_step_without_a_finite_gradient_changes_nothing_and_twenty_end_the_run(tmp_path):
    """Neither by AdamW nor by Muon, which has the middle layer's weight."""
    weights = []

    def loss(module, batch, random):
        weights.append([p.detach().clone() for p in module.parameters()])
        return module(batch["x"]).square().mean(1) * (float("nan") if len(weights) == 4 else 1)
    *_, metrics = run_training(tmp_path / "a", replace(CONFIG, muon_lr=0.02), loss=loss)
    assert [m["step"] for m in metrics if m.get("skipped")] == [4]
    for before, after, later in zip(weights[3], weights[4], weights[5]):
        assert torch.equal(before, after) and torch.isfinite(later).all()
    assert not all(torch.equal(a, b) for a, b in zip(weights[4], weights[5]))
    with pytest.raises(UserError, match="lr: .* no finite gradient in 20 steps up to step 20"):
        run_training(tmp_path / "b", replace(CONFIG, num_steps=60, save_every=100),
                     loss=lambda m, b, r: m(b["x"]).mean(1) * float("inf"))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    def full(state, path, save=torch.save):
        if state["step"] > 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left.*last good checkpoint is step_00000002.pt"):
        run_training(tmp_path, replace(CONFIG, save_every=2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002.pt"]
    assert capsys.readouterr().out.count("warning: ") == 2  # at steps 4 and 6 it went on


def test_the_best_weights_by_validation_are_exported_and_the_last_beside_them(tmp_path):
    last, seen = {}, []

    def validate(module, brief):
        seen.append((brief, module.training))
        return {"val_loss": [5.0, 5.5, 3.0, 3.5, 4.0, 4.5, 9.0, 9.5][len(seen) - 1]}
    exported, _, metrics = run_training(tmp_path, replace(CONFIG, validate_every=2),
                                        validate=validate, num_val=1, last_exported=last)
    assert seen == [(False, False), (True, False)] * 4
    assert [(m["step"], m["val_loss"], m["val_loss_raw"]) for m in metrics if "val_loss" in m] == [
        (2, 5.0, 5.5), (4, 3.0, 3.5), (6, 4.0, 4.5), (8, 9.0, 9.5)]
    assert not any(torch.equal(last[name], exported[name]) for name in exported)
    assert load_newest_checkpoint(tmp_path / "checkpoints")["best"] == {"step": 4, "score": 3.0}


class SmallDevice(nn.Module):
    """A network that runs out of memory with more than `rows` rows, from step `since` on."""

    def __init__(self, rows, since=0):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.rows, self.since, self.seen = nn.Linear(3, 2), rows, since, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.rows and len(self.seen) > self.since:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.layer(x)


@pytest.mark.parametrize("since", [0, 3])
def test_where_memory_runs_out_rows_are_halved_and_the_step_is_repeated(tmp_path, since, capsys):
    """Seven rows, then four at a time, then two: the last part is smaller, and weighs less."""
    config = replace(CONFIG, batch_size=7)
    _, _, whole = run_training(tmp_path / "a", config, SmallDevice(7), loss=loss_of_noise)
    small = SmallDevice(2, since)
    _, _, parts = run_training(tmp_path / "b", config, small, loss=loss_of_noise)
    assert small.seen == since * [7] + [7, 4] + (8 - since) * [2, 2, 2, 1]
    assert capsys.readouterr().out.count("out of memory with") == 2
    assert_same_training(whole, parts, rel=1e-5)


def test_a_step_of_two_optimizers_updates_the_scaler_once():
    """And unscales each gradient once: an update in between would let it be done again."""
    layer = nn.Linear(16, 16)
    optimizers = [torch.optim.SGD([param], lr=1.0) for param in layer.parameters()]
    before = [p.detach().clone() for p in layer.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for scale in (8.0, 16.0):
        layer.zero_grad()
        scaler.scale(layer(torch.ones(1, 16)).sum()).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        take_step(optimizers, torch.ones(()), scaler)
        assert scaler.get_scale() == scale
    for old, new in zip(before, layer.parameters()):
        torch.testing.assert_close(old - new, torch.full_like(old, 2.0))


def test_batches_are_drawn_ahead_no_further_and_noise_is_new_at_each_step(tmp_path):
    drawn, ahead, noises = [], [], set()

    def loss(module, batch, random):
        time.sleep(0.02)
        ahead.append(len(drawn) - len(ahead))
        noises.add(random.randn(3).sum().item())
        return loss_of_noise(module, batch, random)

    def draw(step, rows, random):
        drawn.append(threading.current_thread())
        return {"x": random.rand(3)}
    run_training(tmp_path, replace(CONFIG, num_steps=12), draw=draw, loss=loss)
    assert max(ahead) == BATCHES_AHEAD + 1 and threading.main_thread() not in drawn
    assert len(noises) == 12
