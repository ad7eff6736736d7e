"""Answers on disk, one line of JSON each, appended as they come, so that a run that breaks goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from llama4_kernels.cli.eval.target import EvalError, Target


@contextlib.contextmanager
def answered_by(
    console: Console, server: AbstractContextManager[Target], path: Path, run: dict[str, Any]
) -> Iterator[tuple[Target, AnswerLog]]:
    """The server within the block, and the answers that it and its like gave before, of which the console says how many there are.

    run: what the answers depend on beside what the server says of itself. Where that alone is another run's, the server is not started.
    Raises EvalError as AnswerLog does.
    """
    with AnswerLog(path, run) as log:
        if log.note:
            console.print(log.note, soft_wrap=True)
        with server as target:
            facts = target.facts()
            log.belongs_to(facts)
            if log.earlier:
                unchecked = "" if facts else "; the server says nothing of itself, so nothing tells whether it gave them"
                console.print(f"{len(log.earlier)} answers of an earlier run are taken from {path}{unchecked}", soft_wrap=True)
            yield target, log


class AnswerLog:
    """The file `path`: a line that says which run it belongs to, then a line per answer. A context manager that holds its lock.

    run: what the answers depend on, as far as it is known before the server is; belongs_to adds to it. A file with answers of another run is
        left alone.
    answers: key -> answer, of this run and those before it. earlier: the keys of those before it.
    note: "", or what was amiss with the file and what was done about it.
    Raises EvalError for a file that another process writes, that belongs to another run, or that is no such file.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path, self.run = path, run
        self.answers: dict[str, Any] = {}
        self.earlier: frozenset[str] = frozenset()
        self.note = ""
        self._first: dict[str, Any] = {}  # the run that the file says it belongs to
        self._is_empty = True  # of answers

    def __enter__(self) -> AnswerLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError as error:
            self._file.close()
            raise EvalError(f"another run writes {self.path}: wait for it, or give another --out") from error
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def belongs_to(self, facts: dict[str, Any]) -> None:
        """Add `facts` to the run, before any answer; EvalError where the file holds answers of a run with others, or with more of them."""
        self.run = self.run | facts
        self._begin(self._first | self.run)

    def add(self, key: str, answer: Any, **about: Any) -> None:
        """Keep an answer. about: what else to write beside it for a reader of the file."""
        self.answers[key] = answer
        self._write({"key": key, **about, "answer": answer})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        if not content:
            self._restart()
            return
        lines = content.split(b"\n")
        first = _parsed(lines[0]).get("run")
        if not isinstance(first, dict):
            raise EvalError(f"{self.path} does not begin as a file of answers: give another --out; nothing was changed")
        self._first, self._is_empty = first, len(lines) <= 2 and not lines[-1]
        self._begin(self.run)
        damaged = 0
        for line in lines[1:-1]:
            entry = _parsed(line)
            if isinstance(entry.get("key"), str) and "answer" in entry:
                self.answers[entry["key"]] = entry["answer"]
            else:
                damaged += 1
        if damaged or lines[-1]:
            self._set_aside(content, damaged + bool(lines[-1]))
        self.earlier = frozenset(self.answers)

    def _begin(self, names: Iterable[str]) -> None:
        """Begin the file anew where it holds no answer and is another run's by one of these `names`; EvalError where it holds some."""
        other = [
            f"{name} {self._first.get(name)!r}, not {self.run.get(name)!r}" for name in names if self._first.get(name) != self.run.get(name)
        ]
        if other and not self._is_empty:
            raise EvalError(f"{self.path} holds answers of another run ({'; '.join(other)}): give another --out")
        if other:
            self._restart()

    def _restart(self) -> None:
        self._first, self._is_empty = dict(self.run), True
        self._file.truncate(0)
        self._write({"run": self.run})

    def _set_aside(self, content: bytes, damaged: int) -> None:
        """Keep the file as it is under another name, and what can be read of it under its own."""
        number = 1
        while (copy := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        copy.write_bytes(content)
        readable = [line for line in content.split(b"\n")[:-1] if _parsed(line)]
        self._file.seek(0)
        self._file.truncate()
        self._file.write(b"".join(line + b"\n" for line in readable))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.note = (
            f"{damaged} line(s) of {self.path} are cut off or damaged; the file is kept as {copy.name}, those questions are asked again"
        )


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object in `line`, or an empty one."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
