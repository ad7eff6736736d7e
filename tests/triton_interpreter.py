"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), which computes bfloat16 and float8 wrongly without a word (Triton 3.6 to 3.8).

- Conversions to bfloat16 truncate, and conversions to float8 lose the carry: here both round to nearest even. Values beyond e4m3's range
  become NaN, so that a kernel that does not clamp first is noticed.
- bfloat16 arithmetic, comparisons and tl.dot work on the raw bits: here in float32, rounded where the result is bfloat16.
- bfloat16 reductions and scans, which would also work on raw bits, are refused.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH_DTYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32}
_ARITHMETIC = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_fneg", "create_fma", "create_clampf",
               "create_minimumf", "create_minnumf", "create_maximumf", "create_maxnumf")  # fmt: skip
_convert_float = interpreter._convert_float
TensorHandle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def install() -> None:
    np.seterr(all="ignore")  # a GPU does not warn of 0 / 0 either
    interpreter._convert_float = _convert
    for name in _ARITHMETIC:
        if hasattr(Builder, name):
            setattr(Builder, name, _in_float32(getattr(Builder, name), round_result=True))
    for name in [name for name in dir(Builder) if name.startswith("create_fcmp")] + ["create_dot"]:
        setattr(Builder, name, _in_float32(getattr(Builder, name), round_result=False))
    Builder.cast_impl = _cast_with(Builder.cast_impl)
    Builder.get_bf16 = lambda self, value: _rounded(TensorHandle(np.array([value], dtype=np.float32), tl.float32))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _refuse_bfloat16(operation.apply_impl)


def _convert(data, source, target, rounding):
    """Bits of `source` to bits of `target`, both floating-point types."""
    if source not in _TORCH_DTYPES or target not in _TORCH_DTYPES or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
        return _convert_float(data, source, target, rounding)
    bits = np.ascontiguousarray(data).view(_BITS[source.primitive_bitwidth])
    values = torch.from_numpy(bits.copy()).view(_TORCH_DTYPES[source]).float()
    if target == tl.float8e4nv:
        values = torch.where(values.abs() > 448, torch.nan, values)
    converted = values.to(_TORCH_DTYPES[target])
    return converted.view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy().reshape(np.shape(data))


def _is_bfloat16(value) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(handle):
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle(_convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)


def _rounded(handle):
    return TensorHandle(_convert(handle.data.astype(np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16)


def _in_float32(method, *, round_result: bool):
    def repaired(self, *args, **kwargs):
        if not any(_is_bfloat16(arg) for arg in args):
            return method(self, *args, **kwargs)
        result = method(self, *(_widened(arg) for arg in args), **kwargs)
        return _rounded(result) if round_result else result

    return repaired


def _cast_with(cast_impl):
    def repaired(self, source, target):
        if _is_bfloat16(source) == (target.scalar == tl.bfloat16):
            return cast_impl(self, source, target)
        if target.scalar == tl.bfloat16:
            return _rounded(source)
        return cast_impl(self, _widened(source), target)

    return repaired


def _refuse_bfloat16(apply_impl):
    def repaired(self, inputs):
        if any(_is_bfloat16(value.handle) for value in inputs):
            raise NotImplementedError("the interpreter cannot reduce or scan bfloat16: convert to float32 first")
        return apply_impl(self, inputs)

    return repaired
