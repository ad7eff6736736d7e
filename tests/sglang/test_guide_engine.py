"""The guide's launch lines through the command itself, on the real server: each starts, and what it promises comes through openai's client.

The other lines of `llama4-kernels guide` differ in numbers, of which test_pools.py tests what SGLang makes, and in that the two for accuracy have
the chat template of the checkpoint.
"""

import functools
import re

import preloaded
import pytest
import requests
from typer.testing import CliRunner

from llama4_kernels.cli import guide
from llama4_kernels.cli.main import app
from llama4_kernels.cli.plan import memory, model

PROMISES = {"chat", "streaming", "tool call, required", "tool call, pythonic", "tool call, streamed", "structured output", "bad requests"}


@pytest.mark.parametrize("line, more", [("scout-1m", {"images"}), ("maverick", set())])
def test_a_line_keeps_its_promises(line, more, tmp_path, monkeypatch):
    """And the planner's pools are those that the running server reports."""
    reported = {}
    check = guide.check

    def check_and_report(client, *, images):
        reported.update(requests.get(str(client.base_url).replace("/v1/", "/server_info"), timeout=60).json()["internal_states"][0])
        sizes = [guide._ask(client, max_tokens=1, **tools).usage.prompt_tokens for tools in ({}, {"tools": [guide.WEATHER]})]
        assert sizes[0] == sizes[1], "--chat-template llama-4 has learnt to render tools: docs/serving.md says that it does not"
        return check(client, images=images)

    monkeypatch.setattr(guide, "check", check_and_report)
    monkeypatch.setattr(guide, "serve", functools.partial(guide.serve, popen=preloaded.popen))
    result = CliRunner().invoke(app, ["guide", "--line", line, "--keep", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    kept = set(re.findall(r"^(\w[\w, ]*?) +kept ", result.output, re.MULTILINE))
    assert kept == {"starts"} | PROMISES | more

    found = model.load(str(tmp_path / "kept" / line), None)
    context = 1_000_000 if line == "scout-1m" else found.max_context
    flags = memory.Flags(context, guide.RANKS, 0.9, memory.SWA_RATIO, 4096, 1, 4)
    pools = memory.pools(found, flags, 1 << 40, most_tokens=8192)
    assert pools.tokens == reported["memory_usage"]["token_capacity"] and pools.swa_tokens == reported["memory_usage"]["token_capacity_swa"]
    assert pools.bytes / (1 << 30) == pytest.approx(reported["memory_usage"]["kvcache"], abs=1e-3)
