"""The oracle: every op in plain PyTorch, fp32 inside. Runs anywhere; reads sizes on the host, so no CUDA-graph capture."""

import torch


def why_not(device: torch.device) -> str:
    """Why the reference cannot run on `device`; it always can."""
    return ""
