"""Regular expressions that a request brings, or that look for tool calls in an answer, in bounded time.

Python's own engine may take twice as long for each further character, and everything else waits: in the scheduler all requests, in the HTTP
process all answers. The package regex, which transformers needs, is quicker in most such cases, and gives up in time.
"""

from __future__ import annotations

import functools
import logging
import re
from types import SimpleNamespace

import regex

SECONDS = 0.2  # of one search

logger = logging.getLogger(__name__)


# What may hold a brace that begins no number of repetitions, and that brace.
_BRACE = re.compile(r"\\N\{[^}]*\}|\\.|\{(?!(?:\d+(?:,\d*)?|,\d*)\})", re.DOTALL)


@functools.lru_cache(maxsize=1024)
def _with_plain_braces(pattern: str) -> str:
    """The pattern as Python's own engine reads it: regex takes {e} and the like for "with errors"."""
    return _BRACE.sub(lambda found: r"\{" if found[0] == "{" else found[0], pattern)


def search(pattern: str, text: str) -> regex.Match | None:
    """re.error where that takes too long, for which SGLang ends the request alone, with status 400."""
    try:
        return regex.search(_with_plain_braces(pattern), text, timeout=SECONDS)
    except TimeoutError:
        raise re.error(f"a search takes longer than {SECONDS} s") from None
    except regex.error as error:
        raise re.error(str(error)) from error


def bound_stop_patterns() -> None:
    """Of a process that decides where answers end."""
    from sglang.srt.managers import schedule_batch

    schedule_batch.re = SimpleNamespace(search=search, error=re.error)


def bound_tool_calls() -> None:
    """Of a process that looks for tool calls as Llama 4 writes them."""
    from sglang.srt.function_call import pythonic_detector

    pythonic_detector.re = SimpleNamespace(compile=_ToolCalls, DOTALL=regex.DOTALL)


class _ToolCalls:
    """A compiled pattern, which finds nothing in a text that takes too long."""

    def __init__(self, pattern: str, flags: int):
        self._pattern = regex.compile(pattern, flags)

    def search(self, text: str) -> regex.Match | None:
        try:
            return self._pattern.search(text, timeout=SECONDS)
        except TimeoutError:
            logger.warning("llama4_kernels: tool calls are not looked for in an answer of %d characters: %g s are over", len(text), SECONDS)
            return None
