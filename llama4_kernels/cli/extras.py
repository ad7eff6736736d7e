"""Packages that a command needs and `pip install llama4_kernels` alone does not bring."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

BROUGHT_BY = {"triton": "triton"}  # package -> what to install; any other comes with the extra


@contextlib.contextmanager
def needed(command: str, extra: str) -> Iterator[None]:
    """Around what a command does: where a package is not there, one line says what to install, and the exit code is 1."""
    try:
        yield
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package in ("", "llama4_kernels"):
            raise
        requirement = BROUGHT_BY.get(package, f'"llama4_kernels[{extra}]"')
        print(f"{command}: {package} is not installed: pip install {requirement}", file=sys.stderr)
        raise typer.Exit(1) from missing
