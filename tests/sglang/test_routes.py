"""What the routes take on servers with other flags than that of test_bad_requests.py."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from sglang.srt.entrypoints import http_server
from sglang.srt.utils import auth

from llama4_kernels.sglang import body_checks
from llama4_kernels.sglang.routes import same_key


@pytest.mark.parametrize("header, key, allowed", [
    ("Bearer secret", "secret", True),
    ("Bearer Secret", "secret", False),
    ("Bearer é", "secret", False),
    ("Bearer Ã©", "é", True),  # UTF-8, read as Latin-1
])  # fmt: skip
def test_keys_of_any_characters(header, key, allowed, monkeypatch):
    monkeypatch.setattr(auth, "secrets", SimpleNamespace(compare_digest=same_key))
    decision = auth.decide_request_auth(
        method="GET", path="/", authorization_header=header, api_key=key, admin_api_key=None, auth_level=auth.AuthLevel.NORMAL
    )
    assert (decision.allowed, decision.error_status_code) == (allowed, 401)


@pytest.mark.parametrize("endpoint, argument, body, flags, message", [
    ("parse_function_call_request", "obj", {"tool_call_parser": "llama3"}, {"tool_call_parser": "llama3"}, None),
    ("parse_function_call_request", "obj", {"tool_call_parser": "pythonic"}, {"tool_call_parser": "llama3"}, None),
    ("parse_function_call_request", "obj", {"tool_call_parser": "hermes"}, {"tool_call_parser": "llama3"}, "needs pythonic or llama3"),
    ("separate_reasoning_request", "obj", {"reasoning_parser": "gpt-oss"}, {"reasoning_parser": "gpt-oss"}, None),
    ("separate_reasoning_request", "obj", {"reasoning_parser": "gpt-oss"}, {"reasoning_parser": "qwen3"}, "reasoning_parser is gpt-oss"),
    ("separate_reasoning_request", "obj", {"reasoning_parser": "qwen3"}, {"reasoning_parser": None}, None),
    ("v1_decisions_request", "request", {"chat_template_kwargs": {"chat_template": "a"}}, {"trust_request_chat_template": True}, None),
    ("v1_decisions_request", "request", {"chat_template_kwargs": {"enable_thinking": False}}, {"trust_request_chat_template": False}, None),
    ("v1_score_request", "request", {"query": [5], "items": [[5]]}, {}, None),
    ("v1_score_request", "request", {"query": "a", "items": ["a"]}, {}, None),
    ("v1_score_request", "request", {"query": None, "items": [[5]]}, {}, None),
    ("openai_v1_completions", "request", {"session_params": None, "suffix": "", "best_of": 2, "n": 2}, {}, None),
    ("openai_v1_embeddings", "request", {}, {}, None),
])  # fmt: skip
def test_bodies(endpoint, argument, body, flags, message, monkeypatch):
    monkeypatch.setattr(body_checks, "get_serving", lambda: SimpleNamespace(**flags))
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        body_checks.check_body(getattr(http_server, endpoint), {argument: SimpleNamespace(**body), "raw_request": None})
