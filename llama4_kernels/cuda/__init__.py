"""The ops in CUDA C++ for Hopper (sm_90a), from the extension that csrc/ builds."""

import importlib.util

import torch


def why_not(device: torch.device) -> str:
    """Why the CUDA kernels cannot run on `device`, or ""."""
    if importlib.util.find_spec("llama4_kernels.cuda._C") is None:
        return "the CUDA extension was not built (reinstall with LLAMA4_KERNELS_CUDA=on to see why)"
    if device.type != "cuda":
        return f"{device.type} is not a GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU (compute capability 9.0)"
    return ""
