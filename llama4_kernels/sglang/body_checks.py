"""Bodies of requests that SGLang 0.5.23 takes and would compute for hours, or otherwise than they ask: refused before its endpoints."""

from __future__ import annotations

from collections.abc import Iterator

from sglang.srt.entrypoints import http_server
from sglang.srt.runtime_context import get_serving


def check_body(endpoint, values: dict) -> None:
    """ValueError where one of the checks of `endpoint` refuses its body.

    values: its arguments by name.
    """
    for check in _CHECKS.get(endpoint, ()):
        check(values["obj" if "obj" in values else "request"])


def _check_template(body) -> None:
    """As SGLang itself does on /v1/chat/completions: a template may loop for ever, or take all memory."""
    if "chat_template" in (body.chat_template_kwargs or {}) and not get_serving().trust_request_chat_template:
        raise ValueError("chat_template_kwargs has chat_template, needs a server with --trust-request-chat-template")


def _check_tool_choice(body) -> None:
    choice = body.tool_choice
    if isinstance(choice, dict) and not choice.get("name") and not isinstance(choice.get("function") or {}, dict):
        raise ValueError(f"tool_choice has function {choice['function']!r}, needs name, or function as an object with one")


def _check_tool_call_parser(body) -> None:
    """Of the other parsers several have patterns that take hours for some texts."""
    own = get_serving().tool_call_parser
    if body.tool_call_parser not in ("pythonic", own):
        needed = "pythonic" if own in (None, "pythonic") else f"pythonic or {own}"
        raise ValueError(f"tool_call_parser is {body.tool_call_parser}, needs {needed}, unless the server has it as --tool-call-parser")


def _check_reasoning_parser(body) -> None:
    """Of the parsers this is the one whose patterns take hours for some texts."""
    if body.reasoning_parser.lower() == "gpt-oss" and get_serving().reasoning_parser != "gpt-oss":
        raise ValueError(f"reasoning_parser is {body.reasoning_parser}, needs a server with --reasoning-parser gpt-oss")


def _check_score(body) -> None:
    """SGLang would make a text of the list of tokens."""
    if isinstance(body.query, str) and isinstance(body.items, list) and any(isinstance(item, list) for item in body.items):
        raise ValueError("query is a text and items has tokens, needs both as texts or both as tokens")


def _check_session(body) -> None:
    if body.session_params:
        raise ValueError("session_params is given, needs the route /generate: this one does not read it")


def _check_completion(body) -> None:
    if body.suffix and http_server.get_global_state().template_manager.completion_template_name is None:
        raise ValueError("suffix is given, needs a server with --completion-template")
    if body.best_of is not None and body.best_of > body.n:
        raise ValueError(f"best_of is {body.best_of}, needs at most n, which is {body.n}: no more answers are computed than returned")


def _check_images(body) -> None:
    for message in body.messages:
        for block in _blocks(message.content):
            if block.type == "image" and not _has_image(block.source):
                raise ValueError("an image has no source that is read, needs one with a url, or of type base64 with data")


def _blocks(content) -> Iterator:
    for block in content if isinstance(content, list) else ():
        yield block
        if block.type == "tool_result":
            yield from _blocks(block.content)


def _has_image(source) -> bool:
    return isinstance(source, dict) and bool(source.get("data" if source.get("type") == "base64" else "url"))


_CHECKS = {
    http_server.v1_responses_request: (_check_template, _check_tool_choice),
    http_server.v1_decisions_request: (_check_template,),
    http_server.systemone_decisions: (_check_template,),
    http_server.parse_function_call_request: (_check_tool_call_parser,),
    http_server.separate_reasoning_request: (_check_reasoning_parser,),
    http_server.v1_score_request: (_check_score,),
    http_server.openai_v1_chat_completions: (_check_session,),
    http_server.sagemaker_chat_completions: (_check_session,),
    http_server.openai_v1_completions: (_check_session, _check_completion),
    http_server.anthropic_v1_messages: (_check_images,),
    http_server.anthropic_v1_count_tokens: (_check_images,),
}
