"""Environment variables that switch something on or off: 1 or 0, and their default where they are not set or empty."""

from __future__ import annotations

import os

DEPENDENT_LAUNCH = "LLAMA4_KERNELS_PDL"
PREFETCH = "LLAMA4_KERNELS_PREFETCH"
CHECK_VALUES = "LLAMA4_KERNELS_CHECK_VALUES"

_DEFAULTS = {DEPENDENT_LAUNCH: True, PREFETCH: False, CHECK_VALUES: False}


def is_on(variable: str) -> bool:
    """Whether one of these variables is on; ValueError for a value other than 0 and 1."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} is {value!r}, needs 0 or 1")
    return value == "1" if value else _DEFAULTS[variable]


def given() -> list[str]:
    """Those that are set, as a shell sets them; ValueError as in is_on."""
    return [f"{variable}={is_on(variable):d}" for variable in _DEFAULTS if os.environ.get(variable)]
