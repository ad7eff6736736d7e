"""Running `llama4-kernels eval`, and what its tests skip without."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
from typer.testing import CliRunner

from llama4_kernels.cli.main import app

has_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='lm_eval is not installed: pip install ".[eval]"')
has_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason='matplotlib is not installed: ".[eval]"')
has_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")


def run_eval(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})


def only_line(result) -> str:
    """The one line on stderr of an evaluation that stopped."""
    assert result.exit_code == 1 and "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("FAIL: ")]
    assert len(lines) == 1
    return lines[0]


def after(count: int, answer, then):
    """`answer` for the first `count` prompts, then `then`."""
    numbers = itertools.count(1)
    return lambda prompt: answer(prompt) if next(numbers) <= count else then(prompt)
