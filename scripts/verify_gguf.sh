#!/usr/bin/env bash
# Our GGUF files in real llama.cpp: builds llama-cpp-python from its source package (about 3 minutes on 2 cores, once),
# then exports tiny models of every architecture and compares tokens, logits and text with transformers (3 to 5).
#
#   bash scripts/verify_gguf.sh                      # VENV=/path/to/environment for another than .venv
#   bash scripts/verify_gguf.sh runs/NAME/merged     # and these model folders
#
# Needs cmake, a C++ compiler and the network for the build. stdout is the table of docs/gguf.md; exit code 1 where
# something disagrees. The build lies in LLAMA (build/llama-cpp-python); the environment gets only the package's extras.

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

VERSION=0.3.36 # of llama-cpp-python: another llama.cpp may read other keys
LLAMA=${LLAMA:-build/llama-cpp-python}

if [[ -z ${LLAMA_PYTHON:-} ]]; then # a Python that has the package already
  environment export
  LLAMA_PYTHON=$VENV/bin/python
fi

if [[ ! -f $LLAMA/installed-$VERSION ]]; then
  step "build llama-cpp-python $VERSION in $LLAMA" \
    "It needs cmake, a C++ compiler and the network (Debian: sudo apt install cmake g++)."
  mkdir -p "$LLAMA"
  package=$LLAMA/llama_cpp_python-$VERSION.tar.gz
  pip=("$LLAMA_PYTHON" -m pip --quiet --disable-pip-version-check)
  "${pip[@]}" download --no-binary llama-cpp-python --no-deps --dest "$LLAMA" "llama-cpp-python==$VERSION" >&2
  tar -xzf "$package" -C "$LLAMA"
  # -O1: half of the time goes into llama.cpp's chat and download code, which nothing here runs
  CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1" \
    CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    "${pip[@]}" install --no-deps --upgrade --target "$LLAMA/site" "$package" >&2
  "${pip[@]}" install --no-deps --upgrade --target "$LLAMA/site" "diskcache>=5.6.1" >&2
  touch "$LLAMA/installed-$VERSION"
fi

step "compare with llama.cpp" "The lines above say which model and what differs."
PYTHONPATH=$LLAMA/site${PYTHONPATH:+:$PYTHONPATH} CONVERTER=$LLAMA/llama_cpp_python-$VERSION/vendor/llama.cpp \
  OMP_NUM_THREADS=1 "$LLAMA_PYTHON" scripts/verify_gguf.py "$@"
