"""Layouts of TMA, wgmma and ldmatrix: in the emulation, and on a Hopper GPU, against the formulas of layouts.py."""

from __future__ import annotations

import emulation
import layouts
import pytest
import torch


@pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")
def test_the_emulation_has_the_assumed_layouts():
    assert layouts.failures(layouts.load(emulation.build(sources=[layouts.SOURCE])), torch.device("cpu")) == []


@pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")
def test_another_layout_is_noticed():
    planted = {"hopper/layout.cuh": ("thread % 4 * 2 + i % 2", "thread % 4 + i % 2 * 4")}
    failed = layouts.failures(layouts.load(emulation.build(sources=[layouts.SOURCE], planted=planted)), torch.device("cpu"))
    assert failed and all(name.startswith("wgmma") for name in failed)


@pytest.mark.gpu
def test_the_hardware_has_the_assumed_layouts():
    assert layouts.failures(layouts.load(layouts.build_cuda()), torch.device("cuda")) == []
