# Sourced by the other scripts in the root of the repository. Sets PY, the Python interpreter.
#   VENV=/path         use this environment and create it if it does not exist; if VENV is not set:
#                      .venv, or the active environment if it has the packages and .venv is missing
#   PYTHON=python3.12  the interpreter for creating a new environment, 3.10 or newer
# `need FILE...` installs requirements files that have changed since they were last installed; where
# that fails, with the versions of constraints.txt. `need_space GB FOLDER` stops where the disk of
# FOLDER has less. Both say in one line what is wrong and what to do.
#
# On a CPU two commands side by side, each with half of the cores (`halve_threads`), do more than
# one after the other with all. `beside LOG COMMAND...` starts one that writes to LOG; `check` stops
# the script where that has failed; `join` shows how it goes on and waits for it. Where the script
# stops before, the command is told to save and stop.
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
    for requirements in "$@"; do
        stamp=$VENV/.installed-$(basename "$requirements" .txt)
        if [ ! -x "$PY" ] || ! cmp -s "$requirements" "$stamp"; then
            # an environment that was left half-made has no pip
            "$PY" -c "import pip" 2>/dev/null || "$PY" -m ensurepip >/dev/null 2>&1 ||
                create_environment
            # pip would compile every module, for half a minute; Python compiles what it imports
            set -- "$PY" -m pip install -q --no-compile --disable-pip-version-check \
                -r "$requirements"
            "$@" || "$@" -c constraints.txt || stop "the packages of $requirements could not be" \
                "installed (pip says why above); that needs a connection to the package index." \
                "The same command resumes"
            cp "$requirements" "$stamp"
        fi
    done
}

create_environment() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || stop "no $python here; install Python 3.10 or newer, or" \
        "name it: PYTHON=/path/to/python3"
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 10))" || stop "$python is" \
        "$("$python" -V 2>&1), 3.10 or newer is needed; name another: PYTHON=python3.12"
    need_space 6 "$VENV"
    echo "creating the environment $VENV (about 2 minutes and 6 GB)"
    if ! said=$("$python" -m venv "$VENV" 2>&1); then
        case $said in
            *ensurepip* | *"No module named venv"*)
                stop "$python cannot create an environment, a part of it is not installed; on" \
                    "Debian and Ubuntu: sudo apt install ${python##*/}-venv, then the same command"
                ;;
            *) stop "$python -m venv $VENV failed: $(echo "$said" | tail -n 1)" ;;
        esac
    fi
}

halve_threads() {
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((cores + 1) / 2))}"
}

beside() {
    log=$1
    shift
    : >"$log"
    "$@" >>"$log" 2>&1 &
    job=$!
    shown=
    trap 'kill "$job" $shown 2>/dev/null || true; wait "$job" 2>/dev/null || true' EXIT
    trap 'exit 130' INT
}

check() {
    kill -0 "$job" 2>/dev/null || join
}

join() {
    [ -n "$job" ] || return 0
    tail -n 1 -f "$log" >&2 &
    shown=$!
    code=0
    wait "$job" || code=$?
    job=
    kill "$shown" 2>/dev/null || true
    printf '\r%s\n' "$(tr '\r' '\n' <"$log" | tail -n 1)" >&2
    trap - EXIT
    [ "$code" = 0 ] || exit "$code"
}

need_space() {
    folder=$2
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "${free:-$1}" -ge "$1" ] || stop "$2 needs $1 GB of disk space, $free GB are free"
}

stop() {
    echo "error: $*" >&2
    exit 2
}
