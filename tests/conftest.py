"""What a test needs, by marker; a test that this process cannot run is left out.

triton: runs Triton kernels, on a GPU or, with TRITON_INTERPRET=1, in the interpreter. A test parametrised with backend="triton" is one.
compile: compiles kernels without a GPU: Triton's, which a process with TRITON_INTERPRET=1 cannot, and CUDA's with nvcc.
gpu: needs a Hopper GPU. There, a test parametrised with a backend that runs on it is one. tests/sglang needs SGLang.
"""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import backends
import pytest
import torch
from hypothesis import HealthCheck, settings

import llama4_kernels
from llama4_kernels import cuda
from llama4_kernels.ops.backend import BACKENDS, OPS

sys.path.append(str(Path(__file__).parents[1]))  # for bench/, after whatever holds the installed package

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

EXAMPLES = 6 if INTERPRETING else 10 if torch.cuda.is_available() else 25  # on a GPU Triton compiles one or two kernels for each
settings.register_profile(
    "ops",
    deadline=None,
    derandomize=True,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.filter_too_much],  # a backend may refuse many of the arguments that an op takes
)
settings.load_profile("ops")

if INTERPRETING:
    import triton_interpreter

    triton_interpreter.install()

BENCH_NEEDS = ("jsonschema_rs", "jinja2", "plotly", "rich", "scipy", "typer")  # a GPU host without network may lack the extra

collect_ignore = [] if any(importlib.metadata.distributions(name="sglang")) else ["sglang"]
collect_ignore += [] if all(importlib.util.find_spec(name) for name in BENCH_NEEDS) else ["bench"]


def pytest_report_header() -> str:
    return f"llama4_kernels: {Path(llama4_kernels.__file__).parent}\nCUDA extension: {cuda.why_not_built() or 'built'}"


def pytest_generate_tests(metafunc):
    """In test_<stem>.py, `backend` is each backend that computes that stem's ops here, `gpu_backend` each that does on a GPU, and
    `graph_backend` these and the reference: see backends.assert_replays."""
    stem = metafunc.module.__name__.removeprefix("test_")
    if stem not in OPS.values():
        return
    here = backends.available(stem)
    on_gpu = [backend for backend in here if backends.device_of(backend).type == "cuda"]
    on_gpu_or_reference = [backend for backend in here if backend in (*on_gpu, "reference")]
    for name, values in (("backend", here), ("gpu_backend", on_gpu), ("graph_backend", on_gpu_or_reference)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        backend = next((parameters[name] for name in ("backend", "gpu_backend", "graph_backend") if name in parameters), None)
        if parameters.get("backend") == "triton":
            item.add_marker("triton")
        if backend in BACKENDS and backends.device_of(backend).type == "cuda" and on_hopper:
            item.add_marker("gpu")
    cannot = {
        "triton": not INTERPRETING and not torch.cuda.is_available(),
        "compile": INTERPRETING,
        "gpu": not on_hopper,
    }
    left_out = [item for item in items if any(cannot[name] and item.get_closest_marker(name) for name in cannot)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup():
    torch.manual_seed(0)


def pytest_runtest_logfinish():
    """A fault on the GPU fails all that this process does on it from then on: end a worker of xdist, which starts another."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run in this process."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
