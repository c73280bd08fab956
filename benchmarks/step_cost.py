"""What a training step costs as the batch and the data set grow: it should be linear in the one and
not depend on the other.

Steps of the toy preset's prior and base stage on prepared stores of 1,000 and 100,000 pictures
(sparse files of zeros; five captions of 13 tokens each), drawing the batch included.

    python benchmarks/step_cost.py
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dalle2.cli import build_accelerator  # noqa: E402
from dalle2.config import PRESETS  # noqa: E402
from dalle2.data import Store, draw_indexes  # noqa: E402
from dalle2.diffusion import Diffusion, build_diffusion  # noqa: E402
from dalle2.losses import compute_prior_loss, compute_unet_loss  # noqa: E402
from dalle2.models import build_prior, build_unet  # noqa: E402
from dalle2.rng import BatchRandom  # noqa: E402
from dalle2.train_loop import TrainState  # noqa: E402

DIM, TOKENS, SIDE = 128, 13, 32
BATCH_SIZES = 16, 32, 64, 128
STORES = 1_000, 100_000
ROUNDS = 7


def build_store(folder, count):
    """A Store of `count` pictures with embeddings, and its pictures of SIDE pixels."""
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
    return Store(folder, folder), small


def build_step(name, store, pictures, batch_size):
    """A function that takes one training step, its batch drawn from the store."""
    preset, accelerator = PRESETS["toy"], build_accelerator("no")
    if name == "prior":
        config, module = preset.prior, build_prior(preset.prior, DIM)
        diffusion = Diffusion(config.timesteps, predict_x_start=True)
        compute_loss = partial(compute_prior_loss, config=config, diffusion=diffusion)
    else:
        config = preset.decoder.unets[0]
        module = build_unet(config, 1, DIM)
        compute_loss = partial(compute_unet_loss, config=config,
                               diffusion=build_diffusion(config, "cpu"))
    train = replace(config.train, batch_size=batch_size)
    state = TrainState(module, train, accelerator)

    def draw_batch(step):
        random = BatchRandom(step, batch_size=batch_size)
        indexes = draw_indexes(len(store), 0, step, batch_size)
        embeds = {"image_embed": torch.from_numpy(store.image_embed[indexes])}
        if name != "prior":
            return embeds | {"image": torch.from_numpy(pictures[indexes])}
        rows = store.draw_captions(indexes, random.rand())
        return embeds | {"text_embed": torch.from_numpy(store.text_embed[rows]),
                         "text_encodings": store.load_text_encodings(rows, config.max_text_len)}
    steps = iter(range(1 << 30))

    def take_step():
        step = next(steps)
        state.compute_gradients(step, draw_batch(step), compute_loss)
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
            steps = {(count, b): build_step(name, *stores[count], b)
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
