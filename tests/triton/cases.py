"""What the Triton kernels' tests share."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

few_examples = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Equal elements, all NaNs being alike."""
    return torch.equal(got.cpu().float().nan_to_num(nan=1e30), expected.cpu().float().nan_to_num(nan=1e30))
