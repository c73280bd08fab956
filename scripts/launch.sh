# Sourced by train_prior.sh and train_decoder.sh. `launch SCRIPT FLAG...` runs a training script in
# place of the shell: directly on the CPU or one GPU, with `accelerate launch` on several GPUs.
# LAUNCH_ARGS sets other arguments for `accelerate launch`, for example for several machines.
set -eu

launch() {
    gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    fi
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | wc -l)
    fi
    if [ -z "${LAUNCH_ARGS:-}" ] && [ "$gpus" -gt 1 ]; then
        LAUNCH_ARGS="--multi_gpu --num_processes $gpus --num_machines 1 --dynamo_backend no"
    fi
    if [ -z "${LAUNCH_ARGS:-}" ]; then
        exec "$PY" "$@"
    fi
    # shellcheck disable=SC2086  # LAUNCH_ARGS is a list of words
    exec "$PY" -m accelerate.commands.launch $LAUNCH_ARGS "$@"
}
