"""Turns the docstrings of this project into what autodoc reads, so that the reference pages are generated from them.

A docstring here is prose, "name: what it is" entries with indented continuations, "Returns …" and "Raises …", formulas indented after a
colon, and a doctest.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

ENTRY = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)")
OUTCOME = re.compile(r"(Returns|Raises) (.*)")


def process(app: Any, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Rewrite `lines`, the docstring of the function or class `described`: a handler of autodoc-process-docstring."""
    lines[:] = restructured(inspect.cleandoc("\n".join(lines)), set(inspect.signature(described).parameters)).split("\n")


def restructured(docstring: str, names: set[str]) -> str:
    """`docstring` as reStructuredText. names: what an entry may describe; other lines with a colon are prose."""
    blocks: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", docstring):
        if paragraph.startswith(">>>"):
            blocks.append(paragraph)
        else:
            blocks += _paragraph(paragraph.split("\n"), names)
    return "\n\n".join(blocks)


def _paragraph(lines: list[str], names: set[str]) -> list[str]:
    blocks: list[str] = []
    kind = ""
    for line in lines:
        entry, outcome = ENTRY.fullmatch(line), OUTCOME.fullmatch(line)
        if entry and set(entry[1].split(", ")) <= names:
            blocks.append(f"**{entry[1]}**\n   {_text(entry[2], names)}")
            kind = "entry"
        elif outcome:
            blocks.append(f"{outcome[1]}\n   {_text(outcome[2], names)}")
            kind = "entry"
        elif kind == "entry":
            blocks[-1] += f"\n   {_text(line.strip(), names)}"
        elif line.startswith(" "):
            formula = f"   {line.strip()}"
            if kind == "formula":
                blocks[-1] += f"\n{formula}"
            else:
                blocks.append(f".. code-block:: text\n\n{formula}")
            kind = "formula"
        elif kind == "prose":
            blocks[-1] += f"\n{_text(line, names)}"
        else:
            blocks.append(_text(line, names))
            kind = "prose"
    return blocks


def _text(text: str, names: set[str]) -> str:
    """Prose in reStructuredText: single backticks are code, further entries within the line are bold, nothing else is markup."""
    parts = text.split("`")
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part}``"
        else:
            escaped = re.sub(r"([\\*|_])", r"\\\1", part)
            parts[i] = re.sub(r"(?<=\. )([a-z]\w*): ", lambda m: f"**{m[1]}**: " if m[1] in names else m[0], escaped)
    return "".join(parts)
