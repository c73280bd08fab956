"""How many samples a second the reader delivers to a training, against what a fast GPU would eat.

The reader is what draws the batches in training: `Task.draw` of the prior, of the first stage and
of the upsampler of a preset, from a prepared store of uint8 or of JPEG pictures (one thread draws,
a thread a core decodes JPEG files). The appetite is that of a GPU that computes 400 TFLOP/s: three
forwards a sample. Photos in COCO captions format; embeddings as wide as ViT-L/14's are made up.

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

from benchmarks.preset_costs import list_networks
from dalle2 import cli
from dalle2.config import PRESETS
from dalle2.data import Store
from dalle2.prepare import prepare_store
from dalle2.rng import BatchRandom
from dalle2.tasks import PriorTask, UnetTask

GPU_RATE = 400e12  # FLOP/s that the networks reach
DIM, TOKENS = 768, 14
CORES = 2, 8


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--img_path", required=True, help="picture folder")
    parser.add_argument("--annot_path", required=True, help="COCO captions file")
    parser.add_argument("--preset", default="base", choices=list(PRESETS))
    parser.add_argument("--max_images", type=cli.at_least(8), default=2000)
    parser.add_argument("--rounds", type=cli.at_least(1), default=5, help="batches a figure")
    args = parser.parse_args()
    appetites = [GPU_RATE / (3 * flops) for _, _, _, flops, *_ in list_networks(args.preset)]
    torch.set_num_threads(1)  # of what draws; decoding has threads of its own
    print(f"preset {args.preset}, medians of {args.rounds} batches\n\n| store | network | µs a "
          f"sample to draw | to decode | samples a second on {CORES[0]} cores | on {CORES[1]} "
          f"| a GPU of 400 TFLOP/s | ratio on {CORES[1]} |\n" + "|---" * 8 + "|")
    for image_format in ("uint8", "jpeg"):
        with tempfile.TemporaryDirectory() as folder:
            store = build_store(args, image_format, Path(folder))
            for task, appetite in zip(build_tasks(args.preset, store), appetites):
                drawing, decoding = measure_seconds(task, args.rounds)
                rates = [1 / (drawing + decoding / cores) for cores in CORES]
                name = f"unet {task.unet_number}" if isinstance(task, UnetTask) else "prior"
                print(f"| {image_format} | {name} | {1e6 * drawing:.1f} | {1e6 * decoding:.1f} | "
                      f"{rates[0]:,.0f} | {rates[1]:,.0f} | {appetite:,.0f} | "
                      f"{rates[1] / appetite:.1f} |", flush=True)


def build_store(args, image_format, folder):
    """A Store of the photos with random embeddings."""
    store = prepare_store(args.img_path, args.annot_path, folder / "store", progress=False,
                          max_images=args.max_images, image_format=image_format)
    captions = sum(map(len, store.captions))
    random = np.random.default_rng(0)
    for name, shape in {"image_embed": (len(store), DIM), "text_embed": (captions, DIM),
                        "text_encodings": (captions * TOKENS, DIM)}.items():
        embeds = random.standard_normal(shape, np.float32)
        np.save(folder / f"{name}.npy", embeds.astype(np.float16))
    np.save(folder / "text_tokens.npy", np.zeros((captions, 77), np.uint16))
    np.save(folder / "token_start.npy", np.arange(captions + 1) * TOKENS)
    return Store(store.folder, folder)


def build_tasks(preset, store):
    accelerator, preset = Accelerator(cpu=True), PRESETS[preset]
    return [PriorTask(preset.prior, accelerator, store),
            *(UnetTask(number, preset.decoder, accelerator, store)
              for number in range(1, len(preset.decoder.unets) + 1))]


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
