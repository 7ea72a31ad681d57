#!/usr/bin/env bash
# Sets everything up in .venv and runs the checks and tests, two tests at a time. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/common.sh"
installed=$SECONDS
ruff format --check .
ruff check .
mypy
lint-imports
python -m pytest -n 2 --dist worksteal "$@"
echo "== done: $((SECONDS - installed)) s, and $installed s for the installation"
