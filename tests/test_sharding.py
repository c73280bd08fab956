"""Networks shared out among processes: how much each holds, and what is gathered again.
tests/test_processes.py trains them."""

import pytest
import torch
from helpers import TOY, run_in_processes

from dalle2.config import PRESETS
from dalle2.models import build_prior, build_unet, list_blocks
from dalle2.sharding import gather_state, load_module, shard

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


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_two_processes_hold_half_each_and_gather_the_whole(name, tmp_path):
    run_in_processes(check_share, tmp_path, name)


def check_share(rank, folder, name):
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


def list_different(wanted, found):
    return [name for name, value in wanted.items() if not torch.equal(value, found[name])]


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)
