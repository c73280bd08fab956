"""Prepares a data set for training: decodes each photo once and embeds it with its captions.

Training does the same by itself if nothing is prepared. docs/data.md lists the files and their
sizes.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dalle2 import cli  # noqa: E402
from dalle2.prepare import BYTES_A_PICTURE  # noqa: E402


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_data_flags(parser)
    cli.add_clip_flags(parser)
    parser.add_argument("--image_format", choices=list(BYTES_A_PICTURE),
                        help="how pictures are stored: as uint8, 197 KB each, or as JPEG of "
                        "quality 95, about 36 KB (None: as in an existing store, or uint8)")
    parser.add_argument("--strict", action="store_true",
                        help="stop at a picture that cannot be read instead of leaving it out")
    args = parser.parse_args()
    cli.check_data(args)
    stores = cli.open_stores(args, cli.load_clip(args), image_format=args.image_format,
                             strict=args.strict)
    for split, store in zip(("train", "val"), stores):
        if store and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{split}: {len(store)} pictures, {store.caption_start[-1]} captions in "
                  f"{store.folder}")


if __name__ == "__main__":
    cli.run(main)
