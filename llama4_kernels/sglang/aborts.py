"""Aborts of one request, where SGLang 0.5.23 aborts all whose rids begin with its rid, other clients' too: they get half an answer, with
status 200."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def spare_longer_rids(scheduler, rid: str) -> Iterator[None]:
    """Hide from an abort of `rid` the requests whose rids go on after it, but for the parts of a batch of that name, to which SGLang gives
    numbers. With disaggregation, those that wait for another server stay in sight."""
    requests = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue, *scheduler.collect_inflight_reqs()]
    if scheduler.chunked_req is not None:
        requests.append(scheduler.chunked_req)
    is_batch = not any(request.rid == rid for request in requests)
    of_batch = re.compile(re.escape(rid) + r"_\d+")
    longer = [
        (request, request.rid)
        for request in requests
        if request.rid != rid and request.rid.startswith(rid) and not (is_batch and of_batch.fullmatch(request.rid))
    ]
    for request, _ in longer:
        request.rid = ""
    try:
        yield
    finally:
        for request, its_rid in longer:
            request.rid = its_rid
