"""Whether the hardware lays data out as the kernels and the host emulation assume: the project's list of layouts, probed on this GPU."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from bench.calibration import gpu
from bench.calibration.measurement import Case, Figures, Measurement, WrongResult
from bench.calibration.native import ROOT
from llama4_kernels.bench.record import Figure

PROBES = ROOT / "tests" / "hopper" / "layouts.py"


def cases() -> list[Case]:
    return [Case({"list": str(PROBES.relative_to(ROOT))})]


def measure(case: Case) -> Figures:
    layouts = probes()
    count = len(list(layouts.cases()))
    if failed := layouts.failures(layouts.build_cuda(), gpu.DEVICE):
        raise WrongResult(f"{len(failed)} of {count} layouts are otherwise: {', '.join(failed)}")
    return {"as_assumed": Figure(count, "1")}


def probes() -> ModuleType:
    """The module of the layout tests that holds the list."""
    spec = importlib.util.spec_from_file_location("calibration_layouts", PROBES)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEASUREMENTS = (Measurement("layouts", "Does the hardware lay data out as the kernels and the emulation assume?", 35, cases, measure),)
