"""Variables that are 0 or 1."""

from __future__ import annotations

import pytest
import torch

from llama4_kernels import switches
from llama4_kernels.ops import checks

DEFAULTS = {switches.DEPENDENT_LAUNCH: True, switches.PREFETCH: False, switches.CHECK_VALUES: False}


@pytest.mark.parametrize("variable", DEFAULTS)
@pytest.mark.parametrize("value, meaning", [(None, None), ("", None), ("0", False), ("1", True)])
def test_a_switch_is_what_it_is_set_to_or_its_default(monkeypatch, variable, value, meaning):
    monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
    assert switches.is_on(variable) is (DEFAULTS[variable] if meaning is None else meaning)


@pytest.mark.parametrize("variable", DEFAULTS)
@pytest.mark.parametrize("value", ["off", "false", "on", "2", " 1"])
def test_another_value_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    for asked in (lambda: switches.is_on(variable), switches.given):
        with pytest.raises(ValueError, match=f"^{variable} is '{value}', needs 0 or 1$"):
            asked()


def test_those_that_are_set_are_given_as_a_shell_sets_them(monkeypatch):
    for variable, value in zip(DEFAULTS, ("0", "", "1")):
        monkeypatch.setenv(variable, value)
    assert switches.given() == ["LLAMA4_KERNELS_PDL=0", "LLAMA4_KERNELS_CHECK_VALUES=1"]


def test_an_op_on_a_gpu_refuses_to_guess(monkeypatch):
    monkeypatch.setenv(switches.CHECK_VALUES, "yes")
    with pytest.raises(ValueError, match="LLAMA4_KERNELS_CHECK_VALUES is 'yes'"):
        checks.values_wanted(torch.device("cuda"))
