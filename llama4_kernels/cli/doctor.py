"""`llama4-kernels doctor`: what is installed, what each op would run on, and whether SGLang picks the plugin up."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import llama4_kernels
from llama4_kernels.bench.machine import installed_version
from llama4_kernels.cuda import hides_installed_package

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

ENTRY_POINT_GROUP = "sglang.srt.plugins"
ENTRY_POINT = "llama4_kernels"

# Runs as SGLang's own processes do: load_plugins() first, which logs a hook that it cannot apply and goes on.
PROBE = """
import json
from sglang.srt.plugins import load_plugins
load_plugins()
missing = []
try:
    from llama4_kernels.sglang import plugin
    registered = plugin.is_registered()
    if registered:
        plugin.register_scheduler_hooks()
        plugin.register_request_hooks()
        plugin.register_image_hooks()
        missing = plugin.missing_hooks()
except Exception as error:
    registered = f"{type(error).__name__}: {error}"
print("PROBE " + json.dumps(dict(registered=registered, missing=missing)))
"""


@dataclass(frozen=True)
class Row:
    """One line of the report.

    status: "OK", "WARN" (it works, but not as well as it could) or "FAIL" (the plugin would not serve).
    advice: what to do about it, or "".
    """

    what: str
    status: str
    found: str
    advice: str = ""


def run(as_json: bool = False) -> int:
    """Print the report; 1 where a row says FAIL, else 0."""
    rows = [*installed(), *machine(), *backends(), *plugin()]
    failures = [row for row in rows if row.status == "FAIL"]
    if as_json:
        print(json.dumps({"ok": not failures, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        _print(rows, failures)
    return 1 if failures else 0


def installed() -> Iterator[Row]:
    """Python and packages."""
    yield Row("python", "OK", f"{platform.python_version()} ({sys.executable})")
    yield Row("llama4_kernels", "OK", llama4_kernels.__version__)
    here = Path.cwd() / "llama4_kernels"
    if (here / "__init__.py").exists() and hides_installed_package(here):
        found = f"python -m sglang.launch_server imports {here} if it starts in this folder, not the installed package"
        yield Row("this folder", "WARN", found, "start the server in another one, or with PYTHONSAFEPATH=1")
    yield Row("torch", "OK", torch.__version__)
    for package in ("triton", "transformers"):
        version = installed_version(package)
        if version:
            yield Row(package, "OK", version)
        else:
            yield Row(package, "WARN", "not installed", f"pip install {package}")


def machine() -> Iterator[Row]:
    """CUDA toolkit, driver, GPU and our extension."""
    from llama4_kernels import cuda
    from llama4_kernels.ops.types import E4M3_CAPABILITY

    compiler = _nvcc()
    if compiler:
        release = re.search(r"release (\S+),", _output([compiler, "--version"]))
        yield Row("CUDA toolkit", "OK", f"{release[1] if release else 'of unknown release'} ({compiler})")
    else:
        yield Row("CUDA toolkit", "OK", "none: needed only to build the CUDA extension")
    smi = shutil.which("nvidia-smi")
    driver = _output([smi, "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0] if smi else ""
    yield Row("driver", "OK", driver or "none")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            found = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
            if (major, minor) >= E4M3_CAPABILITY:
                yield Row(f"GPU {index}", "OK", found)
            else:
                advice = "serve bf16 weights and a bf16 KV cache: before 8.9 FP8 runs in plain PyTorch, which CUDA graphs cannot capture"
                yield Row(f"GPU {index}", "WARN", found, advice)
    else:
        advice = "torch sees no GPU though there is a driver: check CUDA_VISIBLE_DEVICES and torch's CUDA version" if driver else ""
        yield Row("GPU", "WARN", "none: every op runs in plain PyTorch on the CPU, for tests and demonstrations", advice)
    if reason := cuda.why_not_built():
        yield Row("CUDA extension", "WARN", f"not built: {reason}")
    elif not torch.cuda.is_available():
        yield Row("CUDA extension", "OK", "built; there is no GPU here")
    elif reason := cuda.why_not(torch.device("cuda", 0)):
        yield Row("CUDA extension", "WARN", f"built, but {reason}")
    else:
        yield Row("CUDA extension", "OK", "built, and made for this GPU")


def backends() -> Iterator[Row]:
    """The backend of each op."""
    from llama4_kernels.ops import backend

    try:
        for choice in backend.choices():
            yield Row(f"op {choice.op}", "OK", f"{choice.backend} ({choice.why})")
    except (RuntimeError, ValueError) as error:
        requested = os.environ.get(backend.ENVIRONMENT_VARIABLE)
        yield Row("ops", "FAIL", str(error), f"change or unset {backend.ENVIRONMENT_VARIABLE}={requested}" if requested else "")


def plugin() -> Iterator[Row]:
    """Whether SGLang would find, load and keep the plugin; stops at the first cause why not."""
    sglang = installed_version("sglang")
    if not sglang or importlib.util.find_spec("sglang") is None:
        yield Row("sglang", "FAIL", "not installed in this environment", 'pip install "llama4_kernels[sglang]"')
        return
    tested = _tested_sglang()
    if tested.contains(sglang, prereleases=True):
        yield Row("sglang", "OK", f"{sglang} (tested: {tested})")
    else:
        advice = f'pip install "sglang{tested}", or see with `llama4-kernels demo` whether this one serves'
        yield Row("sglang", "WARN", f"{sglang} (tested: {tested})", advice)

    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    ours = next((point for point in points if point.name == ENTRY_POINT), None)
    if ours is None:
        found = f"no entry point {ENTRY_POINT} in the group {ENTRY_POINT_GROUP}"
        yield Row("entry point", "FAIL", found, "install the package (pip install .), a source folder on sys.path is not enough")
        return
    yield Row("entry point", "OK", f"{ours.name} = {ours.value}")

    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and ENTRY_POINT not in (name.strip() for name in allowed.split(",")):
        yield Row("SGLANG_PLUGINS", "FAIL", f"SGLANG_PLUGINS={allowed} leaves {ENTRY_POINT} out", f"unset it, or add {ENTRY_POINT} to it")
        return
    yield Row("SGLANG_PLUGINS", "OK", allowed or "not set: every plugin is loaded")

    yield _picked_up()


def _picked_up() -> Row:
    """Ask SGLang itself, in a process of its own: it swallows a plugin's exceptions."""
    what, advice = "picked up", "see the output above, and reinstall llama4_kernels or sglang"
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    answer = re.search(r"^PROBE (.*)$", probe.stdout, re.MULTILINE)
    if answer is None:
        return Row(what, "FAIL", f"SGLang's load_plugins() failed: {_last_line(probe.stderr)}", advice)
    state = json.loads(answer[1])
    if state["registered"] is not True:
        cause = state["registered"] or _last_line(probe.stderr) or "register() was not called"
        return Row(what, "FAIL", f"SGLang did not run the plugin: {cause}", advice)
    if state["missing"]:
        return Row(what, "FAIL", f"SGLang could not hook {', '.join(state['missing'])}", f'pip install "sglang{_tested_sglang()}"')
    return Row(what, "OK", "SGLang loads the plugin; add --model-impl llama4_kernels to the launch command")


def _print(rows: list[Row], failures: list[Row]) -> None:
    from rich.text import Text

    from llama4_kernels.tables import new_console, new_table

    console = new_console()
    if console.is_terminal:
        colours = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
        table = new_table("", "", "", "what to do")
        for row in rows:
            table.add_row(Text(row.status, colours[row.status]), Text(row.what), Text(row.found), Text(row.advice))
        console.print(table)
    else:
        for row in rows:
            print(f"{row.status:4}  {row.what}: {row.found}" + (f" -> {row.advice}" if row.advice else ""))
    for row in failures:
        print(f"FAIL: {row.what}: {row.found}" + (f"; {row.advice}" if row.advice else ""), file=sys.stderr)


def _tested_sglang() -> SpecifierSet:
    """The releases that our own extra `sglang` asks for."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("llama4_kernels") or [])
    return next(requirement.specifier for requirement in requirements if requirement.name == "sglang")


def _nvcc() -> str | None:
    """The nvcc that the build takes."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc"]
    return next(filter(None, (shutil.which(candidate) for candidate in candidates if candidate)), None)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
