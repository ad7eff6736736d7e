"""The records that the ops take and give."""

from __future__ import annotations

import pytest
import torch

from llama4_kernels.ops import Linear, MoEWeights, Quantized, Routing

X = torch.ones(2, 2)


@pytest.mark.parametrize(
    "make",
    [lambda: Quantized(X, X), lambda: Routing(X, X, X, X), lambda: Linear(X), lambda: MoEWeights(X, *[Linear(X)] * 4)],
    ids=["Quantized", "Routing", "Linear", "MoEWeights"],
)
def test_a_record_is_equal_to_itself_alone(make):
    """Its tensors have no equality that is one bool."""
    one, other = make(), make()
    assert one == one and one != other and other not in [one] and len({one, other, one}) == 2
