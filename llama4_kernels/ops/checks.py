"""Argument checks. Every error names the op, the argument, what it got and what it needs."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_kernels import switches
from llama4_kernels.ops.types import SCALE_BLOCK, Linear, Quantized, Routing, dtype_name

FP8 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
_MOST = torch.iinfo(torch.int64).max


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
        raise TypeError(f"{op}: {name} has dtype {dtype_name(value.dtype)}, needs {' or '.join(map(dtype_name, dtypes))}")
    fits = value.dim() == len(shape) and all(isinstance(want, str) or got == want for got, want in zip(value.shape, shape))
    if not fits:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, needs {_shape(shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, needs {device}, where the first argument is")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {list(value.stride())} for shape {list(value.shape)}, needs to be contiguous")
    return value


def integer(op: str, name: str, value: object, *, needs: str = "an int of at least 1") -> None:
    """Check an int argument from 1 to what int64 holds. Raises TypeError for another type, bool among them, ValueError for less or more;
    `needs` says what fits."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} is {value!r}, needs {needs}")
    if value < 1:
        raise ValueError(f"{op}: {name} is {value}, needs {needs}")
    if value > _MOST:
        raise ValueError(f"{op}: {name} is {value}, needs {needs}, at most {_MOST}")


def number(op: str, name: str, value: object, *, least: float | None = None) -> None:
    """Check an argument that is a Python number, finite in float32 and at least `least`.

    Raises TypeError for anything else, bools among it and tensors, which would be read on the host; ValueError for a number out of range.
    """
    needs = "a finite float" if least is None else f"a finite float of at least {least}"
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} is {value!r}, needs {needs}")
    if not abs(value) <= torch.finfo(torch.float32).max or (least is not None and value < least):
        raise ValueError(f"{op}: {name} is {value}, needs {needs}")


def flag(op: str, name: str, value: object) -> None:
    """Check a bool argument. Raises TypeError for anything else."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}, needs True or False")


def activations(op: str, name: str, value: object, *, shape: Sequence[int | str], device: torch.device | None = None) -> Tensor:
    """Check activations [rows, K]: a bf16 or fp32 Tensor, or Quantized with any of its scales. Returns the Tensor or the codes."""
    if not isinstance(value, Quantized):
        return tensor(op, name, value, dtype=FLOATS, shape=shape, device=device)
    codes = tensor(op, f"{name}.codes", value.codes, dtype=FP8, shape=shape, device=device)
    rows, width = codes.shape
    forms = {"per tensor": (), "per row": (rows,), "per 128 columns": (rows, -(-width // SCALE_BLOCK))}
    _scale(op, f"{name}.scale", value.scale, forms, codes.device)
    return codes


def linear(op: str, name: str, value: object, *, shape: Sequence[int | str], device: torch.device) -> None:
    """Check a weight and its scales; `shape` is that of the weight, with the stack's dimensions first."""
    if not isinstance(value, Linear):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, needs a Linear")
    weight = tensor(op, f"{name}.weight", value.weight, dtype=(*FLOATS, FP8), shape=shape, device=device)
    if weight.dtype != FP8:
        for field in ("scale", "input_scale"):
            if getattr(value, field) is not None:
                raise ValueError(f"{op}: {name}.{field} is given with a {dtype_name(weight.dtype)} weight, needs to be None: it is for fp8")
        return
    *stack, n, k = weight.shape
    forms = {"per tensor": stack, "per channel": (*stack, n), "per block": (*stack, -(-n // SCALE_BLOCK), -(-k // SCALE_BLOCK))}
    _scale(op, f"{name}.scale", value.scale, forms, device)
    if value.input_scale is not None:
        tensor(op, f"{name}.input_scale", value.input_scale, dtype=torch.float32, shape=(), device=device)


def routing(op: str, value: object, *, tokens: int, experts: int, device: torch.device) -> None:
    """Check the tensors of a Routing of `tokens` tokens to `experts` experts; their values are for `routing_values`."""
    if not isinstance(value, Routing):
        raise TypeError(f"{op}: routing is {type(value).__name__}, needs a Routing")
    for field, dtype, size in (
        ("expert_ids", torch.int32, tokens),
        ("scores", torch.float32, tokens),
        ("order", torch.int32, tokens),
        ("offsets", torch.int32, experts + 1),
    ):
        tensor(op, f"routing.{field}", getattr(value, field), dtype=dtype, shape=(size,), device=device)


def kv_caches(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    num_kv_heads: int | str,
    head_dim: int,
    device: torch.device,
) -> None:
    """Check a pair of paged caches [pages, page_size, num_kv_heads, head_dim] and their scales, which only fp8 caches have."""
    tensor(op, "k_cache", k_cache, dtype=(*FLOATS, FP8), shape=("pages", "page_size", num_kv_heads, head_dim), device=device)
    if k_cache.shape[1] == 0:
        raise ValueError(f"{op}: k_cache has shape {list(k_cache.shape)}, needs a page_size of at least 1")
    tensor(op, "v_cache", v_cache, dtype=k_cache.dtype, shape=tuple(k_cache.shape), device=device)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if k_cache.dtype != FP8:
            raise ValueError(f"{op}: {name} is given with a {dtype_name(k_cache.dtype)} cache, needs to be None: it is for fp8")
        _scale(op, name, scale, {"": (), "per tensor": (1,)}, device)


def own_memory(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that no element of `value` is one of `other`, both of which are contiguous and written. ValueError otherwise."""
    begin, other_begin = value.data_ptr(), other.data_ptr()
    if begin < other_begin + other.nbytes and other_begin < begin + value.nbytes:
        raise ValueError(f"{op}: {name} shares memory with {other_name}, needs its own: both are written")


def values_wanted(device: torch.device) -> bool:
    """Whether to check the values inside tensors of indices and scales: on the CPU always; on a GPU, where it costs a host synchronisation,
    only with LLAMA4_KERNELS_CHECK_VALUES=1."""
    return device.type == "cpu" or switches.is_on(switches.CHECK_VALUES)


def in_range(op: str, name: str, value: Tensor, low: int, high: int, why: str = "") -> None:
    """Check low ≤ value < high for every element of an index tensor; ValueError otherwise."""
    if value.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(value))
    if least < low or most >= high:
        raise ValueError(f"{op}: {name} holds values from {least} to {most}, needs {low} to {high - 1}{why and ', ' + why}")


def scale_values(op: str, name: str, value: Tensor | None, *, finite: bool = True) -> None:
    """Check that every element of a scale, where there is one, is at least 0 and finite; ValueError otherwise. Not finite: NaN and infinity
    pass, which are what a row that holds one is quantised with."""
    if value is None or value.numel() == 0:
        return
    if not finite:
        value = value.nan_to_num(0.0, posinf=0.0)
    least, most = (float(bound) for bound in torch.aminmax(value))  # NaN where any is
    if not 0 <= least <= most < float("inf"):
        raise ValueError(f"{op}: {name} holds values from {least:g} to {most:g}, needs {'finite ones of ' if finite else ''}at least 0")


def linear_values(op: str, name: str, value: Linear) -> None:
    """Check the values of an fp8 weight's scales; ValueError where one is negative or not finite."""
    scale_values(op, f"{name}.scale", value.scale)
    scale_values(op, f"{name}.input_scale", value.input_scale)


def offsets(op: str, name: str, value: Tensor, rows: int) -> None:
    """Check that group offsets start at 0, never fall, and end at most at `rows`; ValueError otherwise."""
    if int(value[0]) != 0 or bool((value.diff() < 0).any()) or int(value[-1]) > rows:
        raise ValueError(f"{op}: {name} is {value.tolist()}, needs to start at 0, never fall, and end at most at {rows}")


def routing_values(op: str, value: Routing) -> None:
    """Check that expert_ids, order and offsets of a Routing are in range and agree with one another; ValueError otherwise."""
    tokens, experts = len(value.order), len(value.offsets) - 1
    in_range(op, "routing.expert_ids", value.expert_ids, 0, experts, f"the {experts} experts")
    in_range(op, "routing.order", value.order, 0, tokens, f"the {tokens} tokens")
    if len(value.order.unique()) != tokens:
        raise ValueError(f"{op}: routing.order names a token twice, needs each of the {tokens} tokens once")
    offsets(op, "routing.offsets", value.offsets, tokens)
    if int(value.offsets[-1]) != tokens:
        raise ValueError(f"{op}: routing.offsets ends at {int(value.offsets[-1])}, needs {tokens}, the number of tokens")
    owners = torch.arange(experts, device=value.offsets.device).repeat_interleave(value.offsets.diff())
    if not torch.equal(value.expert_ids[value.order].long(), owners):
        raise ValueError(f"{op}: routing.order does not sort routing.expert_ids into the groups of routing.offsets")


def _scale(op: str, name: str, value: object, forms: dict[str, Sequence[int]], device: torch.device) -> None:
    """Check an fp32 scale whose shape is one of `forms`."""
    if not isinstance(value, Tensor) or tuple(value.shape) not in map(tuple, forms.values()):
        needs = " or ".join(f"{_shape(shape)} {form}".rstrip() for form, shape in forms.items())
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, needs a float32 Tensor: {needs}")
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, needs {needs}")
    tensor(op, name, value, dtype=torch.float32, shape=tuple(value.shape), device=device)


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
