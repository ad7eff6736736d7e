"""backends.assert_replays notices what a graph would get wrong: ops with planted faults, with a call anew in place of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends import assert_replays
from llama4_kernels import ops

CACHE = torch.randn(3, 1, 1, 4)
GIVEN, OTHERS = (((torch.randn(4, 8),), {}) for _ in range(2))
ROPE_GIVEN, ROPE_OTHERS = (
    ((torch.randn(2, 12), torch.arange(2)), dict(num_heads=1, num_kv_heads=1, head_dim=4, k_cache=CACHE, v_cache=CACHE.clone(), slots=slots))
    for slots in (torch.tensor([0, 1]), torch.tensor([2, -1]))
)


class Quantize:
    """quantize_per_token, where `fault` may change what it is given or gives. calls: how often it was called before."""

    def __init__(self, fault):
        self.fault, self.calls, self.computes = fault, 0, ops.quantize_per_token

    def __call__(self, x: Tensor) -> ops.Quantized:
        quantized = self.fault(self, x)
        self.calls += 1
        return quantized


def keeps_the_values_of_the_capture(op: Quantize, x: Tensor) -> ops.Quantized:
    if op.calls == 2:
        op.captured = op.computes(x)
    return op.captured if op.calls >= 2 else op.computes(x)


def leaves_a_counter_behind(op: Quantize, x: Tensor) -> ops.Quantized:
    quantized = op.computes(x)
    return ops.Quantized(quantized.codes, quantized.scale + op.calls)


def leaves_a_row_unwritten(op: Quantize, x: Tensor) -> ops.Quantized:
    quantized = op.computes(x)
    return ops.Quantized(quantized.codes, quantized.scale.where(torch.arange(len(x)) < op.calls % 3, 0))


def writes_to_its_input(op: Quantize, x: Tensor) -> ops.Quantized:
    quantized = op.computes(x)
    x[0, 0] = op.calls
    return quantized


@pytest.mark.parametrize(
    "fault", [keeps_the_values_of_the_capture, leaves_a_counter_behind, leaves_a_row_unwritten, writes_to_its_input]
)
def test_a_fault_is_noticed(monkeypatch, fault):
    monkeypatch.setattr(ops, "quantize_per_token", Quantize(fault))
    with pytest.raises(AssertionError):
        assert_replays("reference", "quantize_per_token", GIVEN, OTHERS)


def test_without_a_fault_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(ops, "quantize_per_token", op := Quantize(lambda op, x: op.computes(x)))
    assert_replays("reference", "quantize_per_token", GIVEN, OTHERS)
    assert op.calls > 4
    assert_replays("reference", "rope_qk_norm", ROPE_GIVEN, ROPE_OTHERS)


def test_a_cache_that_is_written_elsewhere_is_noticed(monkeypatch):
    slots_of_the_capture = []

    def rope_qk_norm(*args, slots, **kwargs):
        slots_of_the_capture.append(slots.clone())
        return computes(*args, slots=slots_of_the_capture[min(2, len(slots_of_the_capture) - 1)], **kwargs)

    computes = ops.rope_qk_norm
    monkeypatch.setattr(ops, "rope_qk_norm", rope_qk_norm)
    with pytest.raises(AssertionError):
        assert_replays("reference", "rope_qk_norm", ROPE_GIVEN, ROPE_OTHERS)


def test_others_that_would_show_nothing_are_refused():
    with pytest.raises(AssertionError, match="others give the same"):
        assert_replays("reference", "quantize_per_token", GIVEN, GIVEN)
