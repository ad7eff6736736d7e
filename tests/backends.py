"""Runs an op on each backend that this process can run, and compares numbers of one backend with an oracle's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from llama4_kernels import BackendError, available_backends, ops, use_backend
from llama4_kernels.bench.inputs import mapped
from llama4_kernels.ops import Linear
from llama4_kernels.ops import backend as choice
from llama4_kernels.ops.backend import BACKENDS, OPS

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETING
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def available(stem: str) -> list[str]:
    """Backends that can compute every op of a stem: the reference on the CPU, the others on a GPU; Triton alone in its interpreter."""
    candidates = ["triton"] if INTERPRETING else BACKENDS
    of_stem = [op for op in OPS if OPS[op] == stem]
    return [backend for backend in candidates if not any(available_backends(op, device_of(backend))[backend] for op in of_stem)]


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if GPU and backend != "reference" else "cpu")


def compute(backend: str, op: str, *args, **kwargs):
    """The op's result, on the CPU like its arguments; caches that it writes are written in place."""
    device = device_of(backend)
    moved = to(kwargs, device)
    with where_it_computes(backend):
        result = getattr(ops, op)(*to(args, device), **moved)
    for name in ("k_cache", "v_cache"):
        if kwargs.get(name) is not None:
            kwargs[name].copy_(moved[name])
    return to(result, torch.device("cpu"))


@contextlib.contextmanager
def where_it_computes(backend: str) -> Iterator[None]:
    """use_backend, and leave out the test, or the example of it, where the backend says that it does not take the arguments."""
    try:
        with use_backend(backend):
            yield
    except BackendError as error:
        if error.backend != backend:
            raise
        hypothesis.reject() if hypothesis.currently_in_test_context() else pytest.skip(str(error))


def to(value, device: torch.device, *, copy: bool = False):
    """A tensor, or a structure of tensors and other values, on `device`."""
    return mapped(lambda tensor: tensor.to(device, copy=copy), value)


Call = tuple[Sequence, Mapping]  # of an op: its arguments, by place and by name


def assert_replays(backend: str, op: str, given: Call, others: Call, *, meanwhile: Callable[[], object] = lambda: None) -> None:
    """The op, captured in a CUDA graph with the tensors of `given`, returns the bits of a plain call and leaves its arguments as that does,
    whatever `meanwhile` does before: for given's values, for those of `others`, of the same shapes, and for given's again. A backend on the
    CPU has no graph: there it is called anew on the tensors that were captured."""
    device = device_of(backend)
    with where_it_computes(backend):
        plain = [(arguments := to(each, device, copy=True), call(op, arguments)) for each in (given, others)]
        assert not same_bits(plain[0][1], plain[1][1]), "others give the same: a replay that computes from the captured values would pass"
        for capture in (in_a_graph, in_a_graph_on_a_warm_stream) if device.type == "cuda" else (called_anew,):
            static = to(given, device, copy=True)
            captured, replay = capture(partial(call, op, static))
            own = {tensor.data_ptr() for tensor in tensors(static)}
            results = [tensor for tensor in tensors(captured) if tensor.data_ptr() not in own]  # a static scale is given and given back
            for values, want in zip((given, given, others, given), (plain[0], plain[0], plain[1], plain[0])):
                meanwhile()
                copy_values(static, values)
                for tensor in results:
                    tensor.view(torch.uint8).fill_(0xA5)
                replay()
                assert_same_bits([static, captured], want)


def forget_choices() -> None:
    """Let backends be chosen anew, as a test needs before and after it has changed what there is."""
    for cached in vars(choice).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    choice._logged.clear()


def call(op: str, arguments: Call):
    return getattr(ops, op)(*arguments[0], **arguments[1])


def in_a_graph(function: Callable[[], object], stream: torch.cuda.Stream | None = None) -> tuple[object, Callable[[], None]]:
    """What the function returned when it was captured, and the graph's replay. Without a stream that it has run on before, kernels get
    counters that the graph fills with 0: see llama4_kernels.counters."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = function()
    return captured, graph.replay


def in_a_graph_on_a_warm_stream(function: Callable[[], object]) -> tuple[object, Callable[[], None]]:
    """The same, where the kernels alone set their counters back to 0."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    return in_a_graph(function, stream)


def called_anew(function: Callable[[], object]) -> tuple[object, Callable[[], None]]:
    """A graph's stand-in: what the function returned, and another call of it, whose results go to where those are."""
    captured = function()
    return captured, lambda: copy_values(captured, function())


def copy_values(target, source) -> None:
    for old, new in zip(tensors(target), tensors(source), strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype
        old.copy_(new)


def assert_passes_opcheck(backend: str, op: str, *args, **kwargs) -> None:
    """The op is registered as it is computed: what it writes, its fake results, and how it is traced."""
    with where_it_computes(backend):
        flat = flat_arguments(op, *to(args, device_of(backend)), **to(kwargs, device_of(backend)))
        has_fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors(flat))  # which test_schema cannot compare
        opcheck(getattr(torch.ops.llama4_kernels, op).default, flat, test_utils=OPCHECKS[1:] if has_fp8 else OPCHECKS)


def flat_arguments(op: str, *args, **kwargs) -> tuple:
    """What the public op hands to the registered one."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append((function, args))
            return function(*args, **(kwargs or {}))

    calls = []
    with Seen():
        getattr(ops, op)(*args, **kwargs)
    [flat] = [args for function, args in calls if function == getattr(torch.ops.llama4_kernels, op).default]
    return flat


def assert_same_bits(got, want) -> None:
    assert len(tensors(got)) == len(tensors(want)) and same_bits(got, want)


def same_bits(got, want) -> bool:
    pairs = zip(tensors(got), tensors(want), strict=True)
    return all(a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value if value.dim() else value[None]]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """|got − want| ≤ bound for every element, where want is float64 and `bound` allows for accumulation in fp32; got's own rounding
    to its dtype is allowed for here."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[got.dtype]
    excess = (got.double() - want).abs() - bound - rounding * want.abs() - 1e-30
    assert got.shape == want.shape
    assert not (excess > 0).any() and got.isfinite().all(), f"off by up to {(got.double() - want).abs().max()}"


def sums_in_short(backend: str, weight: Linear) -> bool:
    """Whether tensor cores sum products of e4m3, of which Hopper's keep fewer bits than fp32 has: tests/test_short_sums_emulation.py."""
    return weight.scale is not None and device_of(backend).type == "cuda"


def sum_error(in_short: bool) -> float:
    """Of a sum, over that of its terms' magnitudes."""
    return 2.0**-11 if in_short else 2.0**-18


def assert_product(got: Tensor, a: Tensor, b: Tensor, in_short: bool) -> None:
    """got = a · bᵀ accumulated in fp32, or in_short, for a and b in float64."""
    assert_within(got, a @ b.mT, sum_error(in_short) * (a.abs() @ b.abs().mT))
