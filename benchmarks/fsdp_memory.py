"""Memory that each process keeps between two training steps, with and without --fsdp.

Prints the GiB that the operating system counts for weights, averaged weights and optimizer state of
the prior of a preset: with the whole network in every process, and with the network sharded among
the processes.

    python -m benchmarks.fsdp_memory --preset base --processes 2
"""

import copy
import ctypes
import gc
import tempfile

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import get_embed_dim, print_header, print_row
from dalle2 import cli
from dalle2.config import PRESETS
from dalle2.models import build_prior, list_blocks
from dalle2.optimizer import build_optimizers
from dalle2.sharding import shard
from dalle2.train_state import update_average

BATCH_SIZE = 2


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--processes", type=cli.at_least(1), default=2, help="number of processes")
    args = parser.parse_args()
    print_header("network", "process", "GiB")
    for is_sharded in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            spawn(train_two_steps, (args, is_sharded, f"file://{folder}/rendezvous"),
                  nprocs=args.processes)


def train_two_steps(rank, args, is_sharded, init_method):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=args.processes)
    before, config = read_memory(), PRESETS[args.preset].prior
    embed_dim = get_embed_dim(args.preset)
    module = build_prior(config, embed_dim)
    average = copy.deepcopy(module).requires_grad_(False)
    if is_sharded:
        for network in (module, average):
            shard(network, list_blocks(network), torch.device("cpu"))
    model = module if is_sharded else DistributedDataParallel(module)
    optimizers = build_optimizers(module, config.train)
    image_embed = torch.randn(BATCH_SIZE, embed_dim)
    text = dict(text_embed=image_embed, text_cond_drop_prob=torch.zeros(BATCH_SIZE),
                text_encodings=torch.randn(BATCH_SIZE, config.max_text_len, embed_dim))
    for _ in range(2):
        model(image_embed, torch.zeros(BATCH_SIZE).long(), **text).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, module, config.train.ema_decay)
    gc.collect()
    print_row("sharded" if is_sharded else "whole", rank, f"{read_memory() - before:.2f}")
    dist.barrier()
    dist.destroy_process_group()


def read_memory():
    """Resident GiB of this process, after malloc has returned its free memory to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2 ** 20


if __name__ == "__main__":
    cli.run(main)
