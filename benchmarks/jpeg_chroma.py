"""How much of photos' color detail a picture file keeps: the power of the gradients of Cb and Cr
after saving, over that before.

    python -m benchmarks.jpeg_chroma --img_path data/coco/val2014
"""

import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from dalle2 import cli
from dalle2.images import load_image

FILES = {"JPEG 95, 4:2:0 (Pillow's default)": {"format": "JPEG", "quality": 95},
         "JPEG 95, 4:4:4": {"format": "JPEG", "quality": 95, "subsampling": 0},
         "PNG": {"format": "PNG", "compress_level": 1}}
TO_CHROMA = torch.tensor([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # Cb, Cr


def compute_power(image):
    """Summed squares of the differences between neighbours in Cb and Cr of image (3, H, W)."""
    chroma = torch.einsum("ck,khw->chw", TO_CHROMA, image.float())  # (2, H, W)
    return sum(chroma.diff(dim=dim).square().sum().item() for dim in (1, 2))


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--img_path", required=True, help="folder of photos")
    parser.add_argument("--num_images", type=int, default=200, help="the first ones by name")
    args = parser.parse_args()
    paths = sorted(Path(args.img_path).glob("*.jpg"))[:args.num_images]
    photos = [load_image(path) for path in paths]
    before = sum(map(compute_power, photos))
    print(f"{len(photos)} photos at 256 px\n\n| file | chroma gradient power kept | KB a picture | "
          "ms to save |\n|---|---|---|---|")
    for name, options in FILES.items():
        after, size, start = 0.0, 0, time.process_time()
        files = [io.BytesIO() for _ in photos]
        for photo, file in zip(photos, files):
            TF.to_pil_image(photo).save(file, **options)
        seconds = time.process_time() - start
        for file in files:
            size += file.tell()
            after += compute_power(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
        print(f"| {name} | {after / before:.1%} | {size / len(photos) / 1e3:.0f} | "
              f"{1e3 * seconds / len(photos):.1f} |")


if __name__ == "__main__":
    cli.run(main)
