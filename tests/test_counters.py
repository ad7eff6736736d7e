import weakref

import torch

from llama4_kernels import counters


def test_counters_outlive_larger_ones(monkeypatch):
    """A CUDA graph goes on counting where it did when it was captured."""
    monkeypatch.setattr(counters, "_counters", {})
    monkeypatch.setattr(counters, "_outgrown", [])
    device = torch.device("cpu")
    captured = weakref.ref(counters.tickets(device, 1))
    larger = counters.tickets(device, 10_000)
    assert len(larger) >= 10_000 and not larger.any()
    assert counters.tickets(device, 1) is larger
    assert captured() is not None and captured() is not larger
