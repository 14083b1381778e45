#!/usr/bin/env bash
# What only GPUs run, in one call on a machine with 1, 2, 4 or 8 of them: tests/gpu.sh [--out FILE] [--limit SECONDS]
# Writes one JSON (default docs/results/<device>[x2]_proof.json); exits with 1 if anything failed or was not reached.
# Takes the `python` of the active environment, which has to hold torch with CUDA and, for the kernels' tests, pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python scripts/gpu_proof.py "$@"
