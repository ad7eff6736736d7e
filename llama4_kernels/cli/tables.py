"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Collection

from rich.table import Table


def new_table(*titles: str, right: Collection[str] = (), title: str | None = None) -> Table:
    """A table without rows, of a column for each of `titles`, those in `right` aligned to the right, under a `title`.

    Where the terminal is too narrow, a cell goes on in the next line, within a word if need be: a path or a number loses no character.
    """
    made = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for each in titles:
        made.add_column(each, overflow="fold", justify="right" if each in right else "left")
    return made
