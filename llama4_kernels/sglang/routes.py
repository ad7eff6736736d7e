"""What the routes of SGLang 0.5.23 answer with status 500, for an error of the request, is answered with status 400."""

from __future__ import annotations

import copy
import functools
import logging
import secrets
from collections.abc import AsyncIterator
from types import SimpleNamespace

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import TypeAdapter
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.api_contract import generate_contract_error
from sglang.srt.entrypoints.openai import serving_chat
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils import auth

from llama4_kernels.sglang.body_checks import check_body
from llama4_kernels.sglang.request_checks import check_tokens
from llama4_kernels.sglang.request_errors import read_request
from llama4_kernels.sglang.text_checks import check_length

logger = logging.getLogger(__name__)

_ENTRYPOINTS = "sglang.srt.entrypoints"
_OPENAI = f"{_ENTRYPOINTS}.openai"
_OLLAMA = f"{_ENTRYPOINTS}.ollama.serving.OllamaServing"

# Endpoints that read a body of which FastAPI has not looked at the types of all fields.
_READERS = (http_server.vertex_generate, http_server.remove_external_corpus)


@functools.cache
def hook_routes() -> None:
    """Of a process that serves the model over HTTP, before its app starts."""
    for target, hook, kind in (
        ("fastapi.routing.solve_dependencies", _read_body, HookType.AROUND),
        ("fastapi.routing.run_endpoint_function", _run_endpoint, HookType.AROUND),
        (f"{_ENTRYPOINTS}.http_server.generate_request", _check_built_request, HookType.BEFORE),
        (f"{_OLLAMA}._convert_options_to_sampling_params", _check_options, HookType.BEFORE),
        (f"{_OLLAMA}.handle_chat", _check_ollama, HookType.BEFORE),
        (f"{_OLLAMA}.handle_generate", _check_ollama, HookType.BEFORE),
        (f"{_OLLAMA}._stream_chat_response", _start_stream, HookType.AROUND),
        (f"{_OLLAMA}._stream_generate_response", _start_stream, HookType.AROUND),
        (f"{_OPENAI}.serving_chat.OpenAIServingChat._process_messages", _process_messages, HookType.AROUND),
        (f"{_OPENAI}.protocol.ResponsesRequest.to_sampling_params", _give_all_tokens, HookType.AFTER),
        ("sglang.srt.managers.tokenizer_manager.TokenizerManager._execute_profile", _profile, HookType.AROUND),
        (f"{_OPENAI}.serving_tokenize.OpenAIServingDetokenize._handle_non_streaming_request", _check_detokenized, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    for error in (ValueError, RecursionError):
        http_server.app.add_exception_handler(error, _answer_error)
    auth.secrets = SimpleNamespace(compare_digest=same_key)
    serving_chat.parallel_prompt_encode = functools.partial(_encode_prompt, serving_chat.parallel_prompt_encode)


async def _read_body(original, **kwargs):
    """Answer with FastAPI's own error if a validator cannot read the body."""
    try:
        with read_request():
            return await original(**kwargs)
    except ValueError as error:
        raise RequestValidationError([{"type": "value_error", "loc": ("body",), "msg": str(error)}]) from error


async def _run_endpoint(original, *, dependant, values, **kwargs):
    check_body(dependant.call, values)
    if dependant.call not in _READERS:
        return await original(dependant=dependant, values=values, **kwargs)
    with read_request():
        return await original(dependant=dependant, values=values, **kwargs)


def _check_built_request(built: GenerateReqInput, request):
    """Look at the request that /vertex_generate builds as FastAPI looks at the body of /generate."""
    if (error := generate_contract_error(vars(built))) is not None:
        raise ValueError(error)
    return (_types_of_requests().validate_python(vars(built)), request), {}


@functools.cache
def _types_of_requests() -> TypeAdapter[GenerateReqInput]:
    return TypeAdapter(GenerateReqInput)


def _check_options(serving, options=None) -> None:
    if "seed" in (options or {}):
        raise ValueError("seed is given, needs options without one: SGLang has no such sampling parameter")


def _check_ollama(serving, request, *args, **kwargs) -> None:
    check_length("messages", "".join(message.content.strip() for message in getattr(request, "messages", ())), serving.tokenizer_manager)
    if request.format is not None:
        raise ValueError("format is given, needs an answer without: SGLang reads none on this route, use /v1/chat/completions")
    if any(each.images for each in (*getattr(request, "messages", ()), request) if hasattr(each, "images")):
        raise ValueError("images is given, needs text only: SGLang reads no images on this route, use /v1/chat/completions")


async def _start_stream(original, serving, *args) -> StreamingResponse:
    """Wait for the first chunk, and with it for an error of the request, before a status is sent, as SGLang does for OpenAI's routes.

    SGLang sends no text with the last chunk, so that it is given that text in a chunk before.
    """
    apart = copy.copy(serving)
    apart.tokenizer_manager = SimpleNamespace(generate_request=functools.partial(_last_text_apart, serving.tokenizer_manager))
    response = await original(apart, *args)
    response.body_iterator = _put_before(await anext(response.body_iterator), response.body_iterator)
    return response


async def _last_text_apart(manager, *args) -> AsyncIterator[dict]:
    async for chunk in manager.generate_request(*args):
        if chunk["meta_info"]["finish_reason"] is not None:
            yield chunk | {"meta_info": {}}
        yield chunk


async def _put_before(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in chunks:
        yield chunk


def _process_messages(original, *args, **kwargs):
    with read_request():
        return original(*args, **kwargs)


def _encode_prompt(original, tokenizer, text, *args):
    check_length("the prompt of messages", text, http_server.get_global_state().tokenizer_manager)
    return original(tokenizer, text, *args)


def _give_all_tokens(params: dict, request, *args, **kwargs) -> None:
    """SGLang takes two of max_output_tokens for tokens that it does not add."""
    if request.max_output_tokens is not None:
        params["max_new_tokens"] += 2


async def _profile(original, manager, request):
    """A profile that is not started or stopped, because another runs or none does."""
    try:
        return await original(manager, request)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _check_detokenized(serving, request, *args, **kwargs) -> None:
    several = bool(request.tokens) and isinstance(request.tokens[0], list)
    for tokens in request.tokens if several else [request.tokens]:
        check_tokens("tokens", tokens, serving.tokenizer_manager.model_config.vocab_size)


def same_key(given: str, wanted: str) -> bool:
    """Of a header, which is read as Latin-1, and of a flag; Python's own comparison of texts fails at characters other than ASCII."""
    return secrets.compare_digest(given.encode("latin-1"), wanted.encode(errors="surrogateescape"))


async def _answer_error(request, error: Exception) -> JSONResponse:
    """A ValueError, which most routes answer themselves, but not Ollama's, /vertex_generate and those of the parsers, or a RecursionError."""
    logger.error("llama4_kernels: a request is answered with status 400 by %s: %s", request.url.path, error, exc_info=error)
    return JSONResponse({"error": {"message": str(error)}}, status_code=400)
