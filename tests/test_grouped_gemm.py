"""grouped_gemm against float64 products of the dequantised numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backends import assert_passes_opcheck, assert_product, assert_replays, assert_same_bits, compute, device_of, sums_in_short, to
from llama4_kernels import ops
from llama4_kernels.ops import Linear, Quantized
from llama4_kernels.reference import grouped_gemm as reference
from weights import FORMS, FP8, activation_value, linear, quantized_value, value

SIZES = st.lists(st.sampled_from([0, 0, 1, 2, 7, 33]), min_size=1, max_size=5)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def assert_groups(got: Tensor, a: Tensor, b: Linear, offsets: Tensor, in_short: bool) -> None:
    """got's rows of each group are a · bᵀ of it; `a` in float64. in_short: see backends.sums_in_short."""
    weights = value(b)
    for group, (start, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        assert_product(got[start:end], a[start:end], weights[group], in_short)


@given(
    sizes=SIZES,
    shape=st.sampled_from([(1, 1), (17, 40), (128, 128), (130, 208)]),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    out_dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_every_form_of_weight(backend, sizes, shape, form, dtype, out_dtype):
    b, offsets = linear(form, len(sizes), *shape), offsets_of(sizes)
    a = torch.randn(sum(sizes), shape[1]).to(dtype)
    got = compute(backend, "grouped_gemm", a, b, offsets, out_dtype=out_dtype)
    assert got.dtype == out_dtype and got.shape == (sum(sizes), shape[0])
    assert_groups(got, quantized_value(a, form, b.input_scale), b, offsets, sums_in_short(backend, b))


@given(
    sizes=SIZES,
    shape=st.sampled_from([(17, 40), (130, 208), (64, 384)]),
    form=st.sampled_from(["tensor", "tensor static", "channel", "block"]),
    per=st.sampled_from(["tensor", "row", "block"]),
)
def test_quantized_activations_with_every_scale(backend, sizes, shape, form, per):
    b, offsets = linear(form, len(sizes), *shape), offsets_of(sizes)
    rows, columns = sum(sizes), shape[1]
    scale = 0.01 + torch.rand({"tensor": (), "row": (rows,), "block": (rows, -(-columns // 128))}[per])
    a = Quantized((100 * torch.randn(rows, columns)).clamp(-448, 448).to(FP8), scale)
    got = compute(backend, "grouped_gemm", a, b, offsets, out_dtype=torch.float32)
    assert_groups(got, activation_value(a), b, offsets, sums_in_short(backend, b))


@pytest.mark.small
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_gathered(backend, form):
    offsets, rows = int32(0, 2, 2, 7), int32(3, 3, 0, 4, 1, 2, 0)
    b, a = linear(form, 3, 24, 144), torch.randn(5, 144)
    got = compute(backend, "grouped_gemm", a, b, offsets, rows=rows, out_dtype=torch.float32)
    assert_groups(got, quantized_value(a, form, b.input_scale)[rows.long()], b, offsets, sums_in_short(backend, b))


@pytest.mark.small
@pytest.mark.parametrize("form", ["fp32", "channel"])
def test_what_stands_past_the_last_group_does_not_matter(backend, form):
    offsets = int32(0, 3, 5)
    b, a = linear(form, 2, 24, 144), torch.randn(9, 144)
    a[5:] = float("nan")
    got = compute(backend, "grouped_gemm", a, b, offsets, out_dtype=torch.float32)
    assert got.shape == (9, 24)
    assert_groups(got[:5], quantized_value(a[:5], form), b, offsets, sums_in_short(backend, b))
    gathered = compute(backend, "grouped_gemm", a, b, offsets, rows=int32(0, 1, 2, 3, 4, 10**6, -1), out_dtype=torch.float32)
    assert_same_bits(gathered[:5], got[:5])


@pytest.mark.small
def test_a_row_of_nan_touches_no_other_row(backend):
    a, b, offsets = torch.randn(6, 144), linear("channel", 2, 24, 144), int32(0, 4, 6)
    clean = compute(backend, "grouped_gemm", a, b, offsets)
    a[2] = float("nan")
    spoilt = compute(backend, "grouped_gemm", a, b, offsets)
    others = [0, 1, 3, 4, 5]
    assert spoilt[2].isnan().all()
    assert_same_bits(spoilt[others], clean[others])


@pytest.mark.small
def test_gives_the_same_bits_twice(backend):
    a, b, offsets = torch.randn(70, 304), linear("channel", 3, 130, 304), int32(0, 1, 40, 70)
    assert_same_bits(*(compute(backend, "grouped_gemm", a, b, offsets) for _ in range(2)))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_replays_in_a_cuda_graph(graph_backend, form, gathered):
    rows, n, k = (70, 256, 512) if device_of(graph_backend).type == "cuda" else (20, 24, 128)

    def given(*offsets: int) -> tuple[tuple, dict]:
        a = torch.randn(rows, k).to(torch.float32 if form == "fp32" else torch.bfloat16)
        return (a, linear(form, 3, n, k), int32(*offsets)), {"rows": torch.randint(0, rows, (rows,)).int()} if gathered else {}

    assert_replays(graph_backend, "grouped_gemm", given(0, 1, rows // 2, rows), given(0, rows - 3, rows - 3, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bf16", "channel", "block"])
@pytest.mark.parametrize("rows", [1, 64, 300, 4096])
def test_a_layer_of_scout(gpu_backend, rows, form):
    a, b = torch.randn(rows, 5120).bfloat16(), linear(form, 16, 2048, 5120)
    offsets = offsets_of(torch.multinomial(torch.ones(16), rows, replacement=True).bincount(minlength=16).tolist())
    got = compute(gpu_backend, "grouped_gemm", a, b, offsets)
    want = reference.grouped_gemm(*to((a, b, offsets), torch.device("cuda"))).cpu()
    assert (got.double() - want.double()).norm() <= 4e-3 * want.double().norm()


@pytest.mark.parametrize("rows", [None, int32(0, 1, 2)])
def test_the_scale_of_a_row_that_is_not_read_does_not_matter(rows):
    a = Quantized(torch.ones(3, 8).to(FP8), torch.tensor([0.0, float("nan"), -1.0]))
    out = ops.grouped_gemm(a, Linear(F8, torch.zeros(2)), int32(0, 1, 2), rows=rows)
    assert (out[0] == 0).all() and out[1].isnan().all()


@pytest.mark.parametrize(("form", "rows"), [("bf16", None), *((form, int32(0, 0, 1)) for form in FORMS)])
def test_opcheck(backend, form, rows):
    a = torch.randn(3, 128).to(torch.float32 if form == "fp32" else torch.bfloat16)
    assert_passes_opcheck(backend, "grouped_gemm", a, linear(form, 2, 24, 128), int32(0, 1, 3), rows=rows)


@pytest.mark.parametrize("per", ["tensor", "row", "block"])
def test_opcheck_of_quantized_activations(backend, per):
    a = Quantized(torch.randn(3, 128).to(FP8), torch.rand({"tensor": (), "row": (3,), "block": (3, 1)}[per]))
    assert_passes_opcheck(backend, "grouped_gemm", a, linear("channel", 2, 24, 128), int32(0, 1, 3), out_dtype=torch.float32)


F8 = torch.ones(2, 4, 8).to(FP8)


def test_without_groups_no_row_belongs_to_one(backend):
    out = compute(backend, "grouped_gemm", torch.ones(3, 16).bfloat16(), Linear(torch.ones(0, 8, 16).bfloat16()), int32(0))
    assert out.shape == (3, 8)


A, B, OFFSETS = torch.ones(3, 8), Linear(torch.ones(2, 4, 8)), int32(0, 1, 3)
CODES = torch.ones(3, 8).to(FP8)


@pytest.mark.parametrize(
    ("a", "b", "offsets", "more", "error", "message"),
    [
        (A.half(), B, OFFSETS, {}, TypeError, "a has dtype float16, needs bfloat16 or float32"),
        (A[0], B, OFFSETS, {}, ValueError, r"a has shape \[8\], needs \[M, K\]"),
        (torch.ones(8, 3).t(), B, OFFSETS, {}, ValueError, "a has strides"),
        (Quantized(A, torch.ones(3)), B, OFFSETS, {}, TypeError, "a.codes has dtype float32, needs float8_e4m3fn"),
        (Quantized(CODES, torch.ones(4)), B, OFFSETS, {}, ValueError, r"a.scale has shape \[4\], needs \[\] per tensor or \[3\] per row"),
        (Quantized(CODES, None), B, OFFSETS, {}, TypeError, "a.scale is NoneType, needs a float32 Tensor"),
        (Quantized(CODES, torch.ones(3).double()), B, OFFSETS, {}, TypeError, "a.scale has dtype float64, needs float32"),
        (Quantized(CODES, torch.ones(3)), B, OFFSETS, {}, TypeError, "a is Quantized, needs a bfloat16 or float32 Tensor"),
        (A, B.weight, OFFSETS, {}, TypeError, "b is Tensor, needs a Linear"),
        (A, Linear(torch.ones(2, 4, 9)), OFFSETS, {}, ValueError, r"b.weight has shape \[2, 4, 9\], needs \[E, N, 8\]"),
        (A, Linear(torch.ones(2, 8, 4).mT), OFFSETS, {}, ValueError, "b.weight has strides .* needs to be contiguous"),
        (A, Linear(B.weight, torch.ones(2)), OFFSETS, {}, ValueError, "b.scale is given with a float32 weight, needs to be None"),
        (A, Linear(B.weight, None, torch.ones(())), OFFSETS, {}, ValueError, "b.input_scale is given with a float32 weight"),
        (A, Linear(F8), OFFSETS, {}, TypeError, "b.scale is NoneType, needs a float32 Tensor"),
        (A, Linear(F8, torch.ones(3)), OFFSETS, {}, ValueError,
         r"b.scale has shape \[3\], needs \[2\] per tensor or \[2, 4\] per channel or \[2, 1, 1\]"),
        (A, Linear(F8, torch.ones(2), torch.ones(2)), OFFSETS, {}, ValueError, r"b.input_scale has shape \[2\], needs \[\]"),
        (A, Linear(F8, torch.tensor([1.0, -1.0])), OFFSETS, {}, ValueError, "b.scale holds values from -1 to 1, needs finite ones of at least 0"),
        (A, Linear(F8, torch.ones(2), torch.tensor(-1.0)), OFFSETS, {}, ValueError, "b.input_scale holds values from -1 to -1, needs finite"),
        (Quantized(CODES, torch.tensor([1.0, -1.0, 1.0])), Linear(F8, torch.ones(2)), OFFSETS, {}, ValueError,
         "a.scale holds values from -1 to 1, needs at least 0"),
        (A, B, int32(0, 3), {}, ValueError, r"offsets has shape \[2\], needs \[3\]"),
        (A, B, OFFSETS.long(), {}, TypeError, "offsets has dtype int64, needs int32"),
        (A, B, OFFSETS.to("meta"), {}, ValueError, "offsets is on meta, needs cpu"),
        (A, B, int32(0, 1, 4), {}, ValueError, r"offsets is \[0, 1, 4\], needs to start at 0, never fall, and end at most at 3"),
        (A, B, int32(0, 2, 1), {}, ValueError, r"offsets is \[0, 2, 1\], needs"),
        (A, B, int32(1, 2, 3), {}, ValueError, r"offsets is \[1, 2, 3\], needs"),
        (A, B, OFFSETS, {"rows": int32(0, 1, 3)}, ValueError, "rows holds values from 0 to 3, needs 0 to 2, the 3 rows of a"),
        (A, B, OFFSETS, {"rows": int32(0, -1, 0)}, ValueError, "rows holds values from -1 to 0, needs 0 to 2"),
        (A, B, OFFSETS, {"rows": torch.tensor([0, 1, 2])}, TypeError, "rows has dtype int64, needs int32"),
        (A, B, OFFSETS, {"rows": int32(0, 1, 2).to("meta")}, ValueError, "rows is on meta, needs cpu"),
        (A, B, OFFSETS, {"out_dtype": torch.float16}, TypeError, "out_dtype is torch.float16, needs torch.bfloat16 or torch.float32"),
    ],
)  # fmt: skip
def test_bad_input_is_named(a, b, offsets, more, error, message):
    with pytest.raises(error, match=f"^grouped_gemm: {message}"):
        ops.grouped_gemm(a, b, offsets, **more)
