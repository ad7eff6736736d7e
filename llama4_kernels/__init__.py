"""Llama 4 kernels for Hopper, and the SGLang plugin that serves Llama 4 through them.

`llama4_kernels.ops` holds the ops; `--model-impl llama4_kernels` makes SGLang use them.
"""

from importlib.metadata import version

from llama4_kernels import ops
from llama4_kernels.ops.backend import BackendError, available_backends, use_backend

__version__ = version("llama4_kernels")
__all__ = ["BackendError", "__version__", "available_backends", "ops", "use_backend"]
