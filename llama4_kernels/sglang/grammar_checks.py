"""Grammars that xgrammar 0.2.7 runs out of stack on, which ends the scheduler, or takes minutes to compile."""

from __future__ import annotations

import json
from collections.abc import Mapping

# Arrays and objects of JSON within each other. Those of 256 levels are compiled in under a second, those of 2000 in minutes.
MAX_LEVELS = 256

# Levels that are entered through references. The stack lasts for three times as many.
MAX_REFERENCED_LEVELS = 8192

# Groups of one pattern, which may be within each other. The stack lasts for three times as many.
MAX_GROUPS = 4096


def check_grammars(params: Mapping[str, object]) -> None:
    """ValueError for sampling parameters with a grammar that is nested too deeply.

    Left to SGLang are what is no JSON, which it refuses, and `regex` and `ebnf`, whose nesting xgrammar limits itself.
    """
    for name in ("json_schema", "structural_tag"):
        if isinstance(text := params.get(name), str):
            try:
                # Objects become [key, value, key, value, …], with the keys that are there twice.
                specification = json.loads(text, object_pairs_hook=lambda pairs: [item for pair in pairs for item in pair])
            except RecursionError as error:
                raise ValueError(_too_deep(name)) from error
            except ValueError:
                continue
            _check_levels(name, specification)


def _check_levels(name: str, specification: object) -> None:
    levels, level, references = 0, [specification], set()
    while level:
        for text in level:
            _check_groups(name, text)
        references.update(text for text in level if isinstance(text, str) and text.startswith("#/"))
        lists = [items for items in level if isinstance(items, list)]
        level = [item for items in lists for item in items]
        levels += bool(lists)
        if levels > MAX_LEVELS:
            raise ValueError(_too_deep(name))
    # Each reference is followed once, to something no deeper than the whole.
    if levels * (1 + len(references)) > MAX_REFERENCED_LEVELS:
        raise ValueError(
            f"{name} has {levels} levels and refers to {len(references)} places, needs at most {MAX_REFERENCED_LEVELS} of both multiplied"
        )


def _too_deep(name: str) -> str:
    return f"{name} is nested too deeply, needs at most {MAX_LEVELS} arrays and objects within each other"


def _check_groups(name: str, pattern: object) -> None:
    if isinstance(pattern, str) and pattern.count("(") > MAX_GROUPS:
        raise ValueError(f"{name} has {pattern.count('(')} opening parentheses in one pattern, needs at most {MAX_GROUPS}")
