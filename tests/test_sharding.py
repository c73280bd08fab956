"""Networks shared out among processes: how much each holds, and what is gathered again.
tests/test_processes.py trains them."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from dalle2.config import PRESETS
from dalle2.models import build_prior, build_unet, list_blocks
from dalle2.sharding import gather_state, load_module, shard

TOY = PRESETS["toy"]
PATIENCE = 600  # seconds for two processes to import torch, meet and finish on a busy machine
BUILD = {"prior": lambda preset: build_prior(preset.prior, 768),
         "unet1": lambda preset: build_unet(preset.decoder.unets[0], 1, 768),
         "unet2": lambda preset: build_unet(preset.decoder.unets[1], 2, 768)}


@pytest.mark.parametrize("name", BUILD)
def test_most_weights_are_gathered_block_by_block(name):
    with torch.device("meta"):
        network = BUILD[name](PRESETS["base"])
    sizes = [count(block.parameters()) for block in list_blocks(network)]
    assert sum(sizes) > (0.75 if name == "prior" else 0.95) * count(network.parameters())
    assert max(sizes) < 0.15 * count(network.parameters())


@pytest.mark.parametrize("name", BUILD)
def test_two_processes_hold_half_each_and_gather_the_whole(name, tmp_path):
    end = time.monotonic() + PATIENCE
    running = multiprocessing.spawn(check_share, (name, f"file://{tmp_path}/meet"), nprocs=2,
                                    join=False)
    try:
        while not running.join(timeout=1):  # it raises what a process raises
            assert time.monotonic() < end, f"the two processes have not ended in {PATIENCE} s"
    finally:
        for process in running.processes:
            process.kill()


def check_share(rank, name, meet):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2,
                            timeout=timedelta(seconds=PATIENCE))
    try:
        torch.manual_seed(0)
        network = BUILD[name](TOY)
        whole, held = network.state_dict(), count(network.parameters())
        whole = {key: value.clone() for key, value in whole.items()}
        shard(network, list_blocks(network), torch.device("cpu"))
        share = count(param.to_local() for param in network.parameters()) / held
        assert 0.47 < share < 0.53, share
        gathered = gather_state(network.state_dict())
        assert list_different(whole, gathered) == []
        doubled = {key: 2 * value for key, value in whole.items()}
        load_module(network, doubled)
        gathered = gather_state({"nested": [network.state_dict()]})["nested"][0]
        assert list_different(doubled, gathered) == []
        dist.barrier()  # nobody leaves while the other still gathers
    finally:
        dist.destroy_process_group()


def list_different(wanted, found):
    return [name for name, value in wanted.items() if not torch.equal(value, found[name])]


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)
