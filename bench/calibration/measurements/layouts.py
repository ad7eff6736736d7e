"""Whether the hardware lays data out as the kernels and the host emulation assume: the project's own layout tests, run on this GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bench.calibration.measurement import Case, Figures, Measurement, Unavailable, WrongResult
from llama4_kernels.bench.record import Figure

ROOT = Path(__file__).parents[3]
TESTS = "tests/test_layouts.py"
NO_TESTS = 5  # pytest's exit code


def cases() -> list[Case]:
    return [Case({"tests": TESTS})]


def measure(case: Case) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "layouts.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "--junitxml", str(report), TESTS]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
        if done.returncode == NO_TESTS or not report.exists():
            raise Unavailable(f"pytest ran none of {TESTS}: {done.stdout.strip()[-200:] or done.stderr.strip()[-200:]}")
        failed = [f"{test.get('name')}" for test in ElementTree.parse(report).iter("testcase") if test.find("failure") is not None]
        failed += [f"{test.get('name')}" for test in ElementTree.parse(report).iter("testcase") if test.find("error") is not None]
        count = sum(1 for _ in ElementTree.parse(report).iter("testcase"))
    if failed or done.returncode:
        raise WrongResult(f"{len(failed)} of {count} layout tests fail: {', '.join(failed)}")
    return {"passed": Figure(count, "1")}


MEASUREMENTS = (Measurement("layouts", "Does the hardware lay data out as the kernels and the emulation assume?", 35, cases, measure),)
