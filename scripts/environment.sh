# Sourced by the other scripts in the root of the repository. Sets PY, the Python interpreter.
#   VENV=/path         use this environment and create it if it does not exist; if VENV is not set:
#                      .venv, or the active environment if it has the packages and .venv is missing
#   PYTHON=python3.12  the interpreter for creating a new environment
# `need FILE...` installs requirements files that have changed since they were last installed; where
# that fails, with the versions of constraints.txt.
set -eu

if [ -z "${VENV:-}" ]; then
    VENV=.venv
    if [ ! -x .venv/bin/python ] && [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ] && python -c \
        'import importlib.util, sys; sys.exit(not importlib.util.find_spec("dalle2_pytorch"))'; then
        VENV=${VIRTUAL_ENV:-$CONDA_PREFIX}
    fi
fi
PY=$VENV/bin/python
# glibc keeps large tensors for the next step instead of giving them back to the system: a training
# step on a CPU takes 8 to 10 % less time
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"

need() {
    if [ ! -x "$PY" ]; then
        echo "creating the environment $VENV (about 2 minutes and 6 GB)"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    for requirements in "$@"; do
        stamp=$VENV/.installed-$(basename "$requirements" .txt)
        if ! cmp -s "$requirements" "$stamp"; then
            set -- "$PY" -m pip install -q --disable-pip-version-check -r "$requirements"
            "$@" || "$@" -c constraints.txt
            cp "$requirements" "$stamp"
        fi
    done
}
