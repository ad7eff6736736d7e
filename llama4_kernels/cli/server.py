"""Start the installed, unmodified `sglang.launch_server`, wait for it, and stop it with every process it started."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CPU_FLAGS = (
    "--device=cpu",
    "--cuda-graph-backend-decode=disabled",
    "--cuda-graph-backend-prefill=disabled",
    "--skip-server-warmup",
)
TABLE_LINE = re.compile(r"llama4_kernels: (\w+) -> (\w+) \((.*)\)")
REFUSAL_LINE = re.compile(r"llama4_kernels: (\w+ is not computed by .*)")
SERVING_LINE = re.compile(r"llama4_kernels: serving (\w+)")
STOP_SECONDS = 20
PORTS = range(20000, 32768)


class ServerError(RuntimeError):
    """The server did not start, or died."""


@dataclass
class Server:
    """A running server.

    url: http://127.0.0.1:port
    log: file with everything that the server printed
    """

    url: str
    log: Path
    process: subprocess.Popen = field(repr=False)
    seconds_to_start: float = 0.0

    def post(self, route: str, body: dict[str, Any], timeout: float = 120) -> Any:
        """The JSON answer to a POST; ServerError for a status other than 200 or a dead server."""
        import requests

        try:
            answer = requests.post(self.url + route, json=body, timeout=timeout)
        except requests.RequestException as error:
            raise ServerError(f"{route} got no answer: {error}\n{_tail(self.log)}") from error
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}: {answer.text[:500]}\n{_tail(self.log)}")
        return answer.json()

    def serving(self) -> str | None:
        """The model class that the plugin's start-up table names, or None where the plugin did not build the model."""
        found = SERVING_LINE.search(self.log.read_text(errors="replace"))
        return found[1] if found else None

    def backends(self) -> dict[str, tuple[str, str]]:
        """op -> (backend, why), from the plugin's start-up table."""
        return {op: (backend, why) for op, backend, why in TABLE_LINE.findall(self.log.read_text(errors="replace"))}

    def refusals(self) -> list[str]:
        """What the plugin's log says of arguments that a backend did not take, and that went to the next."""
        return list(dict.fromkeys(REFUSAL_LINE.findall(self.log.read_text(errors="replace"))))


@contextlib.contextmanager
def serve(
    model: str | Path,
    *flags: str,
    log: str | Path,
    tp: int = 1,
    port: int | None = None,
    timeout: float = 300,
    environment: dict[str, str] | None = None,
    progress: Callable[[float, str], None] = lambda seconds, line: None,
    popen: Callable[..., subprocess.Popen] = subprocess.Popen,
) -> Iterator[Server]:
    """A server of the checkpoint in the folder `model`, healthy inside the `with` block and gone after it, whatever ends the block.

    flags: further flags of sglang.launch_server. Where there is no GPU the flags that SGLang needs on a CPU come first.
    log: file that takes the server's output.
    port: to listen on; None takes a free one.
    timeout: seconds until the server must be healthy.
    progress: called about twice a second during the start, with the seconds elapsed and the last line of the log.
    popen: what starts the process.
    Raises ServerError, with the end of the log, where the server dies or is not healthy in time.
    """
    import requests

    log = Path(log)
    port = port or _free_port()
    command = [sys.executable, "-m", "sglang.launch_server", f"--model-path={model}", f"--tp-size={tp}"]
    command += ["--host=127.0.0.1", f"--port={port}", *(() if torch.cuda.is_available() else CPU_FLAGS), *flags]
    with log.open("w") as output, _terminated_as_exit():
        process = popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(tp) | (environment or {}), start_new_session=True
        )
        server = Server(f"http://127.0.0.1:{port}", log, process)
        started = time.monotonic()
        stop_signal = signal.SIGTERM
        try:
            while True:
                server.seconds_to_start = time.monotonic() - started
                if process.poll() is not None:
                    raise ServerError(f"the server ended with exit code {process.returncode}\n{_tail(log)}")
                if server.seconds_to_start > timeout:
                    raise ServerError(f"the server was not healthy after {timeout:.0f} s\n{_tail(log)}")
                with contextlib.suppress(requests.RequestException):
                    if requests.get(f"{server.url}/health", timeout=min(10, timeout)).status_code == 200:
                        break
                progress(server.seconds_to_start, _last_line(log))
                time.sleep(0.5)
            stop_signal = signal.SIGINT  # as Ctrl-C: SGLang meets SIGTERM with some 10 s of waiting for requests to end
            yield server
        finally:
            _stop(process, stop_signal)


def _environment(tp: int) -> dict[str, str]:
    # PYTHONSAFEPATH: no package in the current folder comes before the installed one
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    if tp > 1 and not torch.cuda.is_available():
        # One core per rank, and no NCCL: the CUDA build of torch would start it and ask for a GPU.
        environment |= {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp))), "SGLANG_NCCL_SO_PATH": "/none"}
    return environment


def _stop(process: subprocess.Popen, stop_signal: signal.Signals) -> None:
    """End the server and all its descendants: politely, then after STOP_SECONDS by force."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(stop_signal)
        _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the server is stopped."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: the one who runs it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    """A port that is free, and not one that the kernel gives to whoever asks for any: the server listens on it only when it has loaded."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def _tail(log: Path, lines: int = 25) -> str:
    end = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([*end, f"(the whole log: {log})"])
