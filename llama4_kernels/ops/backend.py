"""Which backend computes an op: by request where there is one, else the first of BACKENDS that can run."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

logger = logging.getLogger("llama4_kernels")

ENVIRONMENT_VARIABLE = "LLAMA4_KERNELS_BACKEND"

BACKENDS = ("cuda", "triton", "reference")
AUTO = "auto"  # in a request: the first of BACKENDS that can run

# op -> stem: the module of that name here in ops/ and in the folder of every backend that has the op
OPS = {
    "quantize_per_token": "quantization",
    "route_top1": "routing",
    "grouped_gemm": "grouped_gemm",
    "moe_gate_up": "moe",
    "moe_down": "moe",
    "fused_moe": "moe",
    "rope_qk_norm": "rope",
    "chunked_attention": "attention",
}


class BackendError(RuntimeError):
    """A backend that is asked for cannot compute an op, or none can.

    op: its name. backend: the one that is asked for, or "" where none can. reason: why not, in words.
    """

    def __init__(self, message: str, op: str = "", backend: str = "", reason: str = ""):
        super().__init__(message)
        self.op, self.backend, self.reason = op, backend, reason


@dataclass(frozen=True)
class Choice:
    """The backend taken for an op, and why. asked_by: use_backend or the environment variable, where one of them asks for it, else ""."""

    op: str
    backend: str
    why: str
    asked_by: str = ""


_in_context: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("llama4_kernels_backend", default=())  # the innermost last


@contextlib.contextmanager
def use_backend(default: str | None = None, **per_op: str) -> Iterator[None]:
    """Force backends within a `with` block; takes precedence over blocks around it and the environment variable LLAMA4_KERNELS_BACKEND.

    It holds for the thread (or asyncio task) that enters the block, not for threads that are started in it. Around a function that
    torch.compile has compiled it works, inside of one it does not: there a graph is compiled without the block.

    default: backend for every op ("cuda", "triton", "reference"), "auto" for the first of them that can run, or None to leave the others
    as they were.
    per_op: backend by op name or by stem (routing, quantization, grouped_gemm, moe, attention, rope).
    Raises ValueError for an unknown backend or op; an op called within raises BackendError where its backend cannot run or does not take
    the arguments.

    >>> import torch, llama4_kernels
    >>> with llama4_kernels.use_backend("reference"):
    ...     llama4_kernels.ops.quantize_per_token(torch.ones(1, 4)).codes.float()
    tensor([[448., 448., 448., 448.]])
    """
    for backend in (*(() if default is None else (default,)), *per_op.values()):
        _check_name(backend, "use_backend")
    spec = ",".join(([default] if default else []) + [f"{name}={backend}" for name, backend in per_op.items()])
    _parse(spec, "use_backend")
    token = _in_context.set((*_in_context.get(), spec))
    try:
        yield
    finally:
        _in_context.reset(token)


def available_backends(op: str, device: torch.device | str | None = None) -> dict[str, str]:
    """Backend -> "" where it can compute `op` on `device` (the current GPU if there is one, else the CPU), or why not.

    op: a name such as "fused_moe"; ValueError for any other than those of llama4_kernels.ops.
    device: or its name, such as "cuda:0" or "cpu"; TypeError or ValueError for what torch takes for none, and for a GPU that is not there
        where another is.

    >>> import llama4_kernels
    >>> llama4_kernels.available_backends("route_top1", "cpu")["reference"]
    ''
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}, needs one of {', '.join(OPS)}")
    device = _device(device)
    return {backend: _why_not(backend, op, device) for backend in BACKENDS}


def choices(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> list[Choice]:
    """The choice for every op on `device`; BackendError where a requested backend cannot run.

    dtype: of activations, where it is known before there are any: a backend that never takes them is not chosen. Other arguments that a
        backend does not take show in `call` only.
    """
    device = _device(device)
    return [_choose(op, device, os.environ.get(ENVIRONMENT_VARIABLE, ""), _in_context.get(), dtype) for op in OPS]


def call(op: str, device: torch.device, *args, **kwargs):
    """Compute `op` for tensors on `device`.

    A backend that does not take every argument of an op has a function why_not_<op> beside it, of the same arguments, that returns "" or
    why it does not take these; where activations of a dtype are never taken, why_not_dtype(dtype, name) says that of the argument `name`.
    BackendError where that backend was asked for; else the next backend that takes them computes the op, and the log says so, once per
    kind of reason. Autocast and torch.set_float32_matmul_precision change nothing: what an op rounds, and where, is its contract.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return call(op, device, *args, **kwargs)
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # kernels and their counters go to the current one
        with torch.cuda.device(device):
            return call(op, device, *args, **kwargs)
    chosen = _choose(op, device, os.environ.get(ENVIRONMENT_VARIABLE, ""), _in_context.get())
    reasons = []
    for backend in BACKENDS[BACKENDS.index(chosen.backend) :]:
        reason = "" if backend == chosen.backend else _why_not_unasked(backend, op, device)
        if not reason:
            refusal = _refusal(backend, op)
            reason = refusal(*args, **kwargs) if refusal else ""
            if not reason:
                with _highest_precision if backend == "reference" else contextlib.nullcontext():
                    return _find(backend, op)(*args, **kwargs)
            if chosen.asked_by:
                raise _refused(chosen.asked_by, backend, op, device, reason)
            _log_refusal(op, backend, reason)
        reasons.append(f"{backend}: {reason}")
    raise _no_backend(op, device, reasons)


def _refused(asked_by: str, backend: str, op: str, device: torch.device, reason: str) -> BackendError:
    return BackendError(f"{asked_by} asks for {backend} to compute {op} on {device}, but {reason}", op, backend, reason)


def _no_backend(op: str, device: torch.device, reasons: list[str]) -> BackendError:
    reason = "; ".join(reasons)
    return BackendError(f"no backend computes {op} on {device}: {reason}", op, reason=reason)


class _HighestPrecision:
    """A context in which products of float32 are computed in float32, whatever the process has asked torch for. Those settings are all
    threads': the first to enter changes them, the last to leave puts them back."""

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._put_back = _set_highest_precision()
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put_back()


_highest_precision = _HighestPrecision()


def _set_highest_precision() -> Callable[[], None]:
    """Gives what puts the settings back."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    of_each = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"  # where these contradict the setting of all, torch does not tell that one
    of_all = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")

    def put_back() -> None:
        torch.set_float32_matmul_precision(of_all)
        for backend, precision in zip(backends, of_each):
            backend.fp32_precision = precision

    return put_back


_logged: set[tuple[str, str, str]] = set()
_NUMBER = re.compile(r"(?<![\w.])-?\d[\w.+-]*")  # and not the digits of float8_e4m3fn or weights.w13


def _log_refusal(op: str, backend: str, reason: str) -> None:
    """Reasons that differ in numbers alone, which every call may have others of, are of one kind."""
    kind = (op, backend, _NUMBER.sub("", reason))
    if kind not in _logged:
        _logged.add(kind)
        logger.warning("llama4_kernels: %s is not computed by %s where %s", op, backend, reason)


@functools.lru_cache(maxsize=None)
def _choose(op: str, device: torch.device, environment: str, context: tuple[str, ...], dtype: torch.dtype | None = None) -> Choice:
    for source, spec in (*(("use_backend", spec) for spec in reversed(context)), (ENVIRONMENT_VARIABLE, environment)):
        backend = _parse(spec, source).get(op)
        if backend is None:
            continue
        if backend == AUTO:
            break
        reason = _why_not(backend, op, device, dtype)
        if reason:
            raise _refused(source, backend, op, device, reason)
        return Choice(op, backend, f"asked for by {source}", source)
    reasons = []
    for backend in BACKENDS:
        reason = _why_not_unasked(backend, op, device, dtype)
        if not reason:
            return Choice(op, backend, "; ".join(reasons) or "first choice on this device")
        reasons.append(f"{backend}: {reason}")
    raise _no_backend(op, device, reasons)


@functools.lru_cache(maxsize=None)
def _parse(spec: str, source: str) -> dict[str, str]:
    """A request such as "triton,attention=cuda" as op -> backend; an op's own name beats its stem, which beats the default."""
    default: dict[str, str] = {}
    by_stem: dict[str, str] = {}
    by_op: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, backend = (word.strip() for word in part.rpartition("="))
        _check_name(backend, source)
        if not name:
            default = dict.fromkeys(OPS, backend)
        elif name in OPS:
            by_op[name] = backend
        elif name in OPS.values():
            by_stem |= {op: backend for op, stem in OPS.items() if stem == name}
        else:
            known = ", ".join(dict.fromkeys([*OPS.values(), *OPS]))
            raise ValueError(f"{source} names the op {name!r}, needs one of {known}")
    return default | by_stem | by_op


def _check_name(backend: object, source: str) -> None:
    if backend not in (AUTO, *BACKENDS):
        raise ValueError(f"{source} names the backend {backend!r}, needs one of {', '.join((AUTO, *BACKENDS))}")


@functools.lru_cache(maxsize=None)
def _why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    reason = importlib.import_module(f"llama4_kernels.{backend}").why_not(device)
    if not reason and _find(backend, op) is None:
        reason = f"llama4_kernels has no {backend} kernel for it yet"
    if not reason and dtype is not None and (why_not_dtype := _in_module(backend, op, "why_not_dtype")):
        reason = why_not_dtype(dtype, "the activations' dtype")
    return reason


@functools.lru_cache(maxsize=None)
def _why_not_unasked(backend: str, op: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why not where nobody asks for the backend by name."""
    more = getattr(importlib.import_module(f"llama4_kernels.{backend}"), "why_not_unasked", None)
    return _why_not(backend, op, device, dtype) or (more(device) if more else "")


@functools.lru_cache(maxsize=None)
def _find(backend: str, op: str) -> Callable | None:
    return _in_module(backend, op, op)


@functools.lru_cache(maxsize=None)
def _refusal(backend: str, op: str) -> Callable | None:
    return _in_module(backend, op, f"why_not_{op}")


def _in_module(backend: str, op: str, name: str) -> Callable | None:
    module = f"llama4_kernels.{backend}.{OPS[op]}"
    if importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), name, None)


def _device(value: torch.device | str | None) -> torch.device:
    if value is None:
        return default_device()
    needs = f"device is {value!r}, needs a torch.device or the name of one, such as cuda:0 or cpu"
    if not isinstance(value, (torch.device, str)):
        raise TypeError(needs)
    try:
        device = torch.device(value)
    except RuntimeError:
        raise ValueError(needs) from None
    if device.type != "cuda" or not torch.cuda.is_available():
        return device
    if device.index is None:
        return default_device()
    if device.index >= (count := torch.cuda.device_count()):
        raise ValueError(f"device is {value!r}, needs one of this process's {count} GPUs, which begin with cuda:0")
    return device


def default_device() -> torch.device:
    """The current GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
