"""Errors of requests that SGLang 0.5.23 did not expect: it answers them with status 500, as if the server were at fault, and lives on.

Here they become what SGLang answers with status 400. The log keeps each with its traceback, should the fault be the server's after all.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)

# What code raises that reads a field of another type, length or depth than it takes the field to have.
UNEXPECTED = (TypeError, AttributeError, KeyError, IndexError, AssertionError, OverflowError, RecursionError)


@contextlib.contextmanager
def read_request() -> Iterator[None]:
    """ValueError in place of an UNEXPECTED error, and of a RuntimeError about a file: for code that only reads a request."""
    try:
        yield
    except (*UNEXPECTED, RuntimeError) as error:
        if not isinstance(error, UNEXPECTED) and not _is_about_a_file(error):
            raise
        logger.error("llama4_kernels: a request is answered with status 400 for %r", error, exc_info=error)
        raise ValueError(f"the request cannot be read, a field is not of the type, length or depth that it needs: {error!r}") from error


def _is_about_a_file(error: BaseException | None) -> bool:
    """Whether an OSError is among the causes."""
    while error is not None:
        error = error.__cause__ or error.__context__
        if isinstance(error, OSError):
            return True
    return False
