"""The machine that a result was measured on: device, versions and commit, and the clocks of the moment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from llama4_kernels.ops.backend import default_device

COMMIT_VARIABLE = "LLAMA4_KERNELS_COMMIT"


@dataclass(frozen=True)
class Clocks:
    """What the GPU ran at in one moment; None where the driver does not tell."""

    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class Machine:
    """device: the GPU's name as the driver gives it, or the CPU's. kind: "gpu" or "cpu". capability: such as "9.0".

    cuda: the version that torch was built for. commit: of this package; dirty: whether its tree differed from it. None: not known, or
    not there.
    """

    device: str
    kind: str
    capability: str | None
    power_limit_w: float | None
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    python: str
    commit: str | None
    dirty: bool | None

    @property
    def slug(self) -> str:
        """A folder's name: nvidia-h200, or cpu for any CPU."""
        return "cpu" if self.kind == "cpu" else re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    @property
    def short_commit(self) -> str:
        return self.commit[:7] if self.commit else "unknown"


def this_machine(device: torch.device | None = None) -> Machine:
    """The facts of this machine, for measurements on `device`: by default the current GPU where there is one, else the CPU."""
    if device is None:
        device = default_device()
    commit, dirty = _commit()
    common = {
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
    }
    if device.type != "cuda":
        return Machine(_cpu_name(), "cpu", None, None, None, None, **common)
    properties = torch.cuda.get_device_properties(device)
    limit, driver = _smi(device, "power.limit", "driver_version")
    capability = f"{properties.major}.{properties.minor}"
    return Machine(properties.name, "gpu", capability, _number(limit), driver, torch.version.cuda, **common)


def clocks(device: torch.device) -> Clocks | None:
    """What a GPU runs at now; None for a CPU."""
    if device.type != "cuda":
        return None
    return Clocks(*map(_number, _smi(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")))


def _smi(device: torch.device, *fields: str) -> list[str | None]:
    """Fields of nvidia-smi for this GPU; None for each where there is no nvidia-smi or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [None] * len(fields)
    uuid = "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else [None] * len(fields)


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"[\d.]+", text) else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """Of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Of the repository that this file, or else the working folder, is in; LLAMA4_KERNELS_COMMIT for a copy without one."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    for folder in (Path(__file__).parent, Path.cwd()):
        if (root := _git(folder, "rev-parse", "--show-toplevel")) and (Path(root) / "llama4_kernels" / "ops").is_dir():
            changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return _git(folder, "rev-parse", "HEAD"), None if changed is None else bool(changed)
    return None, None


def _git(folder: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
