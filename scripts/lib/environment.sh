# shellcheck shell=bash
#
# Sourced by the scripts: the virtual environment with the package and the tested versions, and failures explained.
#
#   PYTHON   the Python to make the environment with: the first that fits of python3.11, 3.12, 3.13 and python3
#   VENV     where the environment lies, seen from the repository: .venv

set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV=${VENV:-.venv}
CURRENT_STEP="start"
REMEDY="Run the script with bash."
trap explain ERR

step() { # NAME, REMEDY: what begins now, and what to do if it fails
  CURRENT_STEP=$1
  REMEDY=$2
  printf '\n==> %s\n' "$1" >&2
}

explain() {
  local status=$?
  printf '\nfailed: %s (exit code %s)\n%s\n' "$CURRENT_STEP" "$status" "$REMEDY" >&2
  exit "$status"
}

environment() { # EXTRA or "": the environment with the package in it; a second call finds all of it there
  local extra=$1 tested stamp=$VENV/qlora-installed-${1:-package}
  tested=$(cat scripts/pins.txt pyproject.toml <(pwd -P) | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$tested" ]] && "$VENV/bin/python" -c "" 2>/dev/null; then
    return
  fi

  step "look for Python 3.11 or newer" \
    "Install it with its venv module (Debian: sudo apt install python3-venv), or name one: PYTHON=/path/to/python3"
  find_python
  step "make the environment $VENV with $PYTHON" "Free the folder, or name another: VENV=/path/to/environment"
  "$PYTHON" -m venv "$VENV"
  step "install the package and the tested versions (some minutes the first time)" \
    "pip says above what is wrong: the network, a full disk, no file for this Python? Then run the same command again."
  install_torch
  install --editable ".${extra:+[$extra]}"
  printf '%s\n' "$tested" >"$stamp"
}

find_python() { # sets PYTHON; the first names are those that scripts/pins.txt was tested with, and those near it
  local name names=(python3.11 python3.12 python3.13 python3)
  if [[ -n ${PYTHON:-} ]]; then names=("$PYTHON"); fi
  for name in "${names[@]}"; do
    if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      PYTHON=$name
      return
    fi
  done
  printf 'none of these is there, is 3.11 or newer and has venv: %s\n' "${names[*]}" >&2
  return 1
}

# PyPI's torch for Linux is the CUDA build: gigabytes that a machine without an NVIDIA GPU has no use for. Where
# PyTorch's own index cannot be reached, the next `install` takes torch from where pip looks anyway.
install_torch() {
  if [[ $(uname -s) == Linux && ! -e /dev/nvidia0 ]] && ! command -v nvidia-smi >/dev/null; then
    install --no-deps --index-url https://download.pytorch.org/whl/cpu --timeout 5 --retries 0 torch 2>/dev/null || true
  fi
}

install() { # pip's arguments
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint scripts/pins.txt "$@"
}
