"""The host emulation itself: a pipelined GEMM comes out right, and each bug planted in it is reported."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import emulation
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

GEMM = Path(__file__).with_name("gemm.cu")
ROWS = torch.arange(128, dtype=torch.int32).flip(0).remainder(77).contiguous()


@pytest.fixture(scope="module")
def gemm():
    library = ctypes.CDLL(str(emulation.build(sources=[GEMM])))
    library.run_gemm.restype = ctypes.c_char_p
    return library.run_gemm


def codes(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).to(torch.float8_e4m3fn)


def run(gemm, k: int, rows: Tensor | None = None, bug: str = "") -> tuple[str, Tensor, Tensor]:
    """The error, C as computed, and C as it should be."""
    a, b = codes(128 if rows is None else 77, k), codes(64, k)
    c = torch.zeros(128, 64, dtype=torch.bfloat16)
    pointers = [ctypes.c_void_p(x.data_ptr()) if x is not None else None for x in (a, b, c, rows)]
    error = gemm(*pointers, len(a), 128, 64, k, bug.encode()).decode()
    gathered = a.float() if rows is None else a.float()[rows.long()]
    return error, c, (gathered @ b.float().t()).bfloat16()


@pytest.mark.parametrize("rows", [None, ROWS], ids=["tma", "gathered"])
@pytest.mark.parametrize("k", [128, 256, 640])
def test_a_pipelined_gemm(gemm, k, rows):
    error, got, want = run(gemm, k, rows)
    assert error == ""
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)


BUGS = {
    "no wait for the data": "a copy under way still writes|may still read",
    "a parity that never turns": "deadlock|a copy under way still writes|may still read",
    "an inverted parity": r"deadlock(.|\n)*for an mbarrier at shared byte 40976, parity 0; it is in phase 0 and lacks 1 of 1 arrivals",
    "no wait for wgmma": "a copy to shared memory that the wgmma at gemm.cu:[0-9]+ may still read",
    "release before the wait for wgmma": "a copy to shared memory that the wgmma at gemm.cu:[0-9]+ may still read",
    "no fence before wgmma": "wgmma_fence is missing",
    "more arrivals than expected": "more arrivals at the mbarrier than the 1 of its phase|a copy .*may still read",
    "no arrival": r"deadlock(.|\n)*from 128 to 159: waits at gemm.cu:[0-9]+ for an mbarrier",
    "more bytes expected than come": r"deadlock(.|\n)*lacks 0 of 1 arrivals and 8192 bytes",
    "fewer bytes expected than come": "a copy under way still writes",
    "a misaligned destination": "misaligned copy: the destination is not a multiple of 1024",
    "a misaligned coordinate": "misaligned copy: coordinate 0 is not a multiple of 16 bytes",
    "a destination past the end": "out of bounds: the destination and its 8192 bytes exceed",
    "too little shared memory": "the mbarrier is not in shared memory, or past its end",
    "unequal descriptors": "descriptors or shapes differ within the warpgroup",
    "a product that one thread leaves out": "commit different products|descriptors or shapes differ within the warpgroup",
    "barriers invisible to copies": "fence_barrier_init is missing",
    "a barrier initialised twice": "the mbarrier is initialised twice",
    "an mbarrier written over": "the mbarrier was overwritten",
    "more registers than there are": "setmaxnreg gives out 40960 registers, the launch had 40800",
    "plain writes before a store": "the store reads plain writes to shared memory without a fence_async_proxy",
    "a store with a negative coordinate": "gemm.cu:[0-9]+.*a store with a negative coordinate",
    "a store that nobody waits for": "a thread ends before its bulk stores have read shared memory",
    "a barrier of two sizes": "named barrier|others say",
    "a barrier of another size": "waits at gemm.cu:[0-9]+ for named barrier 1",
    "an arrival before cp.async": "wgmma reads shared memory that a copy under way still writes|another copy under way",
    "no proxy fence after cp.async": "wgmma reads what cp.async wrote, and neither .* had a fence_async_proxy since",
    "a proxy fence after cp.async by one warp alone": "wgmma reads what cp.async wrote, and neither .* had a fence_async_proxy since",
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_reported_where_it_is(gemm, bug):
    error, _, _ = run(gemm, 640, ROWS if "cp.async" in bug else None, bug)
    assert re.search(BUGS[bug], error), error


@pytest.mark.parametrize("bug", ["", "a write past the end"])
def test_address_sanitizer_watches_shared_memory(bug):
    module = emulation.build(sources=[GEMM], sanitize=True)
    run = emulation.run_sanitized(RUN_SANITIZED, str(module), bug)
    if bug:
        assert run.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in run.stderr, run.stderr
    else:
        assert run.returncode == 0, run.stderr


RUN_SANITIZED = """
import ctypes, sys
gemm = ctypes.CDLL(sys.argv[1]).run_gemm
gemm.restype = ctypes.c_char_p
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype = ctypes.c_void_p
for bug in (sys.argv[2], ""):
    sizes = (64 * 384, 64 * 384, 2 * 64 * 64)
    a, b, c = (ctypes.c_void_p(libc.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(size))) for size in sizes)
    assert gemm(a, b, c, None, 64, 64, 64, 384, bug.encode()) == b""
"""


@pytest.mark.parametrize(("together", "says"), [(1, "deadlock"), (2, "deadlock"), (3, "")])
def test_as_many_blocks_take_turns_as_a_test_asks_for(tmp_path, together, says):
    source = tmp_path / "meeting.cu"
    source.write_text(MEETING)
    library = ctypes.CDLL(str(emulation.build(sources=[source])))
    library.meet.restype = ctypes.c_char_p
    error = library.meet(together).decode()
    assert error.startswith(says) and bool(error) == bool(says)


MEETING = """
#include "device.h"
#include "hopper/memory.cuh"
using namespace llama4_kernels;
__global__ void meeting(unsigned* arrived) {
    if (threadIdx.x == 0) ++*arrived;
    while (hopper::load_acquire(arrived) < gridDim.x) {
    }
}
extern "C" __attribute__((visibility("default"))) const char* meet(unsigned together) {
    static std::string error;
    unsigned arrived = 0;
    emulation::clusters_together = together;
    try {
        launch(LaunchConfig{"meeting", dim3(3), dim3(64), 1024, nullptr}, &meeting, &arrived);
        return "";
    } catch (const std::exception& caught) {
        error = caught.what();
        return error.c_str();
    }
}
"""


@pytest.mark.parametrize(
    ("bug", "says"),
    [
        ("", ""),
        ("no barrier first", "an access to block [01] of the cluster, which may not have begun"),
        ("no barrier last", "an access to block [01] of the cluster, which has ended|read -?nan"),
    ],
)
def test_blocks_reach_one_another_only_while_both_run(tmp_path, bug, says):
    source = tmp_path / "neighbours.cu"
    source.write_text(NEIGHBOURS)
    library = ctypes.CDLL(str(emulation.build(sources=[source])))
    library.neighbours.restype = ctypes.c_char_p
    errors = [library.neighbours(bug == "no barrier first", bug == "no barrier last").decode() for _ in range(8)]
    assert any(re.search(says, error) for error in errors) and any(errors) == bool(bug), errors


NEIGHBOURS = """
#include "device.h"
#include "hopper/cluster.cuh"
using namespace llama4_kernels;
__global__ void read_neighbour(float* out, bool not_first, bool not_last) {
    float* own = shared_memory<float>();
    own[threadIdx.x] = 1.0f;
    if (!not_first) hopper::cluster_sync();
    const float* theirs = hopper::remote_shared(own + threadIdx.x, 1 - hopper::cluster_rank());
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = *theirs;
    if (!not_last) hopper::cluster_sync();
}
extern "C" __attribute__((visibility("default"))) const char* neighbours(bool not_first, bool not_last) {
    static std::string error;
    error.clear();
    float out[2 * 64];
    try {
        launch(LaunchConfig{"neighbours", dim3(2), dim3(64), 1024, nullptr, 2}, &read_neighbour, &out[0], not_first, not_last);
        for (float value : out) error = value == 1.0f ? error : "read " + std::to_string(value);
    } catch (const std::exception& caught) {
        error = caught.what();
    }
    return error.c_str();
}
"""
