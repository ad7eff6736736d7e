#!/usr/bin/env bash
# Builds the extension, runs every test marked gpu and every benchmark, and looks for memory errors and races, on a Hopper host without
# network and without SGLang. Results go to OUT_DIR: a log per step, JUnit XML of tests, JSON of benchmarks, and summary.json.
#
# usage: scripts/gpu_check.sh OUT_DIR
# PYTHON: the interpreter (python3). TOTAL_SECONDS: the most that all of it may take; what is not begun by then has failed.
# STEP_SECONDS, FILE_SECONDS, TEST_SECONDS, BENCH_SECONDS: the most that a step may take (600), the tests of a file where each file has a
# process (120), a test (60; twice that where Triton compiles for it), and a measurement (60). JOBS: tests at a time (8).
# PEERS: folder of other projects' packages, to measure them beside ours.
# STEPS: the steps to run where time is short, say "build tests"; what an earlier run built in OUT_DIR is used again without "build", and its
# results stay in the table. LLAMA4_KERNELS_COMMIT: the commit, where this is a copy without a repository.
#
# A step that fails does not stop the next, but nothing is tested where pytest would import another package than the one that was built; the
# exit code is 1 if any failed. What this host cannot run is skipped, and the table says why.
# A new op slots in by its markers: gpu runs on the GPU; gpu and small also under compute-sanitizer; bench/bench_*.py with gpu are timed.
set -uo pipefail

if [ $# -ne 1 ]; then
    sed -n '5,12s/^# //p' "$0" >&2
    exit 2
fi
known="build install package tests measuring memcheck racecheck benchmarks trials calibration peers"
for name in ${STEPS:-}; do
    case " $known " in
        *" $name "*) ;;
        *)
            echo "STEPS names $name, needs some of: $known" >&2
            exit 2
            ;;
    esac
done
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
if [ -z "${LLAMA4_KERNELS_COMMIT:-}" ] && ! git rev-parse HEAD > /dev/null 2>&1; then
    echo "this is no clone, needs LLAMA4_KERNELS_COMMIT, which records of benchmarks name" >&2
    exit 2
fi

python=${PYTHON:-python3}
step_seconds=${STEP_SECONDS:-600}
file_seconds=${FILE_SECONDS:-120}
test_seconds=${TEST_SECONDS:-60}
bench_seconds=${BENCH_SECONDS:-60}
jobs=${JOBS:-8}
installed=$out/site-packages
export PYTHONPATH=$installed${PYTHONPATH:+:$PYTHONPATH}
export PATH=$PATH:/usr/local/cuda/bin
touch "$out/steps.tsv"

record() { # name, status, seconds, note
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" | tee -a "$out/steps.tsv"
}

skip() { # name, reason
    record "$1" skipped 0 "$2"
}

seconds_left() {
    echo $((${TOTAL_SECONDS:-1000000} - SECONDS))
}

chosen() { # name, up to a hyphen
    local name=${1%%-*}
    case " ${STEPS:-$name} " in *" $name "*) ;; *) return 1 ;; esac
}

step() { # name, command...
    local name=$1 log=$out/$1.log started=$SECONDS limit code status note
    shift
    if ! chosen "$name"; then
        grep -q "^$name$(printf '\t')" "$out/steps.tsv" || skip "$name" "not in STEPS"
        return
    fi
    limit=$(seconds_left)
    if [ "$limit" -le 0 ]; then
        record "$name" failed 0 "not begun: TOTAL_SECONDS are over"
        return
    fi
    if [ "$limit" -gt "$step_seconds" ]; then limit=$step_seconds; fi
    echo "== $name: $*"
    # Longer than the 10 s that pytest-xdist gives its workers before it writes what they found.
    timeout --signal=INT --kill-after=30 "$limit" "$@" > "$log" 2>&1
    code=$?
    note=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c1-100)
    case $code in
        0) status=ok ;;
        5) status=skipped note="pytest found no test for it" ;;
        124 | 137) status=failed note="not done after $limit s" ;;
        *) status=failed ;;
    esac
    if [ "$status" = failed ]; then tail -n 40 "$log"; fi
    record "$name" "$status" "$((SECONDS - started))" "$note"
}

pytest=(env PYTHONSAFEPATH=1 "$python" -m pytest -p no:cacheprovider -o addopts=--strict-markers)

reason() { # Python that prints why not, or nothing
    "$python" -c "$1" 2> "$out/reason.log" || echo "$python failed: $(tail -n 1 "$out/reason.log")"
}

no_gpu=$(reason '
import torch
if not torch.cuda.is_available():
    print("torch sees no GPU")
elif torch.cuda.get_device_capability() != (9, 0):
    print(torch.cuda.get_device_name(), "is not a Hopper GPU")
')

no_nvcc=$(reason '
import os, setup
print("; ".join(setup.missing_tools(os.environ)))
')

if chosen build || chosen install; then rm -rf "$installed"; fi
install=("$python" -m pip install -v --no-build-isolation --no-deps --no-index --target "$installed" .)
if [ -n "$no_nvcc" ] && [ -n "$no_gpu" ]; then
    step install env LLAMA4_KERNELS_CUDA=off "${install[@]}"
    skip build "missing: $no_nvcc"
else
    step build env LLAMA4_KERNELS_CUDA=on "${install[@]}"
    # So that the kernels in Triton are tested nonetheless.
    if [ -d "$installed" ]; then
        skip build-without-cuda "not needed"
    else
        step build-without-cuda env LLAMA4_KERNELS_CUDA=off "${install[@]}"
    fi
fi
step package "${pytest[@]}" --junitxml "$out/package.xml" tests/test_package.py

# A clone has no extension in it: tests of the clone's package would leave CUDA out without a failure.
imported=$("${pytest[@]}" --collect-only tests/test_package.py 2> /dev/null | sed -n 's/^llama4_kernels: //p')
case $imported in
    "$installed/"*) ;;
    *)
        no_gpu="pytest imports ${imported:-nothing} in place of $installed"
        record import failed 0 "$no_gpu"
        ;;
esac

if [ -n "$no_gpu" ]; then
    for name in tests measuring memcheck racecheck benchmarks trials calibration peers; do skip "$name" "$no_gpu"; done
else
    measuring=tests/test_bench_gpu.py  # has the GPU to itself
    # pytest-benchmark, where it is installed, would warn in each worker that it is off there.
    workers=(-n "$jobs" --dist worksteal --timeout-method thread -p no:benchmark)
    gpu_tests() { # name, what -k takes, most seconds of a test
        local name=tests-$1 these=(-m gpu -k "$2" --continue-on-collection-errors --ignore "$measuring")
        # Tests run side by side; one that hangs or faults ends its process, and another takes the tests left.
        # Without the plugins for that there is a process for each file.
        if "$python" -c 'import pytest_timeout, xdist' 2> /dev/null; then
            step "$name" env OMP_NUM_THREADS=2 "${pytest[@]}" -v "${these[@]}" "${workers[@]}" --timeout "$3" \
                --junitxml "$out/$name.xml" tests
            return
        fi
        rm -f "$out/$name-list.log"
        step "$name-list" "${pytest[@]}" "${these[@]}" --collect-only -q tests
        for file in $(sed -n 's/^\(tests[^:]*\)::.*/\1/p' "$out/$name-list.log" 2> /dev/null | uniq); do
            each=$name-$(basename "$file" .py)
            step_seconds=$file_seconds step "$each" "${pytest[@]}" -v "${these[@]}" --junitxml "$out/$each.xml" "$file"
        done
    }
    gpu_tests cuda "not triton" "$test_seconds"
    step_seconds=$file_seconds step measuring "${pytest[@]}" -v -m gpu --junitxml "$out/measuring.xml" "$measuring"
    sanitizer=$(command -v compute-sanitizer || true)
    for tool in racecheck memcheck; do
        if [ -z "$sanitizer" ]; then
            skip "$tool" "no compute-sanitizer on PATH or in /usr/local/cuda/bin"
            continue
        fi
        # Not Triton's kernels, whose barriers the compiler places; and no CUDA graphs, which need the cache of torch's memory.
        for file in $(grep -l "pytest.mark.small" tests/test_*.py); do
            name=$tool-$(basename "$file" .py)
            step_seconds=$file_seconds step "$name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
                --target-processes all "${pytest[@]}" -v -m "gpu and small" -k "not triton" --junitxml "$out/$name.xml" "$file"
        done
    done
    gpu_tests triton triton $((2 * test_seconds))
    bench=("${pytest[@]}" -m gpu --job-seconds "$bench_seconds")
    for trial in as-they-are PDL=0 PREFETCH=1; do
        name=trials-${trial/=/-}
        switch=()
        if [ "$trial" != as-they-are ]; then switch=("LLAMA4_KERNELS_$trial"); fi
        step "$name" env "${switch[@]}" "${bench[@]}" -k cuda --records "$out/trials.json" --workloads 'fused_moe/fp8/*/tp8/t1' \
            --workloads 'fused_moe/fp8/*/tp8/t16' --workloads 'fused_moe/fp8/*/tp8/t64' bench/bench_moe.py
    done
    step benchmarks env PYTHONPATH="$PYTHONPATH${PEERS:+:$PEERS}" "${bench[@]}" ${PEERS:+--peers} --benchmark-json "$out/benchmarks.json" \
        --records "$out/records.json" bench/bench_*.py
    step calibration "$python" -m bench.calibration --out "$out/calibration"
    if [ -n "${PEERS:-}" ]; then
        step peers "$python" -m bench.calibration --only peers --peers "$PEERS" --out "$out/calibration"
    else
        skip peers "PEERS names no folder of their packages"
    fi
fi

echo
"$python" - "$out" << 'END'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
fields = ("step", "status", "seconds", "note")
latest = {line.split("\t")[0]: line for line in (out / "steps.tsv").read_text().splitlines()}
steps = [dict(zip(fields, line.split("\t"))) for line in latest.values()]
(out / "summary.json").write_text(json.dumps(steps, indent=1) + "\n")
for row in [dict(zip(fields, fields)), *steps]:
    print(f"{row['step']:<28} {row['status']:<8} {row['seconds']:>7}  {row['note']}")
sys.exit(any(row["status"] == "failed" for row in steps))
END
