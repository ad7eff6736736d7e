"""Llama 4 kernels for Hopper, and the SGLang plugin that serves Llama 4 through them.

`llama4_kernels.ops` holds the ops; `--model-impl llama4_kernels` makes SGLang use them.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llama4_kernels import ops
from llama4_kernels.ops.backend import BackendError, available_backends, use_backend

try:
    __version__ = version("llama4_kernels")
except PackageNotFoundError:
    raise ImportError(f"llama4_kernels is not installed in this Python: pip install {Path(__file__).parents[1]}") from None

__all__ = ["BackendError", "__version__", "available_backends", "ops", "use_backend"]
