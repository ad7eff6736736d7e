"""The tables that commands print, and where."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 200  # of what goes to a file or a pipe


def new_console() -> Console:
    """Where results are printed, as they are, without markup: as wide as the terminal, or wide enough for any table."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def new_table(*titles: str, right: Collection[str] = (), title: str | None = None) -> Table:
    """A table without rows, of a column for each of `titles`, those in `right` aligned to the right, under a `title`.

    Where the terminal is too narrow, a cell goes on in the next line, within a word if need be: a path or a number loses no character.
    """
    made = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for each in titles:
        made.add_column(each, overflow="fold", justify="right" if each in right else "left")
    return made
