#!/bin/sh
# Trains the decoder on COCO 2014 (data/coco_download.py fetches it), or on what the flags name:
# `python train_decoder.py --help`. Every stage in turn; --unet_number trains one. The same command
# resumes.
# Hardware: preset base (default) one 80 GB GPU or several smaller, small one 12 GB GPU, toy 2 cores.
# Disk: 16 GB for the store of pictures, 9 GB for the embeddings, once, for prior and decoder.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
. scripts/launch.sh
need requirements.txt
launch train_decoder.py "$@"
