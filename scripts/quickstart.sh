#!/bin/sh
# The whole chain on a machine without a GPU: draws a small data set, trains CLIP, prior and decoder
# on it from scratch, renders captions that no training picture shows, and counts how many of their
# attributes are right.
# Hardware: 2 CPU cores, 8 GB of memory. Disk: 6 GB for the environment, 3 GB for output/quickstart.
# Time: about 17 minutes on 2 cores, plus 2 to create the environment. The same command resumes.
#   SEED=1 OUT=output/quickstart1 sh scripts/quickstart.sh     another seed, another folder
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh

out=${OUT:-output/quickstart}
seed=${SEED:-0}
toy=$out/toy_coco
start=$(date +%s)
export PYTHONWARNINGS=ignore

stage() {
    elapsed=$((($(date +%s) - start) / 60))
    printf '\n=== %s  [minute %d of about 17 on two cores]\n' "$1" "$elapsed"
}

stage "1/7 environment: torch and the other packages"
need requirements.txt

stage "2/7 data: 12,000 pictures to train on, 600 with held-out combinations"
"$PY" data/toy_coco.py --output_dir "$toy" --seed "$seed"
set -- --preset toy --seed "$seed" --store_dir "$out/store" \
    --train_img_path "$toy/train" --train_annot_path "$toy/captions_train.json" \
    --val_img_path "$toy/val" --val_annot_path "$toy/captions_val.json"

stage "3/7 CLIP: pictures and captions -> one embedding space"
"$PY" train_clip.py "$@" --output_dir "$out/clip"
set -- "$@" --clip_pretrained "$out/clip/clip.safetensors"

stage "4/7 prior: caption -> image embedding"
"$PY" train_prior.py "$@" --output_dir "$out/prior"

stage "5/7 decoder: image embedding -> 32 px -> 256 px"
"$PY" train_decoder.py "$@" --output_dir "$out/decoder"

stage "6/7 rendering 200 held-out captions, from text and from the true photo's embedding"
render() {
    folder=$1
    shift
    if [ -f "$folder/manifest.json" ]; then
        echo "$folder: already rendered"
        return
    fi
    "$PY" test_dalle2.py --test_img_path "$toy/val" --test_annot_path "$toy/captions_val.json" \
        --prior_ckpt "$out/prior/prior.safetensors" --seed "$seed" --num_images 200 \
        --decoder_ckpt "$out/decoder/decoder.safetensors" --output_dir "$folder" "$@"
}
render "$out/from_text"
render "$out/from_true_embedding" --init_from_true_embedding

stage "7/7 judging: which attributes of the captions do the pictures show?"
"$PY" data/toy_coco.py --judge "$out/from_text/manifest.json" \
    "$out/from_true_embedding/manifest.json" --annot_path "$toy/captions_val.json"
printf '\nDone in %d min. Open %s/from_text/index.html to see the pictures.\n' \
    $((($(date +%s) - start) / 60)) "$out"
