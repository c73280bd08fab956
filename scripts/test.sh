#!/bin/sh
# Installs what the tests need and runs them; flags go to pytest. No GPU, no data. About 13 minutes
# on two cores, and 2 more to make the environment the first time.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
need requirements.txt requirements-dev.txt
"$PY" -m ruff check .
exec "$PY" -m pytest "$@"
