#!/bin/sh
# The chain on a folder of photographs, from zero, without a GPU and without weights from elsewhere:
# trains CLIP, prior and decoder (PRESET=photo) and renders the first 24 held-out captions.
#   DATA=data/flickr8k sh scripts/photos.sh
# DATA holds annotations/captions_train.json and captions_val.json (COCO captions format) and their
# pictures in train/ and val/, or all of them in images/. OUT=output/photos is where it writes.
# FLAGS: more flags of every training, such as "--seed 1".
# CLIP_FLAGS: of train_clip.py, such as "--vision_timm tf_efficientnet_lite1 --lock_vision
# --image_size 160 --muon_lr 0.01" for an image tower that begins with ImageNet weights, which
# sees more. STAGE_FLAGS: of the decoder's first stage. VIEWS=8: train on 8 pictures of each photo
# (--num_views), which showed no gain so far.
# PRESET=photo-large: a first stage of five times the size, whose pictures are better.
# Hardware: 2 CPU cores, 8 GB of memory. For 7,300 photos: 3 GB of disk and about 70 minutes on two
# cores of an Intel Xeon with AMX; photo-large: about 5 hours on two cores of an AMD EPYC without
# (docs/results/photographs.md). The same command resumes.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh

data=${DATA:-data/flickr8k}
out=${OUT:-output/photos}
preset=${PRESET:-photo}
need requirements.txt

images() {
    if [ -d "$data/$1" ]; then echo "$data/$1"; else echo "$data/images"; fi
}

set -- --num_views "${VIEWS:-1}" --store_dir "$out/store" --num_val_images 512 \
    --train_img_path "$(images train)" --train_annot_path "$data/annotations/captions_train.json" \
    --val_img_path "$(images val)" --val_annot_path "$data/annotations/captions_val.json"
# shellcheck disable=SC2086  # several flags, or none
"$PY" train_clip.py --preset "$preset" "$@" ${FLAGS:-} ${CLIP_FLAGS:-} --output_dir "$out/clip"
set -- "$@" --clip_pretrained "$out/clip/clip.safetensors"
"$PY" data/coco_prepare.py "$@"  # embeds the photos with all cores; both trainings would wait
# shellcheck disable=SC2086
set -- --preset "$preset" "$@" ${FLAGS:-}
(
    halve_threads
    echo "The decoder's first stage is trained beside the others and writes to $out/unet1.log."
    # shellcheck disable=SC2086
    beside "$out/unet1.log" "$PY" train_decoder.py "$@" ${STAGE_FLAGS:-} \
        --output_dir "$out/decoder" --unet_number 1
    "$PY" train_prior.py "$@" --output_dir "$out/prior"
    check
    "$PY" train_decoder.py "$@" --output_dir "$out/decoder" --unet_number 2
)  # the first stage has been told to save and stop, and goes on with all cores
# shellcheck disable=SC2086
"$PY" train_decoder.py "$@" ${STAGE_FLAGS:-} --output_dir "$out/decoder" --unet_number 1
"$PY" test_dalle2.py --test_img_path "$(images val)" --num_images 24 \
    --test_annot_path "$data/annotations/captions_val.json" --output_dir "$out/rendered" \
    --prior_ckpt "$out/prior/prior.safetensors" --decoder_ckpt "$out/decoder/decoder.safetensors"
