#!/bin/sh
# Installs what the tests need and runs them: without --slow those that take seconds, with it all of
# them; other flags go to pytest. No GPU, no data.
# Time on two cores: under 4 minutes, with --slow about 10; and 2 to make the environment once.
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
