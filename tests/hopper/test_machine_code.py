"""Every CUDA kernel that ships, compiled as the build does, against the committed baseline_<stem>.json.

Margins: registers and instructions may grow by a tenth; nothing spills, ptxas serialises no wgmma nor puts waits of its own between them,
and no kernel loses its wgmma or TMA loads. On purpose worse, or better: `python tests/hopper/machine_code.py <stem>` rewrites the baseline.
What kernels and launches take for granted holds: registers that setmaxnreg gives out, shared memory, what comes before a wait for the
kernel ahead, and where the whole GPU is waited for.
Another nvcc than the baseline's is held to the absolute rules only.
"""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise

import machine_code
import pytest

from llama4_kernels.bench import static

NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.compile, pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")]

GROWTH = 1.1


@pytest.fixture(scope="module", params=machine_code.STEMS)
def stem(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(stem):
    return machine_code.compile_stem(NVCC, stem)


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("no_such_stem", 2)])
def test_what_is_no_stem_is_not_compiled(argument, code, monkeypatch):
    monkeypatch.setattr(machine_code, "compile_stem", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit) as ended:
        machine_code.main([argument])
    assert ended.value.code == code


def test_ptxas_has_nothing_to_say(compiled):
    assert compiled.notices == []


def test_no_kernel_spills(compiled):
    assert compiled.kernels and {name: kernel for name, kernel in compiled.kernels.items() if kernel["spill_bytes"]} == {}


def test_no_worse_than_the_baseline(stem, compiled):
    baseline = json.loads(machine_code.baseline(stem).read_text())
    expected = baseline["kernels"]
    assert sorted(compiled.kernels) == sorted(expected), f"other kernels ship than in the baseline: machine_code.py {stem} rewrites it"
    growth = GROWTH if baseline["nvcc"] == machine_code.nvcc_version(NVCC) else float("inf")
    worse = [
        f"{name}: {what} {expected[name][what]} -> {kernel[what]}"
        for name, kernel in compiled.kernels.items()
        for what in ("registers", "instructions", "wgmma", "tma_load")
        if (not kernel[what] and expected[name][what] if what in ("wgmma", "tma_load") else kernel[what] > growth * expected[name][what])
    ]
    assert worse == []


def test_every_grouped_gemm_multiplies_on_wgmma_what_tma_loads():
    kernels = machine_code.compile_stem(NVCC, "grouped_gemm").kernels
    assert len(kernels) == 24 and all(kernel["wgmma"] and kernel["tma_load"] for kernel in kernels.values())


def test_grouped_gemm_writes_bfloat16_in_chunks_of_16_bytes():
    for name, code in machine_code.compile_stem(NVCC, "grouped_gemm").instructions.items():
        assert any(text.startswith("STG.E.128") for text in code), name


@pytest.mark.parametrize("stem", ["moe_gate_up", "moe_down"])
def test_every_half_of_the_moe_layer_multiplies_on_wgmma_what_tma_loads(stem):
    kernels = machine_code.compile_stem(NVCC, stem).kernels
    assert len(kernels) == 3 and all(kernel["wgmma"] and kernel["tma_load"] for kernel in kernels.values())


def test_grouped_gemm_fences_what_it_gathers_alone():
    """A proxy fence is a MEMBAR of the block too; TMA's copies need none."""
    for name, code in machine_code.compile_stem(NVCC, "grouped_gemm").instructions.items():
        fences = sum("MEMBAR.ALL.CTA" in before and "FENCE.VIEW.ASYNC" in text for before, text in pairwise(code))
        assert (fences > 0) == any(text.startswith("LDGSTS") for text in code), name


@pytest.mark.parametrize("stem", ["attention", "grouped_gemm", "moe_gate_up", "moe_down", "routing"])
def test_no_thread_waits_for_copies_that_others_read(stem):
    """They arrive at a barrier by themselves, and the thread that asked for them goes on. Codes of a cache in fp8 are read by who copied them."""
    copying = 0
    for name, code in machine_code.compile_stem(NVCC, stem).instructions.items():
        copies, arrives, waits = (any(text.startswith(start) for text in code) for start in ("LDGSTS", "ARRIVES.LDGSTSBAR", "LDGDEPBAR"))
        assert (arrives, waits) == ((False, True) if "unsigned char" in name else (copies, False)), name
        copying += copies
    assert copying == {"attention": 4, "grouped_gemm": 12, "routing": 2}.get(stem, 3)


@pytest.mark.parametrize("stem", ["attention", "grouped_gemm", "moe_gate_up", "moe_down", "routing"])
def test_copies_are_of_16_bytes_or_none(stem):
    """LDGSTS with ZFILL takes any number, for several instructions a copy."""
    for name, code in machine_code.compile_stem(NVCC, stem).instructions.items():
        assert not [text for text in code if text.startswith("LDGSTS") and "ZFILL" in text], name


@pytest.mark.parametrize("stem", ["attention", "grouped_gemm", "moe_gate_up", "moe_down"])
def test_proxy_fences_are_those_of_who_multiplies(stem):
    """A loader's might wait for all that it has asked for."""
    for name, code in machine_code.compile_stem(NVCC, stem).instructions.items():
        [loaders] = [i for i, text in enumerate(code) if "USETMAXREG.DEALLOC" in text]
        assert any("GMMA" in text for text in code[:loaders]) and not any("FENCE.VIEW.ASYNC" in text for text in code[loaders:]), name


def test_routing_of_many_tokens_multiplies_on_wgmma_what_tma_loads():
    kernels = machine_code.compile_stem(NVCC, "routing").kernels
    on_wgmma = {name for name, kernel in kernels.items() if kernel["wgmma"] and kernel["tma_load"]}
    assert len(on_wgmma) == 3 and on_wgmma == {name for name in kernels if "route_wgmma_kernel<" in name}


def test_softmax_of_attention_runs_beside_products():
    """Between the wait for the scores and the one for P·V, before which ptxas likes to put it."""
    for name, code in machine_code.compile_stem(NVCC, "attention").instructions.items():
        waits = [i for i, text in enumerate(code) if text.startswith("WARPGROUP.DEPBAR")]
        [(start, end)] = [pair for pair in zip(waits, waits[1:]) if code[pair[0]].endswith("0x1")]
        assert sum(text.startswith("MUFU.EX2") for text in code[start:end]) >= 64, name


def test_routing_of_few_tokens_multiplies_on_wgmma_and_waits_for_no_fence_of_the_gpu_but_a_tickets():
    compiled = machine_code.compile_stem(NVCC, "routing")
    few = [name for name in compiled.kernels if "route_few_kernel<" in name]
    assert len(few) == 2 and all(compiled.kernels[name]["wgmma"] for name in few)
    fences = [sum("MEMBAR" in text and "GPU" in text for text in compiled.instructions[name]) for name in few]
    assert sorted(fences) == [0, 1]


def test_setmaxnreg_gives_out_no_more_than_a_launch_has(stem, compiled):
    """The warpgroups that ask for more registers wait for those that others leave: for ever, where ptxas launches with fewer."""
    found = 0
    for name, code in compiled.instructions.items():
        counts = {step: int(text.split()[-1], 16) for text in code for step in ("TRY_ALLOC", "DEALLOC") if f"USETMAXREG.{step}" in text}
        if counts:
            found += 1
            assert 2 * counts["TRY_ALLOC"] + counts["DEALLOC"] <= 3 * compiled.kernels[name]["registers"], name
    assert found == {"attention": 4, "grouped_gemm": 24, "moe_down": 3, "moe_gate_up": 3}.get(stem, 0)


def test_shared_memory_is_dynamic(compiled):
    """So that it begins at a multiple of 1024 bytes, behind what the system takes, and a launch may ask for 227 KiB."""
    assert set(compiled.shared_bytes.values()) <= {0, static.SHARED_RESERVED}


def test_fences_of_the_whole_gpu_stand_at_barriers_of_the_cluster_and_tickets_alone(compiled):
    """A wait for all stores of a thread is no part of a stage's work."""
    for name, code in compiled.instructions.items():
        fences, reasons = (sum(bool(re.match(pattern, text)) for text in code) for pattern in (r"MEMBAR\.\S*GPU", r"UCGABAR_ARV|ATOMG?\b"))
        assert fences <= reasons, name


WRITES = "ST|STG|RED|ATOM|ATOMG|UTMASTG|UTMAREDG|UBLKCP"
READS = "LD|LDG|LDGSTS|UTMALDG"


# moe_down reads the routing and weights, which are not of the kernel ahead
@pytest.mark.parametrize("name, touches", [(name, f"{WRITES}|{READS}") for name in ("moe_gate_up", "routing")] + [("moe_down", f"{WRITES}|LDGSTS")])
def test_nothing_of_the_kernel_ahead_is_touched_before_the_wait_for_it(name, touches):
    for code in machine_code.compile_stem(NVCC, name).instructions.values():
        opcodes = [text.split()[0].split(".")[0] for text in code]
        assert [opcode for opcode in opcodes[: opcodes.index("ACQBULK")] if re.fullmatch(touches, opcode)] == []


def test_a_spill_and_a_serialised_wgmma_are_seen(tmp_path, monkeypatch):
    """What the rules above forbid, planted in a kernel, does not pass."""
    shutil.copytree(machine_code.CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("*.cu"))
    monkeypatch.setattr(machine_code, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(machine_code, "ROOT", tmp_path)
    (tmp_path / "csrc/spills.cu").write_text(SPILLS)
    with pytest.raises(RuntimeError, match="spilled"):
        machine_code.compile_stem(NVCC, "spills")
    (tmp_path / "csrc/serialised.cu").write_text(SERIALISED)
    assert "wgmma.mma_async instructions are serialized" in " ".join(machine_code.compile_stem(NVCC, "serialised").notices)


SPILLS = """
__global__ void __launch_bounds__(1024) spills(float* x) {
    float held[128];
    for (float& value : held) value = x[&value - held];
    __syncthreads();
    for (int round = 0; round < 9; ++round) {
#pragma unroll
        for (int i = 0; i < 128; ++i) held[i] = held[i] * held[(i * 7 + 3) % 128] + x[round];
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = held[i];
}
"""
SERIALISED = """
#include "device.h"
#include "hopper/wgmma.cuh"
using namespace llama4_kernels;
__global__ void __launch_bounds__(128) serialised(float* out, int steps) {
    const uint64_t tile = hopper::k_major(shared_memory<uint8_t>(), hopper::Swizzle::bytes_128);
    float sums[32];
    for (float& value : sums) value = 0.0f;
    hopper::wgmma_fence();
    for (int i = 0; i < steps; ++i) {
        hopper::wgmma_e4m3<64>(sums, tile, tile, true);
        hopper::wgmma_commit();
        sums[3] += 1.0f;
    }
    hopper::wgmma_wait<0>();
    for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = sums[i];
}
"""
