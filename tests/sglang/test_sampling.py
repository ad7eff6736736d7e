"""Rows of logits that nothing can be sampled from; test_bad_requests.py asks a server."""

import math

import torch

from llama4_kernels.sglang.sampling import free_rows_ruled_out


def test_only_rows_that_nothing_can_be_sampled_from_change():
    logits = torch.tensor([[-math.inf, 2.0, 1.0], [-math.inf] * 3, [math.nan, 0.0, -math.inf], [math.nan, -math.inf, -math.inf]])
    freed = logits.clone()
    free_rows_ruled_out(freed)
    assert freed[1].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(freed[[0, 2, 3]], logits[[0, 2, 3]], rtol=0, atol=0, equal_nan=True)
