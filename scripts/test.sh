#!/bin/sh
# Installs what the tests need and runs the quick ones, or all of them with --slow. Other flags are
# passed to pytest. Needs no GPU and no data.
# Time on two cores: under 4 minutes, with --slow about 10, plus 2 to create the environment.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
for flag; do
    shift
    case $flag in
        --slow) set -- "$@" -m "" ;;
        *) set -- "$@" "$flag" ;;
    esac
done
need requirements.txt requirements-dev.txt
"$PY" -m ruff check .
exec "$PY" -m pytest "$@"
