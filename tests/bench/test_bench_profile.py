"""`llama4-kernels profile`: counters by a stand-in for ncu, and the static figures of the real kernels."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from llama4_kernels import cuda
from llama4_kernels.bench import ncu, static, workloads
from llama4_kernels.cli.main import app

RAW_PAGE = """==PROF== Connected to process 1 (/usr/bin/python3.12)
==PROF== Profiling "_gate_up_kernel": 0%....50%....100% - 8 passes
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum",{percents},"launch__registers_per_thread"
"","","","ns","byte","%","%","%","register/thread"
"0","1","_gate_up_kernel","41,500","180,000,000","92.5","30.1","24.9","168"
"1","1","_down_kernel","20,500","90,000,000","88.0","21.0","12.4","128"
""".replace("{percents}", ",".join(f'"{ncu.METRICS[name]}"' for name in ("memory_percent", "sm_percent", "occupancy_percent")))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program that answers as ncu would, before this process and its GPU are asked for."""

    def put(output: str, code: int = 0) -> None:
        program = tmp_path / "ncu"
        (tmp_path / "output").write_text(output)
        program.write_text(f"#!/bin/sh\ncat {tmp_path / 'output'}\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(ncu, "why_not", lambda: "")

    return put


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["profile", *arguments])


def test_counters_are_set_against_the_floor(stand_in):
    stand_in(RAW_PAGE)
    ran = invoke("fused_moe", "fp8/scout/tp8/t64", "--backend", "triton")
    assert ran.exit_code == 0, ran.output
    assert "_gate_up_kernel" in ran.output and "92.5" in ran.output
    assert "2 launches, 62 µs in kernels" in ran.output and "moved 270 MB" in ran.output


def test_counters_are_in_our_units():
    first, second = ncu.parse_csv(RAW_PAGE)
    assert (first.us, first.bytes, first.memory_percent, first.registers) == (41.5, 180e6, 92.5, 168)
    assert second.kernel == "_down_kernel" and ncu.parse_csv("==PROF== nothing\n") == []


def test_where_counters_are_forbidden_their_reason_and_static_figures_are_shown(stand_in):
    stand_in("==ERROR== ERR_NVGPUCTRPERM - no permission to access the counters\n", code=1)
    ran = invoke("quantize_per_token", "fp8/scout/tp8/t64", "--backend", "triton")
    assert ran.exit_code == 0, ran.output
    assert "ERR_NVGPUCTRPERM" in ran.output and "static figures" in ran.output and "registers" in ran.output


# Of NVIDIA's occupancy calculator for compute capability 9.0: registers, shared bytes and warps of a block -> resident warps
@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [
        (32, 0, 8, 64),
        (64, 0, 8, 32),
        (128, 0, 4, 16),
        (255, 0, 4, 8),
        (168, 227 * 1024, 12, 12),
        (40, 49152, 4, 16),
        (16, 0, 1, 32),
        (65, 0, 8, 24),
    ],
)
def test_occupancy(registers, shared, warps, resident):
    assert static.occupancy(registers, shared, warps) == resident / 64


@pytest.mark.compile
def test_static_figures_are_those_of_the_kernels_that_the_workload_launches():
    kernels = {kernel.name.split("[")[0]: kernel for kernel in static.triton_kernels(workloads.parse("fused_moe/fp8/scout/tp8/t64"))}
    assert {"_gate_up_kernel", "_down_kernel"} < set(kernels)
    for kernel in kernels.values():
        assert 16 <= kernel.registers <= 255 and 0 < kernel.occupancy <= 1 and kernel.instructions["instructions"] > 100
    assert kernels["_gate_up_kernel"].instructions["wgmma"] > 0


@pytest.mark.compile
def test_a_layer_shows_the_kernels_of_its_ops():
    names = {
        kernel.name.split("[")[0]
        for kernel in static.triton_kernels(workloads.parse("attention_part/bf16/scout/tp8/local/b1/q1/c8192/p64"))
    }
    assert any("rope" in name for name in names) and any("split" in name for name in names)


@pytest.mark.skipif(bool(cuda.why_not_built()), reason=cuda.why_not_built() or "-")
def test_the_extension_s_kernels_are_found_by_op():
    found = static.cuda_kernels(workloads.parse("quantize_per_token/fp8/scout/tp8/t64"))
    assert found and all(kernel.name.startswith("quantize_") for kernel in found)
    assert all(kernel.registers > 0 and kernel.instructions["instructions"] > 100 for kernel in found)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fused_moe", "fp8"], "workload is 'fused_moe/fp8'"),
        (["fused_moe", "fp8/scout/tp8/t1", "--backend", "reference"], "needs one of cuda, triton"),
    ],
)
def test_what_cannot_be_profiled_is_said(arguments, complaint):
    ran = invoke(*arguments)
    assert ran.exit_code == 2 and complaint in ran.output


def test_interpreted_kernels_are_not_looked_at(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = invoke("quantize_per_token", "fp8/scout/tp8/t64")
    assert ran.exit_code == 2 and "TRITON_INTERPRET is set, needs to be unset" in ran.output
