#!/bin/sh
# The Triton kernels in the interpreter and compiled offline, with the oldest Triton and torch supported: Triton 3.6.0, torch 2.11.
#   scripts/test_versions.sh [folder]     makes a virtual environment there (.venv/oldest), downloads both, runs the tests
#   (Triton 3.6's interpreter needs NumPy before 2.4, which turns no one-element array into a number.)
#   TRITON_ONLY=1 scripts/test_versions.sh     keeps the present torch and only puts Triton 3.6.0 in front of the present one
set -e
cd "$(dirname "$0")/.."
folder="${1:-.venv/oldest}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=python3
if [ -n "$TRITON_ONLY" ]; then
    python3 -m pip install -q --no-deps --target "$folder/triton" triton==3.6.0
    export PYTHONPATH="$folder/triton${PYTHONPATH:+:$PYTHONPATH}"
else
    python3 -m venv "$folder"
    python="$folder/bin/python"
    LLAMA4_KERNELS_CUDA=off "$python" -m pip install -q "torch==2.11.*" triton==3.6.0 "numpy<2.4" transformers \
        pytest pytest-xdist hypothesis -e .
fi
"$python" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
TRITON_INTERPRET=1 "$python" -m pytest -n 2 -m triton tests
"$python" -m pytest -m compile tests/triton
