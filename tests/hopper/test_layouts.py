"""Layouts of TMA, wgmma and ldmatrix: in the emulation, and on a Hopper GPU, against the formulas of layouts.py."""

from __future__ import annotations

import emulation
import layouts
import pytest
import torch


@pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")
def test_the_emulation_has_the_assumed_layouts():
    assert layouts.failures(emulation.build(sources=[layouts.SOURCE]), torch.device("cpu")) == []


@pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")
def test_another_layout_is_noticed():
    planted = {"hopper/layout.cuh": ("thread % 4 * 2 + i % 2", "thread % 4 + i % 2 * 4")}
    failed = layouts.failures(emulation.build(sources=[layouts.SOURCE], planted=planted), torch.device("cpu"))
    assert failed and all(name.startswith("wgmma") for name in failed)


@pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")
def test_a_multicast_to_one_block_alone_is_noticed():
    library = emulation.build(sources=[layouts.SOURCE], planted={"layouts.cu": ("barrier, 0b11, x", "barrier, 1 << rank, x")})
    with pytest.raises(RuntimeError, match=r"multicast, 16 byte rows(.|\n)*deadlock(.|\n)*lacks 0 of 1 arrivals"):
        layouts.failures(library, torch.device("cpu"))


@pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")
def test_a_case_that_ends_its_process_is_named_and_hides_no_other_group():
    planted = {
        "layouts.cu": (
            "launch(config(32), &store_box",
            "if (swizzle == 1 && element == 2) abort();\n        launch(config(32), &store_box",
        ),
        "hopper/layout.cuh": ("thread % 4 * 2 + i % 2", "thread % 4 + i % 2 * 4"),
    }
    ended, *others = layouts.failures(emulation.build(sources=[layouts.SOURCE], planted=planted), torch.device("cpu"), apart=True)
    assert ended == "TMA store, 32 byte rows, 2 byte elements, at (0, 0): exit code -6; the rest of its group did not run"
    assert others and all(name.startswith("wgmma") for name in others)


@pytest.mark.gpu
def test_the_hardware_has_the_assumed_layouts():
    assert layouts.failures(layouts.build_cuda(), torch.device("cuda")) == []
