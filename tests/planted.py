"""Bugs in csrc/ that are compiled together: one library holds a whole list of them, and a test chooses which of them is there."""

from __future__ import annotations

import ctypes
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import emulation

# The file in csrc/; whole statements or an expression in it, between « and » where it takes what stands around them to find them; the bug
Bug = tuple[str, str, str]

CHOSEN = "chosen_bug"
DECLARATION = f'extern "C" {{ __attribute__((weak, visibility("default"))) int {CHOSEN} = 0; }}\n'


def kernels(bugs: Mapping[str, Bug], name: str | None) -> ModuleType:
    """The extension module with the bug of that name among `bugs`, or with none of them, until another is chosen."""
    library = emulation.build(edited=_with_choices(bugs.values()), declarations=DECLARATION)
    module = _load(library)
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), CHOSEN).value = 1 + list(bugs).index(name) if name else 0
    return module


_load = functools.cache(emulation.load)  # once for all its bugs: each library that a process loads keeps stacks, and mappings are limited


def _with_choices(bugs: Iterable[Bug]) -> dict[Path, str]:
    """The text of each file that gets bugs, where each is a choice at run time; they are numbered from 1 on."""
    found: dict[Path, dict[tuple[int, int], list[tuple[int, str]]]] = defaultdict(lambda: defaultdict(list))
    for number, (name, old, new) in enumerate(bugs, 1):
        path = emulation.CSRC / name
        before, part, after = re.fullmatch("(.*)«(.*)»(.*)", old, re.DOTALL).groups() if "«" in old else ("", old, "")
        places = [each.start() + len(before) for each in re.finditer(re.escape(before + part + after), path.read_text())]
        assert places, f"{name} no longer holds {old!r}, where the test plants its bug"
        for place in places:
            found[path][place, place + len(part)].append((number, new))
    return {path: _edit(path.read_text(), places) for path, places in found.items()}


def _edit(text: str, places: Mapping[tuple[int, int], list[tuple[int, str]]]) -> str:
    """places: (start, end) -> the bugs there, each with its number."""
    untouched = len(text)
    for (start, end), bugs in sorted(places.items(), reverse=True):
        assert end <= untouched, f"bugs overlap in {text[start:untouched]!r}"
        untouched, piece = start, text[start:end]
        for number, bug in bugs:
            if (piece + bug).rstrip().endswith(";"):
                piece = f"if ({CHOSEN} == {number}) {{ {bug} }} else {{ {piece} }}"
            else:
                piece = f"({CHOSEN} == {number} ? ({bug}) : ({piece}))"
        text = text[:start] + piece + text[end:]
    return text
