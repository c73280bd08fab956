#!/bin/sh
# Trains the diffusion prior on COCO 2014 (data/coco_download.py fetches it), or on other data that
# flags name (`python train_prior.py --help`). The same command resumes.
# Hardware: one 80 GB GPU or several smaller ones for the preset base (default), one 12 GB GPU for
# small, 2 CPU cores for toy. On GPUs no preset has been run yet.
# Disk: 27 GB for the prepared store, which prior and decoder share, beside 20 GB for COCO.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
. scripts/launch.sh
need requirements.txt
launch train_prior.py "$@"
