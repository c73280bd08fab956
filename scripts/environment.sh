# Sourced by the other scripts, from the root of the repository. Sets PY to the interpreter to use.
#   VENV=/path         use this environment, made there if it does not exist; without it: an active
#                      environment that has the packages, or else .venv
#   PYTHON=python3.12  the interpreter that a new environment is made with
# `need FILE...` installs requirements files, once each; it runs again when a file changes.
set -eu

if [ -z "${VENV:-}" ]; then
    VENV=.venv
    if [ ! -x .venv/bin/python ] && [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ] && python -c \
        'import importlib.util, sys; sys.exit(not importlib.util.find_spec("dalle2_pytorch"))'; then
        VENV=${VIRTUAL_ENV:-$CONDA_PREFIX}
    fi
fi
PY=$VENV/bin/python

need() {
    if [ ! -x "$PY" ]; then
        echo "making the environment $VENV (about 2 minutes and 6 GB)"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    for requirements in "$@"; do
        stamp=$VENV/.installed-$(basename "$requirements" .txt)
        if ! cmp -s "$requirements" "$stamp"; then
            "$PY" -m pip install -q --disable-pip-version-check -r "$requirements"
            cp "$requirements" "$stamp"
        fi
    done
}
