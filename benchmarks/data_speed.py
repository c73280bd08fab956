"""Preparation and reading of photos, ours against the plain way, interleaved in one run.

    python -m benchmarks.data_speed --img_path photos --annot_path captions.json

The plain way: torchvision's CocoCaptions, PIL, Resize, CenterCrop and ToTensor in a DataLoader, at
every epoch. Ours: every photo once into the store, then read from it. Prints a Markdown table.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoCaptions
from torchvision.transforms import v2

from dalle2 import cli
from dalle2.clip import FrozenClip
from dalle2.config import PRESETS
from dalle2.data import Store, load_captions
from dalle2.images import load_image
from dalle2.prepare import prepare_store

PLAIN = v2.Compose([v2.Resize(256), v2.CenterCrop(256), v2.ToImage(),
                    v2.ToDtype(torch.float32, scale=True)])


NUM_ENCODED = 128  # captions that the text tower embeds


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--img_path", required=True, help="picture folder")
    parser.add_argument("--annot_path", required=True, help="COCO captions file")
    parser.add_argument("--caption_path", help="a COCO captions file without pictures, to tokenize")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--batch_size", type=int, default=64)
    return parser.parse_args()


def time_rate(function, count):
    start = time.perf_counter()
    function()
    return count / (time.perf_counter() - start)


def main():
    args = parse_args()
    records = load_captions(args.annot_path, args.img_path)
    plain = CocoCaptions(args.img_path, args.annot_path, transform=PLAIN)
    loader = DataLoader(plain, args.batch_size, shuffle=True, num_workers=torch.get_num_threads(),
                        collate_fn=lambda rows: torch.stack([image for image, _ in rows]))
    torch.set_num_threads(1)
    rates = {name: [] for name in ("plain, one core", "ours, one core", "plain loader",
                                   "ours, 256 px", "ours, 64 px")}
    with tempfile.TemporaryDirectory() as folder:
        store = prepare_store(args.img_path, args.annot_path, folder, progress=False)
        small = store.load_small_images(64)
        order = np.random.default_rng(0).permutation(len(store) * 20) % len(store)

        def read(images):
            for start in range(0, len(order), args.batch_size):
                torch.from_numpy(images[order[start:start + args.batch_size]])

        for _ in range(args.repeats):
            rates["plain, one core"].append(time_rate(
                lambda: [plain[i] for i in range(len(plain))], len(plain)))
            rates["ours, one core"].append(time_rate(
                lambda: [load_image(record.path) for record in records], len(records)))
            rates["plain loader"].append(time_rate(lambda: list(loader), len(plain)))
            rates["ours, 256 px"].append(time_rate(lambda: read(store.images), len(order)))
            rates["ours, 64 px"].append(time_rate(lambda: read(small), len(order)))
        difference = {name: np.mean([np.abs(store.images[i].astype(float) - resize(record, filter))
                                     .mean() for i, record in enumerate(records)])
                      for name, filter in (("bicubic", Image.BICUBIC), ("Lanczos", Image.LANCZOS))}
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{len(records)} photos, {sum(len(r.captions) for r in records)} captions, medians of "
          f"{args.repeats} rounds\n\n| | pictures a second | ratio |\n|---|---|---|")
    for name, against in (("plain, one core", "plain, one core"),
                          ("ours, one core", "plain, one core"), ("plain loader", "plain loader"),
                          ("ours, 256 px", "plain loader"), ("ours, 64 px", "plain loader")):
        print(f"| {name} | {median[name]:.0f} | {median[name] / median[against]:.1f} |")
    print("\nmean difference of a pixel to PIL: " + ", ".join(
        f"{name} {value:.2f} of 255" for name, value in difference.items()))
    measure_captions(args.caption_path or args.annot_path)


def resize(record, filter):
    """A photo by PIL's `filter`, (3, 256, 256)."""
    with Image.open(record.path) as image:
        image = v2.functional.resize(image.convert("RGB"), 256, {
            Image.BICUBIC: v2.InterpolationMode.BICUBIC,
            Image.LANCZOS: v2.InterpolationMode.LANCZOS}[filter])
    return np.asarray(v2.functional.center_crop(image, 256)).transpose(2, 0, 1)


def measure_captions(path):
    """Tokenizing, and text encodings read from a store against computed at every step."""
    captions = [a["caption"] for a in json.loads(Path(path).read_text())["annotations"]]
    model = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None)
    clip = FrozenClip(model, open_clip.get_tokenizer("ViT-L-14-quickgelu"))
    start = time.perf_counter()
    text_tokens = clip.tokenize(captions)
    seconds = time.perf_counter() - start
    lengths = clip.compute_text_mask(text_tokens).sum(1)
    longer = {name: 100 * (lengths > preset.prior.max_text_len).float().mean().item()
              for name, preset in PRESETS.items()}
    print(f"\n{len(captions)} captions tokenized in {seconds:.1f} s: {lengths.float().mean():.1f} "
          f"tokens on average, {lengths.max()} at most; longer than the prior's max_text_len: "
          + ", ".join(f"{name} {share:.2f} %" for name, share in longer.items()))

    rows = lengths[:NUM_ENCODED].argsort()
    rates = {}
    clip.is_causal = False
    rates["computed at all 77 positions"] = time_rate(
        lambda: [clip.embed_text(text_tokens[part]) for part in rows.split(16)], len(rows))
    clip.is_causal = True
    rates["computed at their true length"] = time_rate(
        lambda: [clip.embed_text(text_tokens[part]) for part in rows.split(16)], len(rows))
    with tempfile.NamedTemporaryFile() as file:
        token_start = np.concatenate([[0], lengths.cumsum(0).numpy()])
        np.save(file, np.zeros((token_start[-1], clip.embed_dim), np.float16))
        store = SimpleNamespace(token_start=token_start,
                                text_encodings=np.load(file.name, mmap_mode="r"))
        order = np.random.default_rng(0).permutation(len(captions))[:4096]
        rates["read from the store"] = statistics.median(time_rate(
            lambda: [Store.load_text_encodings(store, part, 48) for part in np.split(order, 64)],
            len(order)) for _ in range(5))
    print("\n| text encodings, ViT-L/14, one core | captions a second |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")


if __name__ == "__main__":
    main()
