"""What this GPU reaches, and what the rivals reach on it: the ceilings that every figure of this project is a ratio to.

python -m bench.calibration --out DIR               on a Hopper GPU, from the repository's root
python -m bench.calibration --dry-run               what would be measured, with bytes and flops; runs anywhere
python -m bench.calibration.document                writes docs/hardware.md from the records in bench/results

measurement     what a measurement is, and the list of all
measurements    one file per subject, one function per question
kernels         their CUDA, behind C entry points; library builds and calls it
runner, worker  a process per measurement, with a time box; worker is what runs in it
document        docs/hardware.md
"""
