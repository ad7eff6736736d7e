"""The records that the ops take and give."""

from __future__ import annotations

import pytest
import torch

from llama4_kernels.ops import Linear, MoEWeights, Quantized, Routing
from llama4_kernels.ops.types import new_hidden

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


@pytest.mark.parametrize(("shape", "granularity"), [((), "tensor"), ((200,), "row"), ((200, 2), "block")])
def test_granularity_of_activations(shape, granularity):
    assert Quantized(torch.ones(200, 200), torch.ones(shape)).granularity == granularity


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(
    ("shape", "granularity", "of_input"), [((), "tensor", "row"), ((200,), "channel", "row"), ((2, 2), "block", "block")]
)
def test_granularity_of_weights(stack, shape, granularity, of_input):
    weight, scale = torch.ones(*stack, 200, 200), torch.ones(stack + shape)
    assert (Linear(weight).granularity, Linear(weight).input_granularity) == (None, None)
    assert (Linear(weight, scale).granularity, Linear(weight, scale).input_granularity) == (granularity, of_input)
    assert Linear(weight, scale, torch.ones(())).input_granularity == "tensor"


def test_hidden_activations_are_as_their_weight_takes_them():
    weight, static = torch.ones(3, 200, 200), torch.ones(())
    assert new_hidden(5, Linear(weight), torch.bfloat16).dtype == torch.bfloat16
    dynamic, fixed = (new_hidden(5, Linear(weight, torch.ones(3), scale), torch.bfloat16) for scale in (None, static))
    assert dynamic.codes.shape == (5, 200) and dynamic.scale.shape == (5, 2) and fixed.scale is static
