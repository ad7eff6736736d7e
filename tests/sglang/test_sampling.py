"""Rows of logits that nothing can be sampled from; test_errors.py asks a server."""

import math
from types import SimpleNamespace

import pytest
import torch

from llama4_kernels.sglang.sampling import keep_probabilities_finite

LOGITS = [[-math.inf, 2.0, 1.0], [-math.inf] * 3, [math.nan, 0.0, 1.0]]


def keep(**fields):
    logits = torch.tensor(LOGITS)
    keep_probabilities_finite(
        logits, SimpleNamespace(**{"is_all_greedy": False, "grammars": None, "has_custom_logit_processor": False} | fields)
    )
    return logits


@pytest.mark.parametrize("fields", [{"grammars": [object(), None]}, {"has_custom_logit_processor": True}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1e-6])
def test_probabilities_are_kept_or_become_equal(fields, temperature):
    probabilities = (keep(**fields) / temperature).softmax(-1)
    torch.testing.assert_close(probabilities[0], (torch.tensor(LOGITS[0]) / temperature).softmax(-1), rtol=0, atol=0)
    torch.testing.assert_close(probabilities[1], torch.full((3,), 1 / 3))
    assert probabilities[2].isnan().all()  # the model's own, not hidden


@pytest.mark.parametrize("fields", [{}, {"is_all_greedy": True, "grammars": [object()]}], ids=str)
def test_logits_are_left_alone(fields):
    torch.testing.assert_close(keep(**fields), torch.tensor(LOGITS), equal_nan=True, rtol=0, atol=0)
