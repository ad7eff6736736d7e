"""What a test needs, by marker; a test that this process cannot run is left out.

triton: runs Triton kernels, on a GPU or, with TRITON_INTERPRET=1, in the interpreter. A test parametrised with backend="triton" is one.
compile: compiles Triton kernels without a GPU, which a process with TRITON_INTERPRET=1 cannot.
gpu: needs a Hopper GPU. tests/sglang needs SGLang.
"""

import importlib.metadata
import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    import triton_interpreter

    triton_interpreter.install()

collect_ignore = [] if any(importlib.metadata.distributions(name="sglang")) else ["sglang"]


def pytest_configure(config):
    config.addinivalue_line("markers", "triton: runs Triton kernels: needs a GPU or TRITON_INTERPRET=1")
    config.addinivalue_line("markers", "compile: compiles Triton kernels without a GPU: not with TRITON_INTERPRET=1")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "backend" in getattr(getattr(item, "callspec", None), "params", ()) and item.callspec.params["backend"] == "triton":
            item.add_marker("triton")
    cannot = {
        "triton": not INTERPRETING and not torch.cuda.is_available(),
        "compile": INTERPRETING,
        "gpu": not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    }
    left_out = [item for item in items if any(cannot[name] and item.get_closest_marker(name) for name in cannot)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run in this process."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
