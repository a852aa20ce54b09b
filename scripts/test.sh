#!/usr/bin/env bash
# The test suite on a fresh machine: installs the package with its test extra, then runs pytest with these arguments.
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/recipe -k override

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

environment test
exec "$VENV/bin/python" -m pytest "$@"
