"""What the argument checks say and when values are looked at; each op's own errors are in its own file."""

from __future__ import annotations

import pytest
import torch

from llama4_kernels import ops
from llama4_kernels.ops import checks


def test_a_good_tensor_is_returned():
    x = torch.ones(2, 3)
    assert checks.tensor("op", "x", x, dtype=torch.float32, shape=(2, "K"), device=torch.device("cpu")) is x


def test_layout_is_free_where_it_need_not_be_contiguous():
    x = torch.ones(2, 3).t()
    assert checks.tensor("op", "x", x, dtype=torch.float32, shape=(3, 2), contiguous=False) is x


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, "op: x is list, needs a Tensor [2, K]"),
        (torch.ones(2, 3).int(), TypeError, "op: x has dtype int32, needs bfloat16 or float32"),
        (torch.ones(3, 3), ValueError, "op: x has shape [3, 3], needs [2, K]"),
        (torch.ones(2), ValueError, "op: x has shape [2], needs [2, K]"),
        (torch.ones(2, 3, device="meta"), ValueError, "op: x is on meta, needs cpu, where the first argument is"),
        (torch.ones(3, 2).t(), ValueError, "op: x has strides [1, 2] for shape [2, 3], needs to be contiguous"),
    ],
)
def test_a_bad_tensor_is_described(value, error, message):
    with pytest.raises(error) as raised:
        checks.tensor("op", "x", value, dtype=checks.FLOATS, shape=(2, "K"), device=torch.device("cpu"))
    assert str(raised.value) == message


def test_in_range():
    checks.in_range("op", "ids", torch.tensor([0, 3]), 0, 4)
    checks.in_range("op", "ids", torch.tensor([], dtype=torch.int32), 0, 0)
    for bad in ([0, 4], [-1, 3]):
        with pytest.raises(ValueError, match=f"^op: ids holds values from {bad[0]} to {bad[1]}, needs 0 to 3, the 4 experts$"):
            checks.in_range("op", "ids", torch.tensor(bad), 0, 4, "the 4 experts")


def test_integers():
    for good in (1, 2**63 - 1):
        checks.integer("op", "size", good)
    with pytest.raises(ValueError, match="^op: size is 0, needs an int of at least 1$"):
        checks.integer("op", "size", 0)
    with pytest.raises(ValueError, match=f"^op: size is {2**63}, needs an int of at least 1, at most {2**63 - 1}$"):
        checks.integer("op", "size", 2**63)


def test_memory_of_their_own():
    both = torch.zeros(6, 4)
    for good in (both[3:], both[:0], both[2:2], torch.zeros(3, 4)):
        checks.own_memory("op", "v", good, "k", both[:3])
    for bad in (both[:3], both, both[2:5], both[:1]):
        with pytest.raises(ValueError, match="^op: v shares memory with k, needs its own: both are written$"):
            checks.own_memory("op", "v", bad, "k", both[:3])


NAN, INF = float("nan"), float("inf")


def test_good_scales():
    """0 is that of a row or channel of zeros."""
    for good in (None, torch.tensor(0.0), torch.tensor([0.0, 3e38]), torch.ones(0, 3)):
        checks.scale_values("op", "scale", good)
    checks.scale_values("op", "scale", torch.tensor([0.0, NAN, INF]), finite=False)


@pytest.mark.parametrize("bad", [[-1e-3, 1.0], [1.0, NAN], [1.0, INF], [-INF, 0.0]])
def test_bad_scales(bad):
    least, most = (NAN, NAN) if NAN in bad else bad
    with pytest.raises(ValueError, match=f"^op: scale holds values from {least:g} to {most:g}, needs finite ones of at least 0$"):
        checks.scale_values("op", "scale", torch.tensor(bad))


@pytest.mark.parametrize("bad", [[-1.0, NAN], [-INF, 1.0]])
def test_negative_scales_of_rows(bad):
    with pytest.raises(ValueError, match="^op: scale holds values from -.*, needs at least 0$"):
        checks.scale_values("op", "scale", torch.tensor(bad), finite=False)


@pytest.mark.parametrize("good", [[0], [0, 0, 0], [0, 2, 5]])
def test_good_offsets(good):
    checks.offsets("op", "offsets", torch.tensor(good), 5)


@pytest.mark.parametrize("bad", [[1, 2], [0, 3, 2], [0, 6]])
def test_bad_offsets(bad):
    with pytest.raises(ValueError, match="^op: offsets is .*, needs to start at 0, never fall, and end at most at 5$"):
        checks.offsets("op", "offsets", torch.tensor(bad), 5)


def test_values_are_looked_at_on_the_cpu_and_on_a_gpu_only_on_request(monkeypatch):
    monkeypatch.delenv("LLAMA4_KERNELS_CHECK_VALUES", raising=False)
    assert checks.values_wanted(torch.device("cpu"))
    assert not checks.values_wanted(torch.device("cuda"))
    monkeypatch.setenv("LLAMA4_KERNELS_CHECK_VALUES", "1")
    assert checks.values_wanted(torch.device("cuda"))


def test_shapes_are_checked_without_values():
    """On fake tensors, as under torch.compile, an op's result is described and its values are not read."""
    with torch._subclasses.FakeTensorMode():
        routing, _ = ops.route_top1(torch.empty(5, 8), torch.empty(4, 8))
        out = ops.grouped_gemm(torch.empty(5, 8), ops.Linear(torch.empty(4, 6, 8)), routing.offsets, rows=routing.order)
    assert routing.offsets.shape == (5,) and out.shape == (5, 6) and out.dtype == torch.bfloat16
