"""`python -m sglang.launch_server` without the imports, which take most of the start of a tiny server: forked from a process that has SGLang in
memory already, as its own processes are then forked from it. What it runs, and how it is asked and stopped, is the same.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TextIO
from unittest import mock

import torch

MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.mllama4",
    "transformers.models.llama4.processing_llama4",
    "frozen",
)


def forkserver(environment: Mapping[str, str]) -> multiprocessing.context.BaseContext:
    """Starts processes that have MODULES in memory. environment: what these are imported with, for the first who asks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), environment.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, environment, PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()
    return context


def processes(count: int, environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """`count` processes that have MODULES in memory, without plugins, and these variables besides those of this process."""
    environment = os.environ | environment
    return ProcessPoolExecutor(count, forkserver(environment), _begin, [environment])


class Process:
    """A server, with those parts of subprocess.Popen that llama4_kernels.cli.server uses."""

    def __init__(self, command: Sequence[str], *, stdout: TextIO, env: Mapping[str, str], **options):
        assert command[1:3] == ["-m", "sglang.launch_server"] and options["start_new_session"]
        self._process = forkserver(env).Process(target=_launch, args=(command[3:], stdout.name, dict(env)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        self._process.join()
        return self.returncode


def _launch(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    with open(log, "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    _begin(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    _serve(arguments)


def _begin(environment: dict[str, str]) -> None:
    assert sys.modules.keys() >= set(MODULES)  # of one that it cannot import a forkserver says nothing
    os.environ.clear()
    os.environ.update(environment)


def _serve(arguments: list[str]) -> None:
    sys.argv = ["launch_server", *arguments]
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force: None  # SGLang's choice is "spawn", which imports all again
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def import_once(command: Sequence[str], **options) -> subprocess.Popen:
    """A server that imports SGLang for itself, as variables need that are read on import, and on a CPU forks its own processes."""
    if torch.cuda.is_available():
        return subprocess.Popen(command, **options)
    assert command[1:3] == ["-m", "sglang.launch_server"]
    return subprocess.Popen([sys.executable, __file__, *command[3:]], **options)


popen = subprocess.Popen if torch.cuda.is_available() else Process  # CUDA does not outlive a fork

if __name__ == "__main__":
    _serve(sys.argv[1:])
