#!/bin/sh
# All tests: what runs in plain Python, the real engine and offline compilation; then the Triton kernels in Triton's interpreter,
# which a process must choose before it defines kernels. Arguments go to both, say: scripts/test.sh -k routing
. "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
pytest="python -m pytest -n 2 --dist worksteal"
$pytest "$@"
if ! python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
    TRITON_INTERPRET=1 $pytest -m triton "$@"
fi
