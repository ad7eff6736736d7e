"""What this GPU reaches, and what peers reach on it: the ceilings that every figure of this project is a ratio to.

python -m bench.calibration --out DIR               on a Hopper GPU, from the repository's root; --peers DIR measures peers too
python -m bench.calibration --dry-run               what would be measured, with bytes and flops; runs anywhere
python -m bench.calibration.document                writes docs/hardware.md from the records in bench/results

measurement     what a measurement is: a question, its cases, and how a case is answered
measurements    one file per subject, one function per question
peers           those of llama4_kernels.bench at Llama 4's workloads
kernels         CUDA behind C entry points; native builds and calls it, gpu times it
plan            which of all that runs, and for how long at most
runner, worker  a process per step, with a time box; worker is what runs in it
document        docs/hardware.md
"""
