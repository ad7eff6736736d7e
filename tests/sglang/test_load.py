"""200 requests from 32 clients at once: every answer is the one given alone, and the memory they took comes back. And as many requests of
the full context as the planner promises run together in the pools that it asks for."""

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
import requests
from engine import TOLERANCE, llama4_server, prompt

from llama4_kernels.cli.checkpoint import CHUNK
from llama4_kernels.cli.plan import memory, model

REQUESTS, CLIENTS = 200, 32
LENGTHS = (1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 100, 3 * CHUNK + 7)
PROMPTS = 27  # different ones; each is asked seven times or more, so that some find their prefix in the radix cache
NEW_TOKENS = 12
CANCELLED_TOKENS = 600  # of an answer that is given up after its first READ: it must not be computed to its end
READ = 5
CONTEXT, PIECE = 1024, 48
PLANNED = 4  # requests of the full context at once
RSS_BOUND = 32 << 20  # growth of the engine's processes under all this load


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]


def body(number: int, new_tokens: int, **more):
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    ids = prompt(LENGTHS[number % len(LENGTHS)], seed=number)
    return {"input_ids": ids, "sampling_params": sampling, "return_logprob": True} | more


def answer(found) -> Answer:
    entries = found["meta_info"]["output_token_logprobs"]
    return Answer([entry[1] for entry in entries], [entry[0] for entry in entries])


def at_once(server, number: int) -> Answer:
    return answer(server.post("/generate", body(number, NEW_TOKENS), timeout=300))


def streamed(server, number: int, new_tokens: int = NEW_TOKENS, read: int | None = None) -> Answer:
    """read: give up once that many tokens have come, closing the connection."""
    with requests.post(f"{server.url}/generate", json=body(number, new_tokens, stream=True), stream=True, timeout=300) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line or line == b"data: [DONE]":
                continue
            event = json.loads(line.removeprefix(b"data: "))
            assert "error" not in event, event
            if read is not None and len(event["meta_info"]["output_token_logprobs"]) >= read:
                return answer(event)
    assert event["meta_info"]["finish_reason"] == {"type": "length", "length": new_tokens}
    return answer(event)


def client(server, request: int) -> tuple[str, int, Answer]:
    """Request number `request` in its kind: a tenth is cancelled, the others stream or do not by turns."""
    number = request % PROMPTS
    if request % 10 == 3:
        return "cancelled", number, streamed(server, number, CANCELLED_TOKENS, READ)
    if request % 2:
        return "streamed", number, streamed(server, number)
    return "at once", number, at_once(server, number)


def loads(server) -> dict:
    return requests.get(f"{server.url}/v1/loads", timeout=60).json()["loads"][0]


def wait_until_idle(server, seconds: float) -> dict:
    """The load once nothing runs, waits or holds KV slots; fails where that takes longer."""
    ends = time.monotonic() + seconds
    while True:
        found = loads(server)
        if found["num_running_reqs"] == found["num_waiting_reqs"] == found["num_used_tokens"] == 0:
            return found
        assert time.monotonic() < ends, f"not idle after {seconds:.0f} s: {found}"
        time.sleep(0.2)


def flush(server) -> None:
    """Empty the radix cache, which SGLang refuses while a request runs."""
    assert requests.post(f"{server.url}/flush_cache?timeout=10", timeout=60).status_code == 200


def resident(server) -> int:
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def assert_same(found: Answer, alone: Answer) -> None:
    count = len(found.tokens)
    assert count and found.tokens == alone.tokens[:count]
    assert found.logprobs == pytest.approx(alone.logprobs[:count], abs=TOLERANCE)


def planned_ratio(path) -> float:
    """--swa-full-tokens-ratio by which local layers hold just what the planner says that PLANNED requests need."""
    flags = memory.Flags(
        CONTEXT, tp=1, mem_fraction_static=0.5, swa_full_tokens_ratio=0.8, chunked_prefill_size=PIECE, page_size=1, kv_bytes=4
    )
    return math.ceil(memory.local_tokens(model.load(str(path), None), flags, PLANNED) / (PLANNED * CONTEXT) * 1e4) / 1e4


def check_planned(server) -> None:
    """PLANNED requests that fill their context run together, none taken back for want of slots, with the answers given alone."""

    def fill(prompts: list[list[int]]) -> list[Answer]:
        return [answer(found) for found in server.post("/generate", body(0, 48, input_ids=prompts), timeout=300)]

    prompts = [prompt(CONTEXT - 64, seed=1000 + number) for number in range(PLANNED)]
    alone = [fill([ids])[0] for ids in prompts]
    flush(server)
    log_before = len(server.log.read_text())
    together = fill(prompts)  # in one message: what runs together does not hang on the clock
    log = server.log.read_text()[log_before:]
    assert max(map(int, re.findall(r"#running-req: (\d+)", log))) == PLANNED and "retract" not in log.lower()
    for found, reference in zip(together, alone):
        assert_same(found, reference)
    flush(server)


def test_two_hundred_requests_from_32_clients(make, tmp_path):
    """With pools so small that requests wait and slots are used again, prefill in pieces smaller than the chunk, and SGLang's own leak
    checks at every step."""
    path = make("scout")
    pools = (f"--max-total-tokens={PLANNED * CONTEXT}", f"--swa-full-tokens-ratio={planned_ratio(path)}")
    flags = (f"--chunked-prefill-size={PIECE}", "--max-running-requests=16", f"--context-length={CONTEXT}", *pools)
    environment = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
    with llama4_server(path, *flags, log=tmp_path / "log", environment=environment) as server:
        check_planned(server)
        alone = [at_once(server, number) for number in range(PROMPTS)]
        flush(server)
        wait_until_idle(server, 10)
        before = resident(server)

        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda request: client(server, request), range(REQUESTS)))
        wait_until_idle(server, 10)  # 20 answers of CANCELLED_TOKENS would take longer by far
        flush(server)
        after = resident(server)

        kinds = [kind for kind, _, _ in answers]
        assert len(answers) == REQUESTS and {kind: kinds.count(kind) for kind in set(kinds)} == {
            "cancelled": 20,
            "streamed": 80,
            "at once": 100,
        }
        for kind, number, found in answers:
            assert READ <= len(found.tokens) <= NEW_TOKENS if kind == "cancelled" else len(found.tokens) == NEW_TOKENS
            assert_same(found, alone[number])
        assert [at_once(server, number) for number in (0, 9)] == [alone[number] for number in (0, 9)]
        assert after - before < RSS_BOUND
        assert server.process.poll() is None
