#!/bin/sh
# Runs everything that only a GPU can show: the tests that need CUDA, the speed tables with a
# profile, and a training on photographs with captions, which then renders held-out captions.
# Hardware: one CUDA GPU with 24 GB or more (80 GB for the tables of preset base). Disk: 10 GB.
# Time: MINUTES of training plus about 15. The results are written to OUT (output/gpu_check).
#   DATA=data/flickr8k MINUTES=20 sh benchmarks/gpu_check.sh [tests] [speed] [training]
# DATA is needed for the training: annotations/captions_{train,val}.json (COCO captions format), and
# the pictures in train/ and val/, or all of them in images/. PRESET (small) is trained on VIEWS (4)
# pictures of each photo. CLIP_FLAGS: more flags of train_clip.py, such as "--vision_timm
# tf_efficientnet_lite1 --lock_vision --image_size 176" for an image tower with ImageNet weights.
# VENV=/path names a ready environment: if it has the packages, nothing is installed.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh

minutes=${MINUTES:-20}
data=${DATA:-data/flickr8k}
out=${OUT:-output/gpu_check}
preset=${PRESET:-small}
has() { "$PY" -c "import $1" 2>/dev/null; }
has accelerate,dalle2_pytorch,matplotlib,open_clip,pycocotools,simplejpeg,scipy,tensorboard ||
    need requirements.txt
mkdir -p "$out"
export PYTHONWARNINGS=ignore

# keep FILE COMMAND...: runs the command, writes its output to $out/FILE and prints it; stops if the
# command fails (with a pipe into tee, the shell would not notice)
keep() {
    file=$out/$1
    shift
    "$@" >"$file" || { cat "$file"; exit 1; }
    cat "$file"
}

run_tests() {
    has pytest || need requirements-dev.txt
    keep tests.txt "$PY" -m pytest -m "" tests/test_cuda.py tests/test_waits.py -rs
}

run_speed() {
    keep train_speed.md "$PY" -m benchmarks.train_speed --preset base --batch_size 128 \
        --variants stock eager ours compiled --profile --json "$out/train_speed.json"
    keep sample_speed.md "$PY" -m benchmarks.sample_speed --preset base --batch_size 16
}

images() {
    if [ -d "$data/$1" ]; then echo "$data/$1"; else echo "$data/images"; fi
}

# train NAME SHARE SCRIPT FLAG...: measures the speed over 40 steps, then trains for as many steps
# as fit into SHARE per cent of the minutes
train() {
    name=$1 share=$2 script=$3
    shift 3
    rm -rf "$out/pace"
    "$PY" "$script" "$@" --num_steps 40 --val_annot_path "" --val_img_path "" \
        --output_dir "$out/pace"
    steps=$("$PY" -c "
import glob, json
rows = [json.loads(line) for path in glob.glob('$out/pace/**/metrics.jsonl', recursive=True)
        for line in open(path)]
batch = rows[0]['samples_seen'] / rows[0]['step']
print(max(100, int(rows[-1]['samples_per_sec'] / batch * 60 * $minutes * $share / 100)))")
    rm -rf "$out/pace"
    echo "$name: $steps steps"
    "$PY" "$script" "$@" --num_steps "$steps" --output_dir "$out/$name"
}

run_training() {
    set -- --preset "$preset" --num_views "${VIEWS:-4}" --store_dir "$out/store" \
        --num_val_images 512 --log_with none \
        --train_img_path "$(images train)" --val_img_path "$(images val)" \
        --train_annot_path "$data/annotations/captions_train.json" \
        --val_annot_path "$data/annotations/captions_val.json" \
        --save_every 1000000
    clip="--clip_pretrained $out/clip/clip.safetensors"
    # shellcheck disable=SC2086  # $clip is a flag and its value
    {
        train clip 15 train_clip.py "$@" --validate_every 100 ${CLIP_FLAGS:-}
        train prior 10 train_prior.py "$@" $clip --validate_every 250
        train decoder 60 train_decoder.py "$@" $clip --unet_number 1 --validate_every 250
        train decoder 15 train_decoder.py "$@" $clip --unet_number 2 --validate_every 250
    }
    # the first 64 held-out captions
    "$PY" test_dalle2.py --test_img_path "$(images val)" --num_images 64 \
        --test_annot_path "$data/annotations/captions_val.json" --output_dir "$out/rendered" \
        --prior_ckpt "$out/prior/prior.safetensors" \
        --decoder_ckpt "$out/decoder/decoder.safetensors"
    for name in prior decoder; do
        "$PY" -c "
from safetensors import safe_open
from safetensors.torch import save_file
with safe_open('$out/$name/$name.safetensors', 'pt') as file:
    state = {key: file.get_tensor(key).half() for key in file.keys()}
    save_file(state, '$out/$name.fp16.safetensors', file.metadata())"
    done
    ls -l "$out"
}

[ $# -gt 0 ] || set -- tests speed training
for part; do
    if [ "$part" = training ] && [ ! -d "$data/annotations" ]; then
        echo "error: no such folder: $data/annotations; DATA names the photographs" >&2
        exit 2
    fi
done
for part; do
    echo "=== $part"
    "run_$part"
done
