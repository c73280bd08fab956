"""Start-up time and memory of a training on millions of pictures.

Makes up a store of tars, 10,000 pictures with a caption each: the records are written, pixels and
embeddings are sparse files of zeros. Then runs a few steps of train_prior.py of preset toy on all
of it and on one shard, and prints processor time and the largest resident memory of each process.
Disk: about 100 bytes a picture, 0.9 GB for 8 million.

    python -m benchmarks.many_records
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import trange

from benchmarks.common import print_header, print_row, save_random_embeds
from dalle2 import cli
from dalle2.captions import CaptionedImage
from dalle2.checkpoint import save_export
from dalle2.clip import build_clip, load_clip
from dalle2.config import PRESETS, config_to_dict
from dalle2.prepare import save_records
from dalle2.shards import list_shards

IMAGES_A_TAR, CAPTION_TOKENS, STEPS = 10_000, 13, 2
PICTURE = 3 * 256 * 256  # bytes


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=cli.at_least(IMAGES_A_TAR), default=8_000_000)
    args = parser.parse_args()
    count = args.num_images // IMAGES_A_TAR
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clip = save_clip(folder / "clip.safetensors")
        for name, shards in (("one", 1), ("all", count)):
            build_store(folder, name, shards, clip)
        print_header("pictures", "processor seconds", "memory, GB")
        for name, shards in (("one", 1), ("all", count)):
            seconds, memory = run_training(folder, name)
            print_row(f"{shards * IMAGES_A_TAR:,}", f"{seconds:.1f}", f"{memory:.2f}")


def save_clip(path):
    """An untrained CLIP of preset toy, as train_clip.py exports one."""
    config = PRESETS["toy"].clip
    save_export(path, "clip", {"config": config_to_dict(config), "step": 0},
                build_clip(config).state_dict())
    return load_clip("", str(path))


def build_store(folder, name, count, clip):
    """`count` empty tars in <folder>/<name>, and the store that training looks for."""
    (folder / name).mkdir()
    for number in range(count):
        (folder / name / f"{number:05}.tar").touch()
    root, shards = list_shards(str(folder / name), "", folder / "store")
    captions = [CaptionedImage(number, "", f"{number:09}.jpg", (f"a photo of {number} things",))
                for number in range(IMAGES_A_TAR)]
    for number in trange(count, desc="making up a store", disable=count == 1):
        images = root / shards[number].name / "images"
        images.mkdir(parents=True)
        (images / "source.json").write_text(json.dumps(shards[number].source))
        save_records(images, [(record, [PICTURE]) for record in captions])
        with open(images / "images.uint8", "wb") as file:
            file.truncate(IMAGES_A_TAR * PICTURE)
        embeds = root / shards[number].name / f"clip-{clip.fingerprint}"
        embeds.mkdir()
        (embeds / "source.json").write_text(json.dumps({"fingerprint": clip.fingerprint}))
        save_random_embeds(embeds, IMAGES_A_TAR, IMAGES_A_TAR, clip.embed_dim, CAPTION_TOKENS,
                           context_length=clip.context_length)


def run_training(folder, name):
    """(processor seconds, largest resident memory in GB) of a short training of the prior."""
    process = subprocess.Popen([
        sys.executable, "train_prior.py", "--preset", "toy", "--num_steps", str(STEPS),
        "--train_img_path", folder / name, "--train_annot_path", "", "--val_annot_path", "",
        "--store_dir", folder / "store", "--output_dir", folder / f"run-{name}", "--log_with",
        "none", "--clip_pretrained", folder / "clip.safetensors"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
