#!/bin/sh
# All tests: what runs in plain Python, the real engine and offline compilation; then the Triton kernels in Triton's interpreter,
# which a process must choose before it defines kernels. Arguments go to both, say: scripts/test.sh -k routing
. "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ran=
pytest() { # 5: none of these tests is for this run
    python -m pytest -n 2 --dist worksteal "$@" && ran=yes || [ $? -eq 5 ]
}
pytest "$@"
if ! python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
    export TRITON_INTERPRET=1
    pytest -m triton "$@"
fi
[ "$ran" ] || exit 5
