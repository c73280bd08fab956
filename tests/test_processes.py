"""Training in processes of their own: killed and continued, and shared by two."""

import contextlib
import os
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers import ROOT, TOY, build_network, run_in_processes
from safetensors.torch import load_file

from dalle2.logger import read_metrics
from dalle2.models import list_blocks
from dalle2.sharding import CAN_SHARD_ON_CPU, gather_state, load_module, shard

pytestmark = pytest.mark.slow


def start(script, folder, data_flags, clip_path, *flags, processes=1):
    """train_<script>.py in processes of its own, 4 rows a batch; later flags win."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
              str(processes)] if processes > 1 else []  # what accelerate launch starts for GPUs
    clip = [] if script == "clip" else ["--clip_pretrained", clip_path]
    return subprocess.Popen(
        [sys.executable, *launch, f"train_{script}.py", "--preset", "toy", "--output_dir", folder,
         "--log_with", "none", "--batch_size", "4", *data_flags, *clip, *map(str, flags)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process):
    try:
        out = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, out[-3000:]
    return out


def kill(process):
    """SIGKILL to it and all that it started: what torchrun starts is in sessions of its own."""
    family = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += psutil.Process(process.pid).children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def read_log(folder):
    (path,) = folder.rglob("metrics.jsonl")
    return read_metrics(path)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(processes, tmp_path, data_flags,
                                                                clip_path):
    def begin(folder):
        return start("prior", tmp_path / folder, data_flags, clip_path, "--num_steps", 12,
                     "--save_every", 2, "--validate_every", 6, processes=processes)
    finish(begin("whole"))
    moments, kills = random.Random(processes), 0
    for _ in range(2):
        process = begin("killed")
        deadline = time.time() + 60
        before = set((tmp_path / "killed").rglob("step_*.pt"))
        while not set((tmp_path / "killed").rglob("step_*.pt")) - before \
                and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        kills += process.poll() is None
        kill(process)
    assert kills
    finish(begin("killed"))
    weights = [load_file(tmp_path / run / "prior.safetensors") for run in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    whole, killed = read_log(tmp_path / "whole"), read_log(tmp_path / "killed")
    assert [row["step"] for row in killed] == list(range(1, 13))
    assert [row["loss"] for row in whole] == [row["loss"] for row in killed]


def test_two_processes_train_a_clip(tmp_path, data_flags, clip_path):
    """Contrasting all their pairs. The losses differ a little from one process's: on a CPU the
    statistics of batch norm are those of a process."""
    for processes in (1, 2):
        finish(start("clip", tmp_path / f"{processes}", data_flags, clip_path, "--num_steps", 4,
                     "--batch_size", 16, "--validate_every", 2, processes=processes))
    one, two = read_log(tmp_path / "1"), read_log(tmp_path / "2")
    assert [row["step"] for row in two if "val_loss" in row] == [2, 4]
    for row, other in zip(one, two, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.1)


@pytest.mark.skipif(not CAN_SHARD_ON_CPU, reason="refused with this torch")
def test_a_network_shared_out_trains_as_a_whole_one(tmp_path, data_flags, clip_path):
    """Six steps of two processes with --fsdp equal six of one, and the last three of either in the
    other's place do."""
    def run(folder, processes):
        out = finish(start("decoder", tmp_path / folder, data_flags, clip_path, "--unet_number", 2,
                           "--num_steps", 6, "--save_every", 3, "--validate_every", 2, "--fsdp",
                           "--mixed_precision", "no", processes=processes))
        assert ("weights sharded" in out) == (processes == 2)
        return read_log(tmp_path / folder)
    whole = run("one", 1)
    runs = [run("two", 2)]
    for folder, processes in (("one", 2), ("two", 1)):
        (newest,) = (tmp_path / folder).rglob("step_00000006.pt")
        newest.unlink()
        runs.append(run(folder, processes))
    for rows in runs:
        for row, other in zip(whole, rows, strict=True):
            assert row.keys() == other.keys()
            for value in {"loss", "grad_norm", "val_loss", "val_loss_raw"} & row.keys():
                assert row[value] == pytest.approx(other[value], rel=1e-3), (value, row["step"])


@pytest.mark.parametrize("name", ["prior", "unet1", "unet2"])
def test_two_processes_hold_half_each_and_gather_the_whole(name, tmp_path):
    run_in_processes(check_share, tmp_path, name)


def check_share(rank, folder, name):
    torch.manual_seed(0)
    network = build_network(TOY, name)
    whole = {key: value.clone() for key, value in network.state_dict().items()}
    held = sum(param.numel() for param in network.parameters())
    shard(network, list_blocks(network), torch.device("cpu"))
    share = sum(param.to_local().numel() for param in network.parameters()) / held
    assert 0.47 < share < 0.53, share
    gathered = gather_state(network.state_dict())
    assert all(torch.equal(value, gathered[key]) for key, value in whole.items())
    load_module(network, {key: 2 * value for key, value in whole.items()})
    gathered = gather_state({"nested": [network.state_dict()]})["nested"][0]
    assert all(torch.equal(2 * value, gathered[key]) for key, value in whole.items())
