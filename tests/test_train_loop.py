import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dalle2.checkpoint import load_newest_checkpoint, replace_file, save_checkpoint
from dalle2.config import TrainConfig, UserError
from dalle2.logger import MetricsLog, read_metrics
from dalle2.rng import BatchRandom, derive_seed
from dalle2.train_loop import check_same_run, compute_lr, split_weight_decay, train

CONFIG = TrainConfig(num_steps=8, batch_size=4, lr=1e-2, warmup_steps=2, weight_decay=0.1,
                     ema_decay=0.9, save_every=4, validate_every=4)


def run_training(folder, config=CONFIG, stop_at=None, compute_loss=None):
    """Trains a small network on fixed numbers; returns (exported weights, raw weights, metrics)."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    exported = {}

    def default_loss(module, batch, random):
        return (module(batch["x"] + random.randn(3)) - batch["x"][:, :2]).square().mean(1)

    def draw_batch(step, rows, random):
        if step == stop_at:
            raise KeyboardInterrupt
        return {"x": random.rand(3)}
    try:
        train(module=module, compute_loss=compute_loss or default_loss, draw_batch=draw_batch,
              train_config=config, run_dir=folder, header={"lr": config.lr},
              accelerator=Accelerator(cpu=True),
              export=lambda state, step: exported.update(
                  {k: v.clone() for k, v in state.items()}))
    except KeyboardInterrupt:
        pass
    return exported, module.state_dict(), read_metrics(folder / "metrics.jsonl")


def test_exported_weights_are_the_average_and_not_the_raw_ones(tmp_path):
    exported, raw, _ = run_training(tmp_path)
    differ = [(exported[name] - raw[name]).abs().max() for name in raw]
    assert min(differ) > 1e-5
    state = load_newest_checkpoint(tmp_path / "checkpoints")
    for name, value in exported.items():
        assert torch.equal(value, state["ema"][f"module.{name}"])
        assert torch.equal(raw[name], state["module"][name])


def test_resuming_gives_the_same_bits(tmp_path):
    whole, _, metrics = run_training(tmp_path / "whole")
    run_training(tmp_path / "parts", stop_at=6)  # the checkpoint of step 4 is what is left
    resumed, _, again = run_training(tmp_path / "parts")
    for name in whole:
        assert torch.equal(whole[name], resumed[name])
    assert [m["step"] for m in again] == [m["step"] for m in metrics] == list(range(1, 9))
    assert [m["loss"] for m in again] == [m["loss"] for m in metrics]


def test_a_finished_run_trains_no_more(tmp_path):
    first, *_ = run_training(tmp_path)
    again, *_ = run_training(tmp_path, stop_at=0)
    for name in first:
        assert torch.equal(first[name], again[name])


def test_accumulation_changes_nothing(tmp_path):
    _, _, whole = run_training(tmp_path / "a")
    _, _, parts = run_training(tmp_path / "b", replace(CONFIG, gradient_accumulation_steps=2))
    for one, other in zip(whole, parts):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_learning_rate_warms_up_and_falls(tmp_path):
    config = replace(CONFIG, num_steps=100, warmup_steps=9)
    lrs = [compute_lr(config, step) for step in range(100)]
    assert lrs[0] == pytest.approx(config.lr / 10) and max(lrs) == pytest.approx(config.lr)
    assert lrs.index(max(lrs)) == 9 and lrs[99] < 0.01 * config.lr
    assert compute_lr(replace(config, lr_schedule="constant"), 99) == config.lr
    *_, metrics = run_training(tmp_path)
    assert [m["lr"] for m in metrics] == [compute_lr(CONFIG, step) for step in range(8)]


def test_only_matrices_decay():
    module = nn.Sequential(nn.Linear(3, 5), nn.GroupNorm(1, 5), nn.Conv2d(5, 5, 3))
    decayed, others = split_weight_decay(module, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2, 4] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in others["params"]} == {1} and others["weight_decay"] == 0


@pytest.mark.parametrize("field, value", [("max_grad_norm", 1e-4), ("weight_decay", 5.0),
                                          ("adam_beta2", 0.5), ("seed", 1)])
def test_optimizer_settings_are_at_work(tmp_path, field, value):
    before, *_ = run_training(tmp_path / "a")
    after, *_ = run_training(tmp_path / "b", replace(CONFIG, **{field: value}))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_step_is_bounded_by_clipping(tmp_path):
    *_, metrics = run_training(
        tmp_path, compute_loss=lambda m, b, r: 1e6 * m(b["x"]).square().mean(1))
    assert metrics[0]["grad_norm"] > 1e3  # logged before it is clipped
    assert metrics[-1]["loss"] < 10 * metrics[0]["loss"]


def test_the_same_numbers_whatever_the_number_of_processes():
    whole = BatchRandom(0, 3, "noise", batch_size=8)
    ranks = [BatchRandom(0, 3, "noise", batch_size=8, rows=slice(4 * r, 4 * r + 4))
             for r in range(2)]
    for draw in (lambda r: r.randn(2), lambda r: r.randint(1000), lambda r: r.rand()):
        parts = [draw(rank) for rank in ranks]
        assert torch.equal(torch.cat(parts), draw(whole))
        assert not torch.equal(*parts)
    other_step = BatchRandom(0, 4, "noise", batch_size=8).randn(2)
    assert not torch.equal(other_step, BatchRandom(0, 3, "noise", batch_size=8).randn(2))
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_uneven_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match="--batch_size"):
        run_training(tmp_path, replace(CONFIG, gradient_accumulation_steps=3))


def test_another_runs_folder_is_refused_by_field(tmp_path):
    run_training(tmp_path)
    with pytest.raises(UserError, match="lr: 0.01 before, 0.02 now"):
        run_training(tmp_path, replace(CONFIG, lr=0.02))
    check_same_run({"train": {"num_steps": 5}}, {"train": {"num_steps": 9}}, tmp_path)


def test_a_write_that_dies_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "x"
    replace_file(path, lambda part: part.write_text("good"))

    def die(part):
        part.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError):
        replace_file(path, die)
    assert path.read_text() == "good"


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002.pt", "step_00000003.pt"]
    newest = tmp_path / "step_00000003.pt"
    newest.write_bytes(newest.read_bytes()[:40])
    assert load_newest_checkpoint(tmp_path) == {"step": 2}
    assert "damaged" in capsys.readouterr().out


def test_metrics_of_a_run_that_was_cut_off_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + '\n{"ste')
    MetricsLog(path, step=1).write([{"step": 2, "loss": 3.0}])
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 3.0}]
