"""What the routes of SGLang 0.5.23 answer with status 500, for an error of the request, is answered with status 400."""

from __future__ import annotations

import functools
import logging

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sglang.srt.entrypoints import http_server
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from llama4_kernels.sglang.request_checks import check_tokens
from llama4_kernels.sglang.request_errors import read_request

logger = logging.getLogger(__name__)

_OPENAI = "sglang.srt.entrypoints.openai"


@functools.cache
def hook_routes() -> None:
    """Of a process that serves the model over HTTP, before its app starts."""
    for target, hook, kind in (
        ("fastapi.routing.solve_dependencies", _read_body, HookType.AROUND),
        (f"{_OPENAI}.serving_chat.OpenAIServingChat._process_messages", _process_messages, HookType.AROUND),
        (f"{_OPENAI}.serving_tokenize.OpenAIServingDetokenize._handle_non_streaming_request", _check_detokenized, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    http_server.app.add_exception_handler(ValueError, _answer_value_error)


async def _read_body(original, **kwargs):
    """Of a body that a validator cannot read FastAPI's own error."""
    try:
        with read_request():
            return await original(**kwargs)
    except ValueError as error:
        raise RequestValidationError([{"type": "value_error", "loc": ("body",), "msg": str(error)}]) from error


def _process_messages(original, *args, **kwargs):
    with read_request():
        return original(*args, **kwargs)


def _check_detokenized(serving, request, *args, **kwargs) -> None:
    several = bool(request.tokens) and isinstance(request.tokens[0], list)
    for tokens in request.tokens if several else [request.tokens]:
        check_tokens("tokens", tokens, serving.tokenizer_manager.model_config.vocab_size)


async def _answer_value_error(request, error: ValueError) -> JSONResponse:
    """Most routes answer it themselves, but not Ollama's and those of the parsers."""
    logger.error("llama4_kernels: a request is answered with status 400 by %s: %s", request.url.path, error, exc_info=error)
    return JSONResponse({"error": {"message": str(error)}}, status_code=400)
