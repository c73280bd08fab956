"""What a training step costs as the batch and the data set grow: it should be linear in the one and
not depend on the other.

Steps of the toy preset's prior and base stage on prepared stores of 1,000 and 100,000 pictures
(sparse files of zeros; five captions of 13 tokens each), drawing the batch included.

    python -m benchmarks.step_cost
"""

import json
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dalle2.cli import build_accelerator  # noqa: E402
from dalle2.config import PRESETS, DecoderConfig  # noqa: E402
from dalle2.data import Store  # noqa: E402
from dalle2.models import build_prior, build_unet  # noqa: E402
from dalle2.rng import BatchRandom  # noqa: E402
from dalle2.tasks import PriorTask, UnetTask  # noqa: E402
from dalle2.train_state import TrainState  # noqa: E402

DIM, TOKENS, SIDE = 128, 13, 32
BATCH_SIZES = 16, 32, 64, 128
STORES = 1_000, 100_000
ROUNDS = 7


def build_store(folder, count):
    """A Store of `count` pictures of zeros with embeddings; those of SIDE pixels are there too."""
    (folder / "images").mkdir(parents=True)
    rows = [[number, f"{number}.jpg", ["a"] * 5] for number in range(count)]
    (folder / "images" / "source.json").write_text("{}")
    (folder / "images" / "images.json").write_text(json.dumps(rows))
    with open(folder / "images" / "images.uint8", "wb") as file:
        file.truncate(count * 3 * 256 * 256)
    for name, shape in {"image_embed": (count, DIM), "text_embed": (5 * count, DIM),
                        "text_encodings": (5 * count * TOKENS, DIM),
                        "text_tokens": (5 * count, 26)}.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
    np.save(folder / "token_start.npy", np.arange(0, 5 * count * TOKENS + 1, TOKENS))
    small = np.lib.format.open_memmap(folder / "small.npy", "w+", np.uint8, (count, 3, SIDE, SIDE))
    store = Store(folder, folder)
    store.load_small_images = lambda size: small
    return store


def build_step(name, store, batch_size):
    """A function that takes one training step, its batch drawn from the store."""
    preset, accelerator = PRESETS["toy"], build_accelerator("no")
    config = preset.prior if name == "prior" else preset.decoder.unets[0]
    config = replace(config, train=replace(config.train, batch_size=batch_size))
    if name == "prior":
        task, module = PriorTask(config, accelerator, store), build_prior(config, DIM)
    else:
        task = UnetTask(1, DecoderConfig(unets=(config,)), accelerator, store)
        module = build_unet(config, 1, DIM)
    state, steps = TrainState(module, config.train, accelerator), iter(range(1 << 30))

    def take_step():
        step = next(steps)
        random = BatchRandom(step, batch_size=batch_size)
        state.compute_gradients(step, task.draw(step, slice(None), random), task.loss)
        state.update_weights(step, 1.0)
    return take_step


def main():
    with tempfile.TemporaryDirectory() as folder:
        stores = {count: build_store(Path(folder) / str(count), count) for count in STORES}
        print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of "
              f"{ROUNDS}, ms a step (a sample)\n")
        print("| network | pictures | " + " | ".join(f"batch {b}" for b in BATCH_SIZES) + " |")
        print("|---" * (len(BATCH_SIZES) + 2) + "|")
        for name in ("prior", "base stage"):
            steps = {(count, b): build_step(name, stores[count], b)
                     for count in STORES for b in BATCH_SIZES}
            times = {key: [] for key in steps}
            for round_number in range(ROUNDS + 1):
                for key, step in steps.items():
                    start = time.perf_counter()
                    step()
                    if round_number:
                        times[key].append(time.perf_counter() - start)
            for count in STORES:
                found = [statistics.median(times[count, b]) * 1e3 for b in BATCH_SIZES]
                print(f"| {name} | {count:,} | " + " | ".join(
                    f"{ms:.0f} ({ms / b:.2f})" for ms, b in zip(found, BATCH_SIZES)) + " |")


if __name__ == "__main__":
    main()
