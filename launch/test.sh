#!/usr/bin/env bash
# Sets everything up in .venv and runs the checks and tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/common.sh"
ruff format --check .
ruff check .
mypy
lint-imports
python -m pytest "$@"
echo "== done: $SECONDS s, installation included"
