"""Argument checks. Every error names the op, the argument, what it got and what it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float32)


def tensor(
    op: str,
    name: str,
    value: object,
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device | None = None,
    contiguous: bool = True,
) -> Tensor:
    """Check one tensor argument. `shape` holds a size, or a name for a free size; `device` None accepts any.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or memory layout.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, needs a Tensor {_shape(shape)}")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} has dtype {_dtype(value.dtype)}, needs {' or '.join(map(_dtype, dtypes))}")
    fits = value.dim() == len(shape) and all(isinstance(want, str) or got == want for got, want in zip(value.shape, shape))
    if not fits:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, needs {_shape(shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, needs {device}, where the first argument is")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {list(value.stride())} for shape {list(value.shape)}, needs to be contiguous")
    return value


def values_wanted(device: torch.device) -> bool:
    """Whether to check the values inside index tensors: on the CPU always; on a GPU, where it costs a host synchronisation,
    only with LLAMA4_KERNELS_CHECK_VALUES=1."""
    return device.type == "cpu" or os.environ.get("LLAMA4_KERNELS_CHECK_VALUES") == "1"


def in_range(op: str, name: str, value: Tensor, low: int, high: int, why: str = "") -> None:
    """Check low ≤ value < high for every element of an index tensor; ValueError otherwise."""
    if value.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(value))
    if least < low or most >= high:
        raise ValueError(f"{op}: {name} holds values from {least} to {most}, needs {low} to {high - 1}{why and ', ' + why}")


def offsets(op: str, name: str, value: Tensor, rows: int) -> None:
    """Check that group offsets start at 0, never fall, and end at most at `rows`; ValueError otherwise."""
    if int(value[0]) != 0 or bool((value.diff() < 0).any()) or int(value[-1]) > rows:
        raise ValueError(f"{op}: {name} is {value.tolist()}, needs to start at 0, never fall, and end at most at {rows}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
