#!/bin/sh
# One change at a time to the first stage of preset photo with a weight decay of .01, the same steps
# for each: error of the x_start estimate on held-out photos at ten log-SNRs, as one table.
#   DATA=data/flickr8k OUT=output/photos STEPS=600 SEEDS="0 1" sh benchmarks/photo_ablations.sh
#   STEPS=600 ROWS="v-linear adamw-2e-3" FLAGS="--dim 32" NAME=dim32 sh benchmarks/photo_ablations.sh
# DATA, OUT and VIEWS are those of scripts/photos.sh, which has trained a CLIP and made the store.
# ROWS: only these. FLAGS go to every row, whose results then lie in a folder of its own, by NAME.
# Time: about 12 minutes a row on one core. A row that is done is not trained again.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh

data=${DATA:-data/flickr8k}
out=${OUT:-output/photos}
steps=${STEPS:-600}
runs=$out/ablations/$steps${NAME:+-$NAME}
images() {
    if [ -d "$data/$1" ]; then echo "$data/$1"; else echo "$data/images"; fi
}

# row NAME FLAG...: trains and measures the first stage of preset photo with the flags
row() {
    name=$1
    shift
    case " ${ROWS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    for seed in ${SEEDS:-0}; do
        run=$runs/$name-$seed
        [ ! -f "$run/measures.json" ] || continue
        mkdir -p "$run"
        ln -sfn "$(cd "$out/clip" && pwd)" "$run/clip"
        "$PY" train_decoder.py --preset photo --num_views "${VIEWS:-1}" --store_dir "$out/store" \
            --train_img_path "$(images train)" --val_img_path "$(images val)" \
            --train_annot_path "$data/annotations/captions_train.json" \
            --val_annot_path "$data/annotations/captions_val.json" --log_with none \
            --clip_pretrained "$out/clip/clip.safetensors" --output_dir "$run/decoder" \
            --unet_number 1 --num_steps "$steps" --validate_every "$steps" --seed "$seed" \
            --weight_decay 0.01 ${FLAGS:-} "$@"
        "$PY" -m benchmarks.photo_measures --run_dir "$run" --parts stages \
            --val_img_path "$(images val)" \
            --val_annot_path "$data/annotations/captions_val.json" >"$run/measures.txt"
    done
}

row decay-0.01
row decay-0.1 --weight_decay 0.1   # the preset
row adamw-2e-3 --muon_lr 0 --lr 2e-3
row adamw-5e-4 --muon_lr 0 --lr 5e-4
row min-snr-5 --min_snr_gamma 5
row v-linear --beta_schedule linear
row x_start-linear --objective x_start --beta_schedule linear
row x_start-cosine --objective x_start
row noise-cosine --objective noise
row embed-noise-0.3 --image_embed_noise 0.3
row four-image-tokens --num_image_tokens 4
row memory-efficient-off --no-memory_efficient --dim_mults 1 2 4 8 8
row deeper-attention --num_resnet_blocks 1 --dim_mults 1 2 4 8 8 \
    --self_attn false true true true true

"$PY" - "$runs" <<'END'
import json
import sys
from pathlib import Path

for number, path in enumerate(sorted(Path(sys.argv[1]).glob("*/measures.json"))):
    errors = json.loads(path.read_text())["stages"]["x_start error, 64 px"]
    if not number:
        print("| run | " + " | ".join(errors) + " | mean |\n" + "|---" * (len(errors) + 2) + "|")
    mean = sum(value for value, _ in errors.values()) / len(errors)
    print(f"| {path.parent.name} | " + " | ".join(f"{value:.4f}" for value, _ in errors.values())
          + f" | {mean:.4f} |")
END
