"""csrc/grouped_gemm.cu itself, built for the host and called through llama4_kernels/cuda/grouped_gemm.py, between guard bytes."""

from __future__ import annotations

import emulation
import planted
import pytest
import torch
from backends import assert_same_bits, forget_choices
from guards import Guarded
from test_grouped_gemm import int32, offsets_of
from torch import Tensor
from weights import FP8, linear

from llama4_kernels import BackendError, ops, use_backend
from llama4_kernels.ops import Linear, Quantized, backend
from llama4_kernels.reference import grouped_gemm as reference

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

GROUPS = [[0, 0], [1], [7, 0], [0, 64, 0], [65, 0, 1], [300], [0, 0, 300, 0], [100, 3, 197], [1] * 40, [5, 64, 65, 16, 0, 150]]
WEIGHTS = ["bf16", "tensor", "tensor static", "channel", "block"]


@pytest.fixture(scope="module")
def kernels():
    return emulation.load(emulation.build())


@pytest.fixture(scope="module")
def module(kernels):
    return emulation.op_module("grouped_gemm", kernels)


@pytest.fixture(scope="module")
def op(module):
    return module.grouped_gemm


def run(op, a: Tensor | Quantized, b: Linear, offsets: Tensor, rows: Tensor | None = None, **options) -> Tensor:
    with Guarded() as guarded:
        a = guarded(a) if isinstance(a, Tensor) else Quantized(guarded(a.codes), guarded(a.scale))
        b = Linear(*(None if x is None else guarded(x) for x in (b.weight, b.scale, b.input_scale)))
        return op(a, b, guarded(offsets), rows=None if rows is None else guarded(rows), **options)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def assert_like_reference(op, a: Tensor | Quantized, b: Linear, offsets: Tensor, rows: Tensor | None = None, **options) -> None:
    got = run(op, a, b, offsets, rows, **options)
    want = reference.grouped_gemm(a, b, offsets, rows=rows, **options)
    written = int(offsets[-1])
    assert got.dtype == want.dtype and got.shape == want.shape
    assert error(got[:written], want[:written]) < (4e-3 if got.dtype == torch.bfloat16 else 1e-5)


def quantized(rows: int, k: int, per: str) -> Quantized:
    scale = 0.01 + torch.rand({"tensor": (), "row": (rows,), "block": (rows, -(-k // 128))}[per])
    return Quantized((100 * torch.randn(rows, k)).clamp(-448, 448).to(FP8), scale)


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_ragged_groups(op, sizes, form):
    assert_like_reference(op, torch.randn(sum(sizes), 256).bfloat16(), linear(form, len(sizes), 136, 256), offsets_of(sizes))


TILES = [
    ((16, 128), [3, 0, 5], 264),
    ((64, 128), [20, 0, 30], 264),
    ((128, 128), [70, 0, 130, 1], 72),
    ((128, 128), [230], 264),
    ((128, 256), [70, 0, 130, 1], 440),  # one row tile, or two that share weights; a column tile that is not full
    ((128, 256), [0, 128, 5, 0, 256], 512),
    ((128, 256), [300, 0], 1160),  # three row tiles; five column tiles, in pairs
]


@pytest.mark.parametrize(("a", "form"), [("bf16", "bf16"), ("row", "channel"), ("block", "block")], ids=["bf16", "fp8", "fp8 scaled steps"])
@pytest.mark.parametrize("gather", [False, True], ids=["in place", "gathered"])
@pytest.mark.parametrize(("tile", "sizes", "n"), TILES, ids=str)
def test_every_tile_in_every_kind(kernels, op, tile, sizes, n, gather, a, form):
    """More steps than a large tile has stages, the last of them cut short, beside rows and channels that end inside a tile."""
    m, k = sum(sizes), 720
    assert kernels.grouped_gemm_tile(m=m, n=n, groups=len(sizes), multiprocessors=3) == tile
    activations = torch.randn(m, k).bfloat16() if a == "bf16" else quantized(m, k, a)
    rows = torch.randperm(m, dtype=torch.int32) if gather else None
    assert_like_reference(op, activations, linear(form, len(sizes), n, k), offsets_of(sizes), rows)


@pytest.mark.parametrize(
    ("m", "n", "groups", "tile"),
    [
        (8192, 8192, 16, (128, 256)),
        (8192, 2048, 16, (128, 256)),
        (8192, 2048, 128, (128, 256)),  # 8 rounds, of the small tile 16
        (1024, 2048, 16, (128, 256)),  # 128 tiles for 132 multiprocessors; 256 of the small ones would be two rounds
        (1024, 2048, 1, (128, 128)),  # one round with either; 64 wide tiles would leave half of the multiprocessors idle
        (8192, 768, 16, (128, 256)),  # 3 column tiles are 2 pairs: 3 rounds, of the small tile 4
        (8192, 640, 16, (128, 128)),  # 3 rounds with either
        (8192, 128, 16, (128, 128)),  # three of four wide tiles would be empty
        (64, 2048, 2, (64, 128)),
        (64, 2048, 16, (16, 128)),
        (1, 8192, 16, (16, 128)),
    ],
)
def test_which_tile(kernels, m, n, groups, tile):
    assert kernels.grouped_gemm_tile(m=m, n=n, groups=groups, multiprocessors=132) == tile


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (17, 48), (128, 128), (130, 144), (200, 1040), (264, 640)])
@pytest.mark.parametrize("form", ["bf16", "channel"])
def test_tails_of_n_and_k(op, n, k, form, out_dtype):
    assert_like_reference(op, torch.randn(72, k).bfloat16(), linear(form, 2, n, k), int32(0, 65, 72), out_dtype=out_dtype)


@pytest.mark.parametrize("per", ["tensor", "row", "block"])
@pytest.mark.parametrize("form", ["tensor", "channel", "block"])
@pytest.mark.parametrize(("sizes", "n"), [([9, 0, 3], 200), ([130, 20], 200), ([130, 20], 440)], ids=str)
def test_activations_with_every_scale(op, sizes, n, form, per):
    a, b = quantized(sum(sizes), 400, per), linear(form, len(sizes), n, 400)
    assert_like_reference(op, a, b, offsets_of(sizes), out_dtype=torch.float32)


@pytest.mark.parametrize("a", ["bf16", "tensor", "row", "block"])
@pytest.mark.parametrize(("sizes", "n"), [([4, 0, 3], 72), ([70, 50], 72), ([0, 260], 72), ([0, 260], 440)], ids=str)
def test_rows_are_gathered(op, sizes, n, a):
    activations = torch.randn(41, 656).bfloat16() if a == "bf16" else quantized(41, 656, a)
    rows = torch.randint(0, 41, (sum(sizes),), dtype=torch.int32)
    assert_like_reference(op, activations, linear("bf16" if a == "bf16" else "channel", len(sizes), n, 656), offsets_of(sizes), rows)


@pytest.mark.parametrize("form", ["bf16", "channel", "block"])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("n", [72, 440])
def test_what_stands_past_the_last_group_does_not_matter(op, form, gather, n):
    """NaN in its activations, rows out of range: the groups' rows keep their bits, and no byte past the output changes."""
    a, b, offsets = torch.randn(90, 256).bfloat16(), linear(form, 2, n, 256), int32(0, 40, 70)
    clean = run(op, a, b, offsets)
    a[70:] = float("nan")
    rows = torch.cat([torch.arange(70), torch.tensor([10**6, -1])]).int() if gather else None
    assert_same_bits(run(op, a, b, offsets, rows)[:70], clean[:70])


@pytest.mark.parametrize("form", ["bf16", "channel", "block"])
@pytest.mark.parametrize(("sizes", "n"), [([4, 2], 72), ([70, 60], 72), ([150, 60], 440)], ids=str)
def test_a_row_of_nan_touches_no_other_row(op, sizes, n, form):
    a, b, offsets = torch.randn(sum(sizes), 256).bfloat16(), linear(form, 2, n, 256), offsets_of(sizes)
    clean = run(op, a, b, offsets)
    a[2] = float("nan")
    spoilt = run(op, a, b, offsets)
    others = [row for row in range(sum(sizes)) if row != 2]
    assert spoilt[2].isnan().all()
    assert_same_bits(spoilt[others], clean[others])


@pytest.mark.parametrize("form", ["bf16", "channel", "block"])
@pytest.mark.parametrize("n", [200, 440])
def test_gives_the_same_bits_however_threads_take_turns(op, form, n):
    a, b, offsets = torch.randn(300, 640).bfloat16(), linear(form, 3, n, 640), int32(0, 1, 90, 300)
    assert_same_bits(*(run(op, a, b, offsets) for _ in range(2)))


def test_more_groups_than_a_warp_has_lanes(op):
    sizes = [(i * 7) % 5 for i in range(200)]
    assert_like_reference(op, torch.randn(sum(sizes), 128).bfloat16(), linear("channel", 200, 16, 128), offsets_of(sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_of_fp32_are_quantised_for_fp8_weights(op, dtype):
    assert_like_reference(op, torch.randn(10, 256).to(dtype), linear("tensor static", 1, 16, 256), int32(0, 10))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (torch.ones(2, 16), linear("fp32", 1, 8, 16), "float32 is multiplied with float32: the tensor cores take bfloat16 for both"),
        (torch.ones(2, 16), linear("bf16", 1, 8, 16), "float32 is multiplied with bfloat16"),
        (torch.ones(2, 12).bfloat16(), linear("bf16", 1, 8, 12), "a row of b.weight has 24 bytes, not a multiple of 16"),
        (torch.ones(2, 24).bfloat16(), linear("channel", 1, 8, 24), "a row of b.weight has 24 bytes, not a multiple of 16"),
        (torch.ones(2, 144).bfloat16(), linear("block", 1, 8, 144), "K is 144, not a multiple of 128, and a is to be quantised per 128"),
        (torch.ones(2, 16).bfloat16(), Linear(torch.ones(4097, 1, 16).bfloat16()), "b has 4097 groups, above 4096"),
        (torch.ones(33).bfloat16()[1:].view(2, 16), linear("bf16", 1, 8, 16), "a begins at an address that is not a multiple of 16"),
    ],
)
def test_arguments_that_it_does_not_take(module, monkeypatch, a, b, reason):
    """Asked for, they are an error; under `auto` the next backend computes them."""
    offsets = torch.full((len(b.weight) + 1,), 2, dtype=torch.int32)
    offsets[0] = 0
    assert module.why_not_grouped_gemm(a, b, offsets).startswith(reason)
    find = backend._in_module
    monkeypatch.setattr(backend, "_why_not", lambda name, op, device, dtype: "" if name != "triton" else "no GPU")
    monkeypatch.setattr(backend, "_in_module", lambda name, op, of: getattr(module, of) if name == "cuda" else find(name, op, of))
    forget_choices()
    try:
        with use_backend("cuda"), pytest.raises(BackendError, match=f"asks for cuda to compute grouped_gemm on cpu, but {reason}"):
            ops.grouped_gemm(a, b, offsets)
        assert_same_bits(ops.grouped_gemm(a, b, offsets), reference.grouped_gemm(a, b, offsets))
    finally:
        monkeypatch.undo()
        forget_choices()


NAN = "nan"
PLANTED = {
    "a stage handed back too early": (
        "gemm_tile.cuh", "«hopper::wgmma_wait<STEPS - 1>();»\n                if (STEPS == 2) release", "", "may still read"),
    "nobody's first turn": ("issue_turns.cuh", "if (warpgroup_ == 1) pass();", ";", "deadlock"),
    "a gathered tile's scales beside another step than its last": (
        "grouped_gemm.cu", "fp8_scaled_steps || «step + 1 == problem.steps»", "step == 1", "wrong|nan"),
    "a tile's scales beside another step than its last": ("grouped_gemm.cu", "SHARE > 0 && «step + 1 == problem.steps»", "step == 1", "wrong|nan"),
    "the second set's weights for the first": (
        "gemm_tile.cuh", "advanced(weights, «set» * Shape::SET_CHANNELS * Shape::ROW_BYTES", "1 - set", "wrong"),
    "the first set's channels for both": (
        "grouped_gemm.cu", "const int channel = first_channel + «set» * Shape::SET_CHANNELS, columns", "0", NAN),
    "a stage handed back to its own block alone": (
        "gemm_tile.cuh", "arrive_remote(«lane»);", "hopper::cluster_rank()", "may still read|still writes|another copy|deadlock"),
    "a stage handed back to the first block alone": ("gemm_tile.cuh", "if («lane < Shape::CLUSTER»)", "lane == 0", "deadlock"),
    "a part that both blocks load": ("grouped_gemm.cu", "part == int(cluster_rank())", "part == 0", "another copy|lacks|more"),
    "shared weights for another column tile": (
        "grouped_gemm.cu", "tile.column_tile * 2 + «turn», Shared", "rank", NAN),
    "a row tile taken twice": ("grouped_gemm.cu", "+ («rank» - turn) * Shape::TOKENS", "1", NAN),
    "a block that does not wait for the other": ("grouped_gemm.cu", "«cluster_sync();»  // the other", "", "which has ended"),
    "half a tile's tokens staged in place of the others": ("epilogue.cuh", "«first / 2» + i * 8", "0", "wrong"),
    "a token past the group stored": ("grouped_gemm.cu", "int rows = «tile.end_row» -", "1 + tile.end_row", "guard"),
    "scales of the next token": ("epilogue.cuh", "sums[i] *= «scales.x»;", "scales.y", "wrong"),
    "a gather without its proxy fence": (
        "gemm_tile.cuh", "if (GATHERED) hopper::fence_async_proxy();", "", "neither who copied nor all who multiply had a fence_async_proxy"),
    "a gather that arrives before it is there": (
        "grouped_gemm.cu", "cp_async_arrive(stages.pipeline.full[at.stage]);", "stages.pipeline.full[at.stage].arrive();",
        "a copy under way still writes|another copy"),
    "a gather that arrives before it is there, in a small tile": (
        "grouped_gemm.cu", "cp_async_arrive(stages.pipeline.full[at.stage]);", "stages.pipeline.full[at.stage].arrive();",
        "a copy under way still writes|another copy"),
    "scales of a gathered tile that nobody publishes": (
        "grouped_gemm.cu", "if (Shape::FP8) stages.pipeline.full[at.stage].arrive();", ";", "lacks 128 of 257 arrivals"),
    "scales of a tile that nobody publishes": (
        "grouped_gemm.cu", "if (SHARE > 0) stages.pipeline.full[at.stage].arrive();", "", "lacks 32 of 33 arrivals"),
    "a group's first row off by one": ("tile_scheduler.cuh", "int first_row = «offsets_[group]»", "1 + offsets_[group]", NAN),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_noticed(bug):
    seen = what_is_seen(bug)
    assert any(word in seen for word in PLANTED[bug][3].split("|")), seen


def what_is_seen(bug: str | None) -> str:
    op = emulation.op_module("grouped_gemm", planted.kernels({name: found[:3] for name, found in PLANTED.items()}, bug)).grouped_gemm
    n = 72 if bug and "small" in bug else 440
    a, b, offsets = quantized(300, 1040, "row"), linear("channel", 3, n, 1040), int32(0, 1, 300, 300)
    rows = torch.randint(0, 300, (300,), dtype=torch.int32) if bug and "gather" in bug else None
    try:
        got = run(op, a, b, offsets, rows)
    except (RuntimeError, AssertionError) as noticed:
        return str(noticed) or "guard"
    if got.isnan().any():
        return NAN
    return "wrong" if error(got, reference.grouped_gemm(a, b, offsets, rows=rows)) > 4e-3 else "nothing"


def test_without_a_bug_nothing_is_noticed():
    assert what_is_seen(None) == "nothing"


def test_sanitizers_watch_every_path():
    done = emulation.run_sanitized_kernels(RUN_SANITIZED)
    assert done.returncode == 0, done.stderr


RUN_SANITIZED = """
def floats(count): return libc.calloc(ctypes.c_size_t(count), ctypes.c_size_t(4))
def rows_of(count, size): return libc.aligned_alloc(ctypes.c_size_t(16), ctypes.c_size_t(count * size))
k = 272
for sizes, n in (([2, 0, 1], 136), ([60, 3, 1], 136), ([130, 0, 7], 136), ([130, 0, 7], 392)):
    m = sum(sizes)
    offsets = (ctypes.c_int * 4)(*(sum(sizes[:i]) for i in range(4)))
    rows = (ctypes.c_int * m)(*range(m))
    for dtype, element, a_dimensions, b_dimensions in (("bfloat16", 2, 0, 0), ("float8_e4m3fn", 1, 1, 2), ("float8_e4m3fn", 1, 2, 3)):
        for gathered in (0, ctypes.addressof(rows)):
            out = libc.aligned_alloc(ctypes.c_size_t(16), ctypes.c_size_t(m * n * 2))
            kernels.grouped_gemm(
                a=rows_of(m, k * element), b=rows_of(3 * n, k * element), dtype=getattr(kernels.Dtype, dtype), out=out,
                out_dtype=kernels.Dtype.bfloat16, a_rows=m, m=m, n=n, k=k, groups=3, offsets=ctypes.addressof(offsets), rows=gathered,
                a_scale=floats(m if a_dimensions == 1 else m * 3), a_scale_dimensions=a_dimensions,
                b_scale=floats(3 * n if b_dimensions == 2 else 3 * -(-n // 128) * 3), b_scale_dimensions=b_dimensions, stream=0)
"""
