#!/usr/bin/env bash
# Templates exported for Ollama in Go's own text/template, and Modelfiles by the rules of Ollama's parser: a minute.
#
#   bash scripts/verify_ollama.sh TEMPLATES     # a folder of chat templates as scripts/template_verdicts.py reads it
#   PYTHON=/path/to/python                      # one that has the package; GO=/path/to/go
#
# Without Go nothing is compared, which is said; exit code 1 where a text differs.

set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
GO=${GO:-go}
PYTHON=${PYTHON:-python3}

if [[ $# != 1 ]]; then
  printf 'name the folder of templates: bash scripts/verify_ollama.sh TEMPLATES\n' >&2
  exit 2
fi
if ! command -v "$GO" >/dev/null; then
  printf 'skipped: Go is not here (Debian: sudo apt install golang-go; or GO=/path/to/go)\n' >&2
  exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in render modelfile; do
  GO111MODULE=off GOCACHE=$work/cache "$GO" build -o "$work/$name" "scripts/ollama/$name.go"
done
"$PYTHON" scripts/verify_ollama.py "$1" "$work/render" "$work/modelfile"
