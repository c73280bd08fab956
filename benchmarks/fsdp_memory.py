"""What a process keeps between two steps, with the whole network and with its share (--fsdp): GiB
of weights, average and optimizer state, as the system counts them, for the prior of a preset.

    python -m benchmarks.fsdp_memory --preset base --processes 2
"""

import argparse
import copy
import ctypes
import gc
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from dalle2.config import PRESETS
from dalle2.models import build_prior, list_blocks
from dalle2.optimizer import build_optimizers
from dalle2.sharding import shard
from dalle2.train_state import update_average

warnings.filterwarnings("ignore")

EMBED_DIM, BATCH_SIZE = 768, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    print("| way | process | GiB |\n|---|---|---|", flush=True)
    for is_shared in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            spawn(train_twice, (args, is_shared, f"file://{folder}/meet"), nprocs=args.processes)


def train_twice(rank, args, is_shared, meet):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=args.processes)
    before, config = read_memory(), PRESETS[args.preset].prior
    module = build_prior(config, EMBED_DIM)
    average = copy.deepcopy(module).requires_grad_(False)
    if is_shared:
        for network in (module, average):
            shard(network, list_blocks(network), torch.device("cpu"))
    model = module if is_shared else DistributedDataParallel(module)
    optimizers = build_optimizers(module, config.train)
    image_embed = torch.randn(BATCH_SIZE, EMBED_DIM)
    text = dict(text_embed=image_embed, text_cond_drop_prob=torch.zeros(BATCH_SIZE),
                text_encodings=torch.randn(BATCH_SIZE, config.max_text_len, EMBED_DIM))
    for _ in range(2):
        model(image_embed, torch.zeros(BATCH_SIZE).long(), **text).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, module, config.train.ema_decay)
    gc.collect()
    print(f"| {'shared out' if is_shared else 'whole'} | {rank} | {read_memory() - before:.2f} |",
          flush=True)
    dist.barrier()
    dist.destroy_process_group()


def read_memory():
    """Resident GiB of this process, after what malloc holds back has been returned."""
    ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2 ** 20


if __name__ == "__main__":
    main()
