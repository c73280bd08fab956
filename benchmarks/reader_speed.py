"""How many samples a second the data reader delivers, against how many a fast GPU computes.

The reader is what draws the batches in training: `Task.draw` of the prior, of the first decoder
stage and of the upsampler of a preset, from a prepared store of uint8 or of JPEG pictures (one
thread draws; one thread a core decodes JPEG files). The GPU is assumed to compute 400 TFLOP/s, and
a training step to cost three forward passes a sample. The photos are read from disk; the
embeddings, as wide as those of ViT-L/14, are random numbers.

Measured is processor time, which other work on the machine does not change much: that of the thread
that draws, and that of the threads that decode, which more cores share.

    python -m benchmarks.reader_speed --img_path photos --annot_path captions.json
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.common import add_photo_flags, print_header, print_row, save_random_embeds
from benchmarks.preset_costs import list_networks
from dalle2 import cli
from dalle2.config import PRESETS
from dalle2.data import Store
from dalle2.prepare import prepare_store
from dalle2.rng import BatchRandom
from dalle2.tasks import PriorTask, UnetTask

GPU_RATE = 400e12     # FLOP/s that the networks reach
EMBED_DIM = 768       # of ViT-L/14
CAPTION_TOKENS = 14   # the mean of COCO, rounded up
CORES = 2, 8


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    add_photo_flags(parser)
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--max_images", type=cli.at_least(8), default=2000,
                        help="number of photos, the first ones of the file")
    parser.add_argument("--rounds", type=cli.at_least(1), default=5,
                        help="batches drawn; medians are printed")
    args = parser.parse_args()
    gpu_rates = [GPU_RATE / (3 * flops) for _, _, _, flops, *_ in list_networks(args.preset)]
    torch.set_num_threads(1)  # of what draws; decoding has threads of its own
    print(f"preset {args.preset}, medians of {args.rounds} batches\n")
    print_header("store", "network", "µs a sample to draw", "to decode",
                 f"samples a second on {CORES[0]} cores", f"on {CORES[1]}",
                 "a GPU of 400 TFLOP/s", f"ratio on {CORES[1]}")
    for image_format in ("uint8", "jpeg"):
        with tempfile.TemporaryDirectory() as folder:
            store = build_store(args, image_format, Path(folder))
            for task, gpu_rate in zip(build_tasks(args.preset, store), gpu_rates):
                drawing, decoding = measure_seconds(task, args.rounds)
                rates = [1 / (drawing + decoding / cores) for cores in CORES]
                name = f"unet {task.unet_number}" if isinstance(task, UnetTask) else "prior"
                print_row(image_format, name, f"{1e6 * drawing:.1f}", f"{1e6 * decoding:.1f}",
                          *(f"{rate:,.0f}" for rate in rates), f"{gpu_rate:,.0f}",
                          f"{rates[1] / gpu_rate:.1f}")


def build_store(args, image_format, folder):
    """A Store of the photos with random embeddings."""
    store = prepare_store(args.img_path, args.annot_path, folder / "store", progress=False,
                          max_images=args.max_images, image_format=image_format)
    save_random_embeds(folder, len(store), int(store.caption_start[-1]), EMBED_DIM,
                       CAPTION_TOKENS, random=np.random.default_rng(0))
    return Store(store.folders, folder)


def build_tasks(preset_name, store):
    accelerator, preset = Accelerator(cpu=True), PRESETS[preset_name]
    return [PriorTask(preset.prior, accelerator, store),
            *(UnetTask(unet_number, preset.decoder, accelerator, store)
              for unet_number in range(1, len(preset.decoder.unets) + 1))]


def measure_seconds(task, rounds):
    """(seconds a sample of the thread that draws, of all that decode), of processor time, of whole
    batches of the task's own size; the first is not counted."""
    batch_size, seconds = task.config.train.batch_size, []
    for step in range(rounds + 1):
        random = BatchRandom(step, batch_size=batch_size)
        own, every = time.thread_time(), time.process_time()
        task.draw(step, slice(None), random)
        own, every = time.thread_time() - own, time.process_time() - every
        seconds.append((own / batch_size, max(0.0, every - own) / batch_size))
    return tuple(map(statistics.median, zip(*seconds[1:])))


if __name__ == "__main__":
    cli.run(main)
