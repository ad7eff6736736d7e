"""The host's half of a launch, compiled by nvcc over a stand-in for CUDA's runtime and driver: host.cu."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import emulation
import pytest

SOURCE = Path(__file__).with_name("host.cu")

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")]

KIB = 1 << 10


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = tmp_path_factory.mktemp("host") / "host.so"
    flags = [
        "-std=c++17",
        "-O0",
        "-arch=sm_90a",
        "-cudart=none",
        "-Xcompiler=-fPIC",
        "-Xlinker=-Bsymbolic",
        "-shared",
        f"-I{emulation.CSRC}",
    ]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("launch_of_less_between_limit_and_launch_of_more", "map_in_a_new_thread"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def test_a_launch_by_another_thread_takes_no_shared_memory_away(host):
    """Captured graphs keep their kernels' sizes too, while later launches of the same kernel have others."""
    sizes = [ctypes.c_size_t(kib * KIB) for kib in (100, 200)]
    assert host.launch_of_less_between_limit_and_launch_of_more(*sizes) == b""


def test_more_shared_memory_than_a_block_can_have_is_refused(host):
    sizes = [ctypes.c_size_t(kib * KIB) for kib in (100, 228)]
    assert host.launch_of_less_between_limit_and_launch_of_more(*sizes).startswith(b"op: CUDA refused the launch")


def test_a_thread_without_a_context_can_make_a_tensor_map(host):
    assert host.map_in_a_new_thread() == b""
