"""Grammars that xgrammar 0.2.7 runs out of stack on, which ends the scheduler, or takes minutes to compile."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping

# Arrays and objects of JSON within each other. Those of 256 levels are compiled in under a second, those of 2000 in minutes.
MAX_LEVELS = 256

# Levels with those that are entered through references. The stack lasts for three times as many.
MAX_REFERENCED_LEVELS = 8192

# Groups of one pattern, which may be within each other. The stack lasts for three times as many.
MAX_GROUPS = 4096

PATTERNS = ("pattern", "grammar")  # keys of texts with groups, in schemas and in structural tags


class _Object(list):
    """A JSON object as its (key, value) pairs, also of keys that are there twice."""

    @functools.cached_property
    def by_key(self) -> dict[str, object]:
        return dict(self)


def check_grammars(params: Mapping[str, object]) -> None:
    """ValueError for sampling parameters with a grammar that is nested too deeply.

    Left to SGLang are what is no JSON, which it refuses, and `regex` and `ebnf`, whose nesting xgrammar limits itself.
    """
    for name in ("json_schema", "structural_tag"):
        if isinstance(text := params.get(name), str):
            _check(name, text)


@functools.lru_cache(maxsize=16)  # a batch has the same for all of its prompts
def _check(name: str, text: str) -> None:
    try:
        root = json.loads(text, object_pairs_hook=_Object)
    except RecursionError as error:
        raise ValueError(_too_deep(name)) from error
    except ValueError:
        return
    containers = _containers(name, root)
    depths = {}
    for container in reversed(containers):  # what it holds comes before it
        depths[id(container)] = 1 + max((depths.get(id(value), 0) for value in _values(container)), default=0)
    references = {value for container in containers for value in _values(container) if isinstance(value, str) and value.startswith("#/")}
    entered = {id(target): target for reference in references if (target := _resolved(root, reference)) is not None}
    levels = sum(depths.get(target, 0) for target in (id(root), *entered))  # each is entered once at most
    if levels > MAX_REFERENCED_LEVELS:
        raise ValueError(f"{name} has {levels} levels, with those that it refers to, needs at most {MAX_REFERENCED_LEVELS}")


def _containers(name: str, root: object) -> list[list]:
    """The arrays and objects of a document, each before those that it holds."""
    found, level, levels = [], [root], 0
    while level := [value for value in level if isinstance(value, list)]:
        levels += 1
        if levels > MAX_LEVELS:
            raise ValueError(_too_deep(name))
        found += level
        for container in level:
            _check_patterns(name, container)
        level = [value for container in level for value in _values(container)]
    return found


def _values(container: list) -> Iterator[object]:
    return (value for _, value in container) if isinstance(container, _Object) else iter(container)


def _resolved(root: object, reference: str) -> object:
    """What a reference such as #/$defs/name stands for, None where there is no such thing."""
    found = root
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, _Object):
            found = found.by_key.get(key)
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _check_patterns(name: str, container: list) -> None:
    for key, value in container if isinstance(container, _Object) else ():
        for pattern in (key, value if key in PATTERNS and isinstance(value, str) else ""):  # patternProperties has them as keys
            if pattern.count("(") > MAX_GROUPS:
                raise ValueError(f"{name} has {pattern.count('(')} opening parentheses in one pattern, needs at most {MAX_GROUPS}")


def _too_deep(name: str) -> str:
    return f"{name} is nested too deeply, needs at most {MAX_LEVELS} arrays and objects within each other"
