"""From the options of `llama4-kernels eval` to the evaluation that they ask for, and from what stops it to one line."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llama4_kernels.cli import checkpoint
from llama4_kernels.cli.eval import accuracy, guide, needle, parity
from llama4_kernels.cli.eval.target import EvalError, Target, check_model, reach, started
from llama4_kernels.cli.server import ServerError
from llama4_kernels.ops.backend import ENVIRONMENT_VARIABLE
from llama4_kernels.tables import new_console

CPU_SERVER = ("--dtype=float32", "--max-running-requests=8")
TINY_MAX_GEN_TOKS = 32
TINY_CONTEXT = 2048
NEEDLE_MARGIN = 1.1  # a server's context, per token of the longest prompt asked for


@dataclass(frozen=True)
class Options:
    """What was given on the command line; exactly one of model, url and tiny is not None. See cli/main.py for what each means."""

    model: str | None
    url: str | None
    tiny: checkpoint.Like | None
    fp8: bool
    tp: int
    server: tuple[str, ...]
    out: Path


def run_accuracy(
    options: Options, task: str | None, limit: int | None, max_gen_toks: int | None, concurrency: int | None, model: str | None
) -> int:
    """The default: lm_eval. model: the guide's, or None to read it off the server's model name."""

    def ask(console: Console) -> int:
        _require("lm_eval", "matplotlib")
        tiny, served = options.tiny is not None, _served(options)
        protocol = accuracy.Protocol(
            task=task or ("own_questions" if tiny else "mmlu_pro"),
            max_gen_toks=max_gen_toks or (TINY_MAX_GEN_TOKS if tiny else accuracy.GUIDE_MAX_GEN_TOKS),
            concurrency=concurrency or accuracy.GUIDE_CONCURRENCY,
            limit=limit,
            model=model or guide.model_in(served["model"]),
        )
        server = _target(console, options, accuracy.GUIDE_SERVER, TINY_CONTEXT)
        return accuracy.run(console, served, server, protocol, options.out)

    return _one_line(ask)


def run_needle(options: Options, lengths: list[int], depths: list[float]) -> int:
    """--needle."""
    context = round(max(lengths) * NEEDLE_MARGIN) + 256

    def ask(console: Console) -> int:
        _require("matplotlib")
        server = _target(console, options, (f"--context-length={context}",), context)
        return needle.run(console, _served(options), server, lengths, depths, options.out)

    return _one_line(ask)


def run_parity(options: Options, text: Path | None, tokens: int | None, dtype: str, against: list[str] | None) -> int:
    """--parity."""

    def compare(console: Console) -> int:
        _require("matplotlib")
        with contextlib.ExitStack() as stack:
            model = options.model if options.tiny is None else _tiny(stack, options, dtype=dtype)
            everything = ["transformers", *(["stock"] if torch.cuda.is_available() else [])]
            return parity.run(
                console,
                model,
                options.out,
                text=text,
                tokens=tokens,
                dtype=dtype,
                tp=options.tp,
                against=against or everything,
                flags=options.server,
            )

    return _one_line(compare)


def _one_line(evaluate) -> int:
    """The exit code of evaluate(console); what stops it is printed and makes it 1."""
    try:
        return evaluate(new_console())
    except (EvalError, ServerError, OSError) as error:
        print(f"FAIL: {error}", file=sys.stderr)
    except ModuleNotFoundError as missing:
        print(f'FAIL: {missing.name} is not installed: pip install "llama4_kernels[sglang,eval]"', file=sys.stderr)
    return 1


def _require(*packages: str) -> None:
    """EvalError where one of them is not there: before there is anything to lose."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise EvalError(f'{package} is not installed: pip install "llama4_kernels[eval]"')


def _served(options: Options) -> dict[str, Any]:
    """What the answers in options.out depend on beside what the server says of itself: "model", its name, and how a server is started.
    EvalError where there is no such model or server."""
    if options.url is not None:
        return {"model": _name(options)}
    asked_for = os.environ.get(ENVIRONMENT_VARIABLE, "")
    return {"model": _name(options), "tp": options.tp, "server_flags": list(options.server), ENVIRONMENT_VARIABLE: asked_for}


def _name(options: Options) -> str:
    """Of the model; EvalError where there is none."""
    if options.url is not None:
        return reach(options.url).model
    if options.model is not None:
        check_model(options.model)
        return options.model
    return f"tiny-{options.tiny}{'-fp8' if options.fp8 else ''}"


@contextlib.contextmanager
def _target(console: Console, options: Options, flags: tuple[str, ...], tiny_context: int) -> Iterator[Target]:
    """The server at options.url, or one started with `flags` and those of the command line, which come last and so prevail."""
    if options.url is not None:
        yield reach(options.url)
        return
    with contextlib.ExitStack() as stack:
        model = options.model
        if options.tiny is not None:
            model = _tiny(stack, options, max_position_embeddings=tiny_context)
            flags = (f"--context-length={tiny_context}", f"--max-total-tokens={max(4 * TINY_CONTEXT, tiny_context + 1024)}")
        cpu = () if torch.cuda.is_available() else CPU_SERVER
        log = options.out / "server.log"
        yield stack.enter_context(started(console, model, *cpu, *flags, *options.server, log=log, tp=options.tp))


def _tiny(stack: contextlib.ExitStack, options: Options, **how: Any) -> Path:
    """A tiny random checkpoint in a folder that is gone with `stack`. how: options of checkpoint.make."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llama4_kernels-eval-")))
    form = "compressed-tensors-experts" if options.fp8 else None
    return checkpoint.make(folder / _name(options), options.tiny, fp8=form, **how)
