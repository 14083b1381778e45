#!/usr/bin/env bash
# Lint, types, import contracts, tests: tests/run.sh [--full] [pytest arguments]
# --full adds the long matrices.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment test

# Tests start many ranks of their own: more threads would only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The last line, also after a failure.
trap 'python scripts/gpu_seen.py' EXIT

step() {
    echo "== $*"
    "$@"
}
step ruff check .
step ruff format --check .
step mypy moe_dtensor
step lint-imports
# Two workers: most tests keep one core busy, or none while ranks wait. In the order of collection, since few tests of a
# file may be long ones.
step python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 "$@"
