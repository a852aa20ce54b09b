#!/usr/bin/env bash
# The tests that need a CUDA device, in the Python that is there: nothing is installed.
#
#   bash scripts/gpu_check.sh                     # PYTHON=/path/to/python3 for another than python3
#   bash scripts/gpu_check.sh tests/quant -x      # pytest's arguments
#
# pytest's own words go to stderr; stdout is one JSON object (see scripts/lib/gpu_summary.py). Exit code: pytest's, so
# 1 where a test failed and 5 where none is marked `gpu`; 4 where there is no CUDA device.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import pytest, torch; raise SystemExit(not torch.cuda.is_available())'; then
  printf 'no CUDA device, or no torch and pytest in %s. Name another Python: PYTHON=/path/to/python3\n' "$python" >&2
  exit 4
fi
results=$(mktemp)
trap 'rm -f "$results"' EXIT

status=0
"$python" -m pytest -m gpu --junit-xml "$results" "$@" >&2 || status=$?
"$python" scripts/lib/gpu_summary.py "$results"
exit "$status"
