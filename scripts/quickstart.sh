#!/bin/sh
# The whole chain on a machine without a GPU: draws a small data set, trains CLIP, prior and decoder
# on it from scratch, renders captions that no training picture shows, and counts how many of their
# attributes are right.
# Hardware: 2 CPU cores, 8 GB of memory. Disk: 6 GB for the environment, 3 GB for output/quickstart.
# Time: about 12 minutes on 2 cores, plus 1 or 2 for the environment. The same command resumes.
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
    printf '\n=== %s  [minute %d; all stages take about 13 on two cores]\n' "$1" "$elapsed"
}

show() {
    cat "$out/attributes.txt"
    printf '\nThe pictures: %s/from_text/index.html (open it in a browser)\n' "$out"
    printf 'The weights:  %s/clip, %s/prior, %s/decoder\n' "$out" "$out" "$out"
}

# What is there and was made with this seed by this code is shown at once. Otherwise every stage
# checks by itself what it finds.
made_with=$(echo "seed $seed" && cksum scripts/*.sh ./*.py data/*.py dalle2/*.py)
if [ "$made_with" = "$(cat "$out/finished" 2>/dev/null)" ] && ls "$out/clip/clip.safetensors" \
    "$out/prior/prior.safetensors" "$out/decoder/decoder.safetensors" "$out/attributes.txt" \
    "$out/from_text/index.html" "$out/from_true_embedding/index.html" >/dev/null 2>&1; then
    echo "Everything is there already, made with seed $seed. To begin anew, delete $out."
    show
    exit
fi
rm -f "$out/finished"

stage "1/6 environment: torch and the other packages"
need requirements.txt
[ -d "$out" ] || need_space 3 "$out"

stage "2/6 data: 12,000 pictures to train on, 600 with held-out combinations"
"$PY" data/toy_coco.py --output_dir "$toy" --seed "$seed"
set -- --preset toy --seed "$seed" --store_dir "$out/store" \
    --train_img_path "$toy/train" --train_annot_path "$toy/captions_train.json" \
    --val_img_path "$toy/val" --val_annot_path "$toy/captions_val.json"

stage "3/6 CLIP: pictures and captions -> one embedding space"
"$PY" train_clip.py "$@" --output_dir "$out/clip"
set -- "$@" --clip_pretrained "$out/clip/clip.safetensors"

halve_threads
stage "4/6 prior, caption -> image embedding; decoder, image embedding -> 32 px -> 256 px"
echo "The decoder's first stage is trained beside the others and writes to $out/unet1.log."
beside "$out/unet1.log" "$PY" train_decoder.py "$@" --output_dir "$out/decoder" --unet_number 1
"$PY" train_prior.py "$@" --output_dir "$out/prior"
check
"$PY" train_decoder.py "$@" --output_dir "$out/decoder" --unet_number 2
join

stage "5/6 rendering 200 held-out captions, from text and from the true picture's embedding"
set -- "$PY" test_dalle2.py --test_img_path "$toy/val" --num_images 200 --seed "$seed" \
    --test_annot_path "$toy/captions_val.json" --prior_ckpt "$out/prior/prior.safetensors" \
    --decoder_ckpt "$out/decoder/decoder.safetensors"
beside "$out/from_true_embedding.log" \
    "$@" --output_dir "$out/from_true_embedding" --init_from_true_embedding
"$@" --output_dir "$out/from_text"
join

stage "6/6 judging: which attributes of the captions do the pictures show?"
"$PY" data/toy_coco.py --judge "$out/from_text/manifest.json" \
    "$out/from_true_embedding/manifest.json" --annot_path "$toy/captions_val.json" \
    >"$out/attributes.txt"
printf '%s\n' "$made_with" >"$out/finished"
show
printf 'Done in %d min.\n' $((($(date +%s) - start) / 60))
