#!/bin/sh
# Trains the diffusion prior on COCO 2014 (downloaded by data/coco_download.py), or on data given by
# flags (`python train_prior.py --help`). The same command resumes.
# Hardware: one 80 GB GPU or several smaller ones for preset base (the default), one 12 GB GPU for
# small (run for minutes on an H200), 2 CPU cores for toy.
# Disk: 20 GB for COCO and 27 GB for the prepared store, which prior and decoder share.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
. scripts/launch.sh
need requirements.txt
launch train_prior.py "$@"
