"""How the time of a training step depends on the batch size and on the size of the data set.

Takes steps of the prior and of the base stage of preset toy, drawing the batch included, from
prepared stores of 1,000 and of 100,000 pictures (sparse files of zeros; five captions of 13 tokens
for each picture). The time should be linear in the batch size and independent of the data set.

    python -m benchmarks.step_cost
"""

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import (
    compute_medians,
    describe_machine,
    get_embed_dim,
    print_header,
    print_row,
    save_random_embeds,
    time_in_turns,
)
from dalle2 import cli
from dalle2.captions import CaptionedImage
from dalle2.config import PRESETS
from dalle2.data import Store
from dalle2.models import build_prior, build_unet
from dalle2.prepare import save_records
from dalle2.rng import BatchRandom
from dalle2.tasks import PriorTask, UnetTask
from dalle2.train_state import TrainState

PRESET, EMBED_DIM = PRESETS["toy"], get_embed_dim("toy")
BATCH_SIZES = 16, 32, 64, 128
STORE_SIZES = 1_000, 100_000
CAPTION_TOKENS = 13  # the mean of COCO


class EmptyStore(Store):
    """A store whose small pictures are a sparse file too, instead of being made from the large."""

    def load_small_images(self, size):
        path = self.folders[0] / f"images-{size}.npy"
        if not path.exists():
            np.lib.format.open_memmap(path, "w+", np.uint8, (len(self), 3, size, size))
        return np.load(path, mmap_mode="r")


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=cli.at_least(1), default=7, help="medians of this many")
    args = parser.parse_args()
    print(f"{describe_machine()}, medians of {args.rounds}, ms a step (a sample)\n")
    print_header("network", "pictures", *(f"batch {size}" for size in BATCH_SIZES))
    with tempfile.TemporaryDirectory() as folder:
        stores = {count: build_store(Path(folder) / str(count), count) for count in STORE_SIZES}
        for name in ("prior", "base stage"):
            steps = {(count, batch_size): build_step(name, stores[count], batch_size)
                     for count in STORE_SIZES for batch_size in BATCH_SIZES}
            seconds = compute_medians(time_in_turns(steps, args.rounds))
            for count in STORE_SIZES:
                print_row(name, f"{count:,}", *(
                    f"{1e3 * seconds[count, batch_size]:.0f} "
                    f"({1e3 * seconds[count, batch_size] / batch_size:.2f})"
                    for batch_size in BATCH_SIZES))


def build_store(folder, count):
    """A store of `count` black pictures, with captions and embeddings."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "source.json").write_text(json.dumps({"annotations": "", "num_views": 1}))
    save_records(folder / "images", [(CaptionedImage(number, "", f"{number}.jpg", ["a"] * 5),
                                      [3 * 256 * 256]) for number in range(count)])
    with open(folder / "images" / "images.uint8", "wb") as file:
        file.truncate(count * 3 * 256 * 256)
    save_random_embeds(folder, count, 5 * count, EMBED_DIM, CAPTION_TOKENS, context_length=26)
    return EmptyStore([folder], "")


def build_step(name, store, batch_size):
    """A function that takes the next training step each time it is called."""
    accelerator = cli.build_accelerator("no")
    if name == "prior":
        config = set_batch_size(PRESET.prior, batch_size)
        module, task = build_prior(config, EMBED_DIM), PriorTask(config, accelerator, store)
    else:
        config = set_batch_size(PRESET.decoder.unets[0], batch_size)
        decoder = replace(PRESET.decoder, unets=(config, *PRESET.decoder.unets[1:]))
        module, task = build_unet(config, 1, EMBED_DIM), UnetTask(1, decoder, accelerator, store)
    state, steps = TrainState(module, config.train, accelerator), itertools.count()

    def take_step():
        step = next(steps)
        batch = task.draw(step, slice(None), BatchRandom(step, batch_size=batch_size))
        state.compute_gradients(step, batch, task.loss)
        state.update_weights(step, lr_factor=1.0)
    return take_step


def set_batch_size(config, batch_size):
    return replace(config, train=replace(config.train, batch_size=batch_size))


if __name__ == "__main__":
    cli.run(main)
