"""Power-function averages: their profile, snapshots, and other lengths put together from these."""


import pytest
import torch

from dalle2.ema import PowerAverages, save_snapshot
from dalle2.tools.averages import list_snapshots, solve_weights, synthesize

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
