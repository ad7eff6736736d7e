"""Grouped GEMM: one weight per group of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops import backend, checks
from llama4_kernels.ops.types import Linear, Quantized, scale_of


def grouped_gemm(
    a: Tensor | Quantized, b: Linear, offsets: Tensor, *, rows: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Multiply rows sorted by group with their group's weight: C[m] = a[m] · b[g]ᵀ for offsets[g] ≤ m < offsets[g + 1].

    All tensors are contiguous.

    a: [M, K] bfloat16 or float32, or Quantized for an fp8 weight. An unquantised `a` with an fp8 weight is quantised first: with
        b.input_scale where it is given, per row and 128 columns where the weight has block scales, else per row.
    b: E weights [E, N, K]. Products are accumulated in fp32 and rounded once, to out_dtype; scales of fp8 are applied in fp32.
    offsets: [E + 1] int32, 0 = offsets[0] ≤ offsets[1] … ≤ M. Groups may be empty and need no alignment.
    rows: [M] int32 or None. Where given, row m of the product is a[rows[m]] instead of a[m], and `a` may have any number of rows.
    out_dtype: bfloat16 or float32.
    Returns C [M, N]. Rows from offsets[E] on hold unspecified values, and what `a` and `rows` hold for them does not matter.
    Raises TypeError or ValueError for a wrong dtype, shape, device or layout, and on the CPU (on a GPU with LLAMA4_KERNELS_CHECK_VALUES=1)
    for offsets, rows or scales out of range; BackendError where a backend is asked for that cannot compute it; RuntimeError in a backward
    pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> weights = ops.Linear(torch.stack([torch.eye(2), 10 * torch.eye(2)]))
    >>> ops.grouped_gemm(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), weights, torch.tensor([0, 1, 2], dtype=torch.int32))
    tensor([[ 1.,  2.],
            [30., 40.]], dtype=torch.bfloat16)
    """
    op = "grouped_gemm"
    values = checks.activations(op, "a", a, shape=("M", "K"))
    checks.linear(op, "b", b, shape=("E", "N", values.shape[1]), device=values.device)
    if isinstance(a, Quantized) and b.scale is None:
        raise TypeError(f"{op}: a is Quantized, needs a bfloat16 or float32 Tensor, because b.weight is not fp8")
    checks.tensor(op, "offsets", offsets, dtype=torch.int32, shape=(len(b.weight) + 1,), device=values.device)
    if rows is not None:
        checks.tensor(op, "rows", rows, dtype=torch.int32, shape=("M",), device=values.device)
    if out_dtype not in checks.FLOATS:
        raise TypeError(f"{op}: out_dtype is {out_dtype}, needs torch.bfloat16 or torch.float32")
    return torch.ops.llama4_kernels.grouped_gemm(values, scale_of(a), b.weight, b.scale, b.input_scale, offsets, rows, out_dtype)


@torch.library.custom_op("llama4_kernels::grouped_gemm", mutates_args=())
def _grouped_gemm(
    a: Tensor,
    a_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    input_scale: Tensor | None,
    offsets: Tensor,
    rows: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if checks.values_wanted(a.device):
        checks.linear_values("grouped_gemm", "b", Linear(weight, scale, input_scale))
        checks.offsets("grouped_gemm", "offsets", offsets, len(a) if rows is None else len(rows))
        written = int(offsets[-1])
        if rows is not None:
            checks.in_range("grouped_gemm", "rows", rows[:written], 0, len(a), f"the {len(a)} rows of a")
        if a_scale is not None:
            read = a_scale if a_scale.dim() == 0 else a_scale[:written] if rows is None else a_scale[rows[:written]]
            checks.scale_values("grouped_gemm", "a.scale", read, finite=False)
    activations = a if a_scale is None else Quantized(a, a_scale)
    linear = Linear(weight, scale, input_scale)
    return backend.call("grouped_gemm", a.device, activations, linear, offsets, rows=rows, out_dtype=out_dtype)


@_grouped_gemm.register_fake
def _(
    a: Tensor,
    a_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    input_scale: Tensor | None,
    offsets: Tensor,
    rows: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0] if rows is None else rows.shape[0], weight.shape[1], dtype=out_dtype)
