"""Launch configurations of the kernels: tuned ones from configs/<device>.json where the shape is listed, else a heuristic.

A table maps op -> shape -> most tokens -> configuration:
    {"grouped_gemm": {"float8_e4m3fn form=2 groups=16 k=5120 n=2048 shared_kib=227": {"64": {"BLOCK_T": 16, ..}}}}
The entry with the fewest tokens that covers the call is taken; `llama4-kernels tune` writes the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from llama4_kernels.ops.types import dtype_name
from llama4_kernels.triton.tiles import PER_BLOCK

TABLES = Path(__file__).parent / "configs"
Config = dict[str, int]
_LAUNCH_OPTIONS = {"programs_per_sm"}
_HOPPER_KIB = 227


@dataclass
class Trial:
    """A configuration under test, and the table entry that the last launch with it would have read."""

    config: Config
    shape: str = ""
    tokens: int = 0


_trials: dict[str, Trial] = {}


@contextlib.contextmanager
def trial(op: str, config: Config) -> Iterator[Trial]:
    """Launch the kernels of `op` with `config`, whatever the shape."""
    _trials[op] = Trial(config)
    try:
        yield _trials[op]
    finally:
        del _trials[op]


def choose(op: str, device: torch.device, dtype: torch.dtype, *, tokens: int, **shape: int) -> Config:
    """The configuration of one launch. Token counts are rounded up to a power of two first, so that few kernels are compiled."""
    tokens = triton.next_power_of_2(max(tokens, 1))
    if op in _trials:
        _trials[op].shape, _trials[op].tokens = shape_key(dtype, shape), tokens
        return _trials[op].config
    return _choose(op, device_name(device), dtype, tokens, tuple(sorted(shape.items())))


def options(config: Config) -> Config:
    """What goes into the launch itself: block sizes, num_warps and num_stages."""
    return {name: value for name, value in config.items() if name not in _LAUNCH_OPTIONS}


def programs(device: torch.device, config: Config) -> int:
    """Programs that a persistent kernel starts."""
    return multiprocessors(device) * config["programs_per_sm"]


@functools.lru_cache(maxsize=None)
def device_name(device: torch.device) -> str:
    """What the driver calls the GPU, or cpu: the name of its table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=None)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the GPU; a Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.lru_cache(maxsize=None)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.lru_cache(maxsize=None)
def shared_kib(device: torch.device) -> int:
    """KiB of shared memory that one program may use; a Hopper's in the interpreter."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024 if device.type == "cuda" else _HOPPER_KIB


def clear() -> None:
    """Forget what was read from the tables, because they have changed."""
    _choose.cache_clear()
    _table.cache_clear()


def table_path(name: str) -> Path:
    return TABLES / (re.sub(r"\W+", "_", name) + ".json")


def shape_key(dtype: torch.dtype, shape: dict[str, int]) -> str:
    """A table's key for the shape, "bfloat16 experts=16 hidden=5120": the dtype, then sizes by name."""
    return " ".join([dtype_name(dtype), *(f"{name}={size}" for name, size in sorted(shape.items()))])


@functools.lru_cache(maxsize=None)
def _choose(op: str, name: str, dtype: torch.dtype, tokens: int, shape: tuple[tuple[str, int], ...]) -> Config:
    listed = _table(name).get(op, {}).get(shape_key(dtype, dict(shape)), {})
    covering = [int(most) for most in listed if int(most) >= tokens]
    if covering:
        return listed[str(min(covering))]
    heuristic = _HEURISTICS[op](dtype, tokens, **dict(shape))
    return heuristic | _INTERPRETER.get(op, {}) if name == "cpu" else heuristic


@functools.lru_cache(maxsize=None)
def _table(name: str) -> dict[str, Any]:
    path = table_path(name)
    return json.loads(path.read_text()) if path.exists() else {}


def _stages(most: int, rows: int, shared_kib: int) -> int:
    """Stages of a pipeline that holds 128 bytes of `rows` rows in each: as many as fit beside the kernel's scratch, 2 at least."""
    return max(min(most, (shared_kib - 4) * 8 // rows), 2)


def _grouped_gemm(dtype: torch.dtype, tokens: int, *, groups: int, n: int, k: int, form: int, shared_kib: int) -> Config:
    mean = tokens // max(groups, 1)
    if mean <= 16:
        return {"BLOCK_T": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 5, "programs_per_sm": 4}
    block = 128 if mean > 64 and form != PER_BLOCK else 64
    return {"BLOCK_T": block, "BLOCK_N": 128, "num_warps": 8, "num_stages": _stages(4, block + 128, shared_kib), "programs_per_sm": 1}


def _route_top1(dtype: torch.dtype, tokens: int, *, experts: int, hidden: int, shared_kib: int) -> Config:
    if tokens <= 64:
        return {"BLOCK_T": 8, "BLOCK_E": 16, "BLOCK_K": 512 // dtype.itemsize, "num_warps": 4, "num_stages": 4}
    block = min(max(triton.next_power_of_2(experts), 16), 128)
    stages = _stages(4, 64 + block, shared_kib)
    return {"BLOCK_T": 64, "BLOCK_E": block, "BLOCK_K": 128 // dtype.itemsize, "num_warps": 4, "num_stages": stages}


def _moe_gate_up(dtype: torch.dtype, tokens: int, *, experts: int, n: int, k: int, form: int, shared_kib: int) -> Config:
    if tokens <= 64:
        # A stream of weights: two programs on each of Hopper's 132 multiprocessors, and K split where the tiles are too few for that
        distinct = experts * (1 - (1 - 1 / experts) ** tokens)
        tiles = (triton.cdiv(tokens, 16) + distinct) * triton.cdiv(n, 128)
        splits = 4 if 4 * tiles <= 2 * 132 else 1
        stages = _stages(3, 256 + 16, shared_kib)
        return {"BLOCK_S": 16, "BLOCK_R": 16, "SPLITS": splits, "num_warps": 4, "num_stages": stages, "programs_per_sm": 2}
    block = 32 if form == PER_BLOCK else 64  # two sums and the products of one step fit in registers
    few = tokens // experts <= 16
    stages = _stages(3 if few else 4, 256 + block, shared_kib)
    return {"BLOCK_S": block, "BLOCK_R": 16 if few else block, "SPLITS": 1, "num_warps": 8, "num_stages": stages, "programs_per_sm": 1}


def _moe_down(dtype: torch.dtype, tokens: int, *, experts: int, n: int, k: int, form: int, shared_kib: int) -> Config:
    if tokens > 256:
        block = 128 if dtype != torch.float8_e4m3fn else 64
        return {"BLOCK_T": block, "BLOCK_N": 128, "num_warps": 8, "num_stages": _stages(3, block + 128, shared_kib)}
    block = 16 if tokens <= 16 else 64
    return {"BLOCK_T": block, "BLOCK_N": 64, "num_warps": 4, "num_stages": _stages(6, block + 64, shared_kib)}


def _attention_prefill(dtype: torch.dtype, tokens: int, *, head_dim: int, shared_kib: int) -> Config:
    if dtype == torch.float32 or head_dim > 256:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if shared_kib < _HOPPER_KIB:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    wide = dtype == torch.bfloat16 and head_dim <= 128  # fp8 keys pass through registers on their way to bf16
    return {"BLOCK_M": 128, "BLOCK_N": 128 if wide else 64, "num_warps": 8, "num_stages": 3}


def _attention_split(dtype: torch.dtype, tokens: int, *, head_dim: int, rows: int) -> Config:
    if dtype == torch.float32 or head_dim > 256:
        stages = 2 if head_dim <= 256 else 1
        return {"SPLIT_KEYS": 256, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": stages, "programs_per_sm": 2}
    block = min(max(triton.next_power_of_2(rows), 16), 32)
    warps, programs = (4, 2) if block == 16 else (8, 1)  # 4 warps have too few registers for 32 rows
    return {"SPLIT_KEYS": 256, "BLOCK_M": block, "BLOCK_N": 64, "num_warps": warps, "num_stages": 3, "programs_per_sm": programs}


_HEURISTICS = {
    "grouped_gemm": _grouped_gemm,
    "route_top1": _route_top1,
    "moe_gate_up": _moe_gate_up,
    "moe_down": _moe_down,
    "attention_prefill": _attention_prefill,
    "attention_split": _attention_split,
}

# Small tiles, so that a small test has several of them.
_INTERPRETER: dict[str, Config] = {
    "grouped_gemm": {"BLOCK_T": 16, "BLOCK_N": 64, "programs_per_sm": 1},
    "moe_gate_up": {"BLOCK_S": 32, "BLOCK_R": 16, "SPLITS": 2},
    "moe_down": {"BLOCK_T": 16, "BLOCK_N": 64},
    "attention_prefill": {"BLOCK_M": 32, "BLOCK_N": 16},
    "attention_split": {"BLOCK_N": 16, "SPLIT_KEYS": 32},
}
