"""Speed of preparing and reading photos: torchvision's data loader against our store.

The plain loader is torchvision's CocoCaptions with PIL, Resize, CenterCrop and ToTensor; it decodes
every photo in every epoch. This project decodes every photo once and then reads its store.
The variants take turns in every round. Also measures how fast captions are tokenized and text
encodings are computed, or read from a store. Prints Markdown tables.

    python -m benchmarks.data_speed --img_path photos --annot_path captions.json
"""

import json
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

from benchmarks.common import (
    add_photo_flags,
    compute_medians,
    print_header,
    print_row,
    time_in_turns,
)
from dalle2 import cli
from dalle2.captions import load_captions
from dalle2.clip import FrozenClip
from dalle2.config import PRESETS
from dalle2.data import Store
from dalle2.images import load_image
from dalle2.prepare import prepare_store

PLAIN_TRANSFORM = v2.Compose([v2.Resize(256), v2.CenterCrop(256), v2.ToImage(),
                              v2.ToDtype(torch.float32, scale=True)])
FILTERS = {"bicubic": v2.InterpolationMode.BICUBIC, "Lanczos": v2.InterpolationMode.LANCZOS}
NUM_EPOCHS = 20      # read from the store in one round
NUM_ENCODED = 128    # captions that the text tower embeds


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    add_photo_flags(parser)
    parser.add_argument("--caption_path", help="captions to tokenize, a COCO captions file whose "
                        "pictures are not needed (None: those of --annot_path)")
    parser.add_argument("--repeats", type=cli.at_least(1), default=5,
                        help="number of rounds; medians are printed")
    parser.add_argument("--batch_size", type=cli.at_least(1), default=64)
    return parser.parse_args()


def main():
    args = parse_args()
    records = load_captions(args.annot_path, args.img_path)
    measure_photos(args, records)
    measure_captions(args.caption_path or args.annot_path)


def measure_photos(args, records):
    plain = CocoCaptions(args.img_path, args.annot_path, transform=PLAIN_TRANSFORM)
    loader = DataLoader(plain, args.batch_size, shuffle=True, num_workers=torch.get_num_threads(),
                        collate_fn=lambda rows: torch.stack([image for image, _ in rows]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = prepare_store(args.img_path, args.annot_path, folder, progress=False)
        small = store.load_small_images(64)
        order = np.random.default_rng(0).permutation(len(store) * NUM_EPOCHS) % len(store)

        def read(images):
            for start in range(0, len(order), args.batch_size):
                torch.from_numpy(images[order[start:start + args.batch_size]])

        functions = {
            "plain, one core": lambda: [plain[i] for i in range(len(plain))],
            "prepared here, one core": lambda: [load_image(record.path) for record in records],
            "plain loader": lambda: list(loader),
            "read from the store, 256 px": lambda: read(store.images),
            "read from the store, 64 px": lambda: read(small)}
        seconds = compute_medians(time_in_turns(functions, args.repeats, warm_up=False))
        differences = {name: np.mean([np.abs(store.images[i].astype(float) - resize(record, filter))
                                      .mean() for i, record in enumerate(records)])
                       for name, filter in FILTERS.items()}
    counts = [len(plain), len(records), len(plain), len(order), len(order)]
    rates = {name: count / seconds[name] for name, count in zip(functions, counts)}
    print(f"{len(records)} photos, {sum(len(r.captions) for r in records)} captions, medians of "
          f"{args.repeats} rounds\n")
    print_header("", "pictures a second", "ratio")
    for name, rate in rates.items():
        baseline = "plain, one core" if "one core" in name else "plain loader"
        print_row(name, f"{rate:.0f}", f"{rate / rates[baseline]:.1f}")
    print("\nmean difference of a pixel from PIL's: " + ", ".join(
        f"{name} {value:.2f} of 255" for name, value in differences.items()))


def resize(record, filter):
    """A photo resized by PIL with `filter`, (3, 256, 256)."""
    with Image.open(record.path) as image:
        image = v2.functional.resize(image.convert("RGB"), 256, filter)
    return np.asarray(v2.functional.center_crop(image, 256)).transpose(2, 0, 1)


def measure_captions(path):
    """Speed of tokenizing, and of text encodings read from a store or computed at every step."""
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
    print()
    print_header("text encodings, ViT-L/14, one core", "captions a second")
    rows = lengths[:NUM_ENCODED].argsort()
    for name, is_causal in (("computed at all 77 positions", False),
                            ("computed at their true length", True)):
        clip.is_causal = is_causal
        (seconds,) = time_in_turns(
            {name: lambda: [clip.embed_text(text_tokens[part]) for part in rows.split(16)]},
            rounds=1, warm_up=False)[name]
        print_row(name, f"{len(rows) / seconds:.0f}")
    print_row("read from the store", f"{measure_encodings_read(lengths, clip.embed_dim):.0f}")


def measure_encodings_read(lengths, embed_dim, num_read=4096):
    """Captions a second whose text encodings are read from a store; lengths (M,): tokens."""
    with tempfile.NamedTemporaryFile() as file:
        token_start = np.concatenate([[0], lengths.cumsum(0).numpy()])
        np.save(file, np.zeros((token_start[-1], embed_dim), np.float16))
        store = SimpleNamespace(token_start=token_start,
                                text_encodings=np.load(file.name, mmap_mode="r"))
        order = np.random.default_rng(0).permutation(len(lengths))[:num_read]
        parts = np.array_split(order, 64)
        seconds = compute_medians(time_in_turns(
            {"read": lambda: [Store.load_text_encodings(store, part, 48) for part in parts]},
            rounds=5, warm_up=False))
    return len(order) / seconds["read"]


if __name__ == "__main__":
    cli.run(main)
