"""The ops in Triton: any NVIDIA GPU from Ampere on, or the CPU through Triton's interpreter."""

import importlib.util
import os

import torch


def why_not(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is not an NVIDIA GPU of compute capability 8.0 or later"
        return ""
    if device.type == "cpu" and _interprets():
        return ""
    return f"{device.type} is not an NVIDIA GPU (on the CPU, TRITON_INTERPRET=1 runs the interpreter, for tests)"


def why_not_unasked(device: torch.device) -> str:
    """Why Triton is taken on `device` only where it is asked for by name, or ""."""
    return "TRITON_INTERPRET is set, and the interpreter computes bfloat16 and float8 wrongly" if _interprets() else ""


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
