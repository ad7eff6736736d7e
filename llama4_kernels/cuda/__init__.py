"""The ops in CUDA C++ for Hopper (sm_90a), from the extension that csrc/ builds."""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch

_REASON_FILE = Path(__file__).with_name("not_built.txt")


def why_not(device: torch.device) -> str:
    """Why the CUDA kernels cannot run on `device`, or ""."""
    if reason := why_not_built():
        return f"the CUDA extension was not built: {reason}"
    if device.type != "cuda":
        return f"{device.type} is not a GPU"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU (compute capability 9.0)"
    return ""


def why_not_built() -> str:
    """Why this installation has no CUDA extension, as its build recorded it, or ""."""
    if importlib.util.find_spec("llama4_kernels.cuda._C") is not None:
        return ""
    if not _REASON_FILE.exists():
        if hides_installed_package(Path(__file__).parents[1]):
            return (
                f"{Path(__file__).parents[1]} holds sources alone, and Python takes it before the installed package where it starts in that folder: "
                "start it in another one, or with PYTHONSAFEPATH=1"
            )
        return f"{Path(__file__).parent} has neither the extension nor a note of why not: install the package again (pip install .)"
    return f"{_REASON_FILE.read_text().strip()} (reinstall with LLAMA4_KERNELS_CUDA=on to build it)"


def hides_installed_package(folder: Path) -> bool:
    """Whether the package in `folder` is another than one that is installed, which it comes before in a process that starts beside it."""
    installed = [Path(found.locate_file(folder.name)) for found in importlib.metadata.distributions(name="llama4_kernels")]
    return any((other / "__init__.py").exists() and not other.samefile(folder) for other in installed)
