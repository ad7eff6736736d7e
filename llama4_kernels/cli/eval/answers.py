"""Answers on disk, one line of JSON each, appended as they come, so that a run that breaks goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from llama4_kernels.cli.eval.target import EvalError


class AnswerLog:
    """The file `path`: a line that says which run it belongs to, then a line per answer. A context manager that holds its lock.

    run: what the answers depend on; a file with answers of another run is left alone.
    answers: key -> answer, of this run and those before it.
    note: "", or what was amiss with the file and what was done about it.
    Raises EvalError for a file that another process writes, that belongs to another run, or that is no such file.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path, self.run = path, run
        self.answers: dict[str, Any] = {}
        self.note = ""

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
            self._write({"run": self.run})
            return
        lines = content.split(b"\n")
        first = _parsed(lines[0]).get("run")
        if not isinstance(first, dict):
            raise EvalError(f"{self.path} does not begin as a file of answers: give another --out; nothing was changed")
        other = [
            f"{name} {first.get(name)!r}, not {self.run.get(name)!r}" for name in first | self.run if first.get(name) != self.run.get(name)
        ]
        if other and (len(lines) > 2 or lines[-1]):
            raise EvalError(f"{self.path} holds answers of another run ({'; '.join(other)}): give another --out")
        if other:  # a run that got no answer
            self._file.truncate(0)
            self._write({"run": self.run})
            return
        damaged = 0
        for line in lines[1:-1]:
            entry = _parsed(line)
            if isinstance(entry.get("key"), str) and "answer" in entry:
                self.answers[entry["key"]] = entry["answer"]
            else:
                damaged += 1
        if damaged or lines[-1]:
            self._set_aside(content, damaged + bool(lines[-1]))

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
