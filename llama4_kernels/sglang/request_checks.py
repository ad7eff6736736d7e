"""Requests that SGLang 0.5.23 takes and that then end the server, with all that it computes, are answered with status 500, or with what was
not asked for: SGLang's Llama 4 does not read embeddings. They are refused where SGLang validates requests, so that the answer is status 400
and the others go on."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import get_type_hints

import msgspec
import numpy as np
import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor, _cache_from_str

from llama4_kernels.sglang.grammar_checks import check_grammars
from llama4_kernels.sglang.media_checks import ImageTokens, check_media

# What SGLang holds integers of sampling parameters in.
INT32_MAX = 2**31 - 1

# Logits stay finite in float32 when they are divided by the smallest temperature, 1e-6: infinite ones make the probabilities NaN.
LARGEST_LOGIT_BIAS = 1e30
SMALLEST_REPETITION_PENALTY = 1e-3

# Answers to one prompt, and of one request where there is more than one to each: a few bytes could ask for more than memory holds.
MAX_SAMPLES, MAX_ANSWERS = 1 << 14, 1 << 20

# Logprobs of tokens other than a prompt's and an answer's own. Of the most likely ones SGLang takes as many as any request asks for, for
# each of up to 2048 tokens of the requests that run together. What it keeps until the answer takes some 70 bytes each: of 20 at a token, as
# OpenAI's API allows, a small part of what the token's keys and values take; where there are more, MAX_LOGPROBS are some 1.1 GiB in the
# scheduler, and 2 GiB in the process that answers.
MAX_TOP_LOGPROBS, USUAL_LOGPROBS, MAX_LOGPROBS = 1 << 13, 20, 1 << 24

# What SGLang makes itself, what only custom logit processors read, and tokens that may be numbers, where Python is asked, beside strings.
UNTYPED = frozenset({"input_ids", "mm_inputs", "time_stats", "custom_params", "logit_bias"})

HEALTH_ROUTES = ("/health", "/health_generate")


def check_request(
    request,
    input_ids: list[int] | None,
    *,
    vocab_size: int,
    end_tokens: frozenset[int],
    computes_whole_prompts: bool,
    image_tokens: ImageTokens | None,
) -> None:
    """ValueError for a request that the model cannot compute.

    request: SGLang's GenerateReqInput of one prompt.
    input_ids: its tokens, those of its images included; None where there are none yet.
    end_tokens: those that end an answer, of config.json, generation_config.json and the tokenizer.
    computes_whole_prompts: whether each is prefilled in one piece, none of it from a cache.
    image_tokens: None where the model sees no images.
    """
    for name in ("input_embeds", "positional_embed_overrides"):
        if getattr(request, name) is not None:
            raise ValueError(f"{name} is given, needs text or input_ids instead: the model embeds tokens itself")
    if input_ids == [] and not _continues_a_session(request):
        raise ValueError("the prompt has no tokens, needs at least one")
    check_tokens("input_ids", input_ids, vocab_size)
    _check_sampling_params(request.sampling_params, vocab_size, end_tokens)
    for name in ("return_routed_experts", "return_indexer_topk"):
        if getattr(request, name):
            raise ValueError(f"{name} is set, needs an answer without: the model keeps no such choices of its layers")
    if request.lora_id is not None:
        raise ValueError("lora_id is given, needs a request without one: the model has no adapters")
    if request.return_hidden_states not in (True, False, "last"):
        raise ValueError(f'return_hidden_states is {request.return_hidden_states!r}, needs true, false or "last"')
    # Also without return_logprob: SGLang takes the largest of the requests that run together.
    _check_type("top_logprobs_num", request.top_logprobs_num, int)
    most = min(vocab_size, MAX_TOP_LOGPROBS)
    if not 0 <= request.top_logprobs_num <= most:
        raise ValueError(f"top_logprobs_num is {request.top_logprobs_num}, needs 0 to {most}")
    if request.return_logprob:
        _check_type("logprob_start_len", request.logprob_start_len, int)
        if request.logprob_start_len < -1:
            raise ValueError(f"logprob_start_len is {request.logprob_start_len}, needs -1 or more")
    if request.token_indices_to_pool is not None:
        if not computes_whole_prompts:
            raise ValueError("token_indices_to_pool is given, needs a server with --disable-radix-cache and --chunked-prefill-size -1")
        _check_positions("token_indices_to_pool", request.token_indices_to_pool, len(input_ids or ()))
        start, first = request.logprob_start_len, min(request.token_indices_to_pool)
        if request.return_logprob and start > first:
            raise ValueError(f"logprob_start_len is {start}, needs -1 or at most {first}, the first of token_indices_to_pool")
    if request.custom_logit_processor:
        _check_logit_processor(request.custom_logit_processor)
    check_media(request, input_ids or [], image_tokens)


def check_rids(rids: str | list[str], http_request) -> None:
    """ValueError for a rid such as SGLang's checks of its own health have: it drops them while the server is busy.

    http_request: FastAPI's, None where there is none.
    """
    if http_request is not None and http_request.url.path.removeprefix(http_request.scope.get("root_path", "")) in HEALTH_ROUTES:
        return
    for rid in rids if isinstance(rids, list) else [rids]:
        if isinstance(rid, str) and rid.startswith(HEALTH_CHECK_RID_PREFIX):
            raise ValueError(f"rid is {rid}, needs one that does not start with {HEALTH_CHECK_RID_PREFIX}")


def check_types(request: msgspec.Struct) -> None:
    """ValueError where a field of `request`, of its sampling or session parameters, is of another type than SGLang declares: the scheduler
    and the detokenizer end at it, and of the routes only /generate looks. Numbers that stand for the type become it, as Python may give
    them.

    request: SGLang's TokenizedGenerateReqInput, which a scheduler would get.
    """
    for struct in filter(None, (request, request.sampling_params, request.session_params)):
        declared = _declaration(type(struct))
        try:  # all at once, which is quicker
            msgspec.convert([getattr(struct, name) for name in declared.__struct_fields__], declared)
        except msgspec.ValidationError:
            _check_each(struct, declared)


def check_beams(request: msgspec.Struct) -> None:
    """ValueError for beam search: where the requests that run leave it no room, SGLang ends, or mixes up what its beams have cached.

    request: SGLang's TokenizedGenerateReqInput, whose types are right.
    """
    if (width := request.sampling_params.beam_width or 1) > 1:
        raise ValueError(f"beam_width is {width}, needs 1, or none: beam search is not served")


def check_logprobs(request: msgspec.Struct, *, vocab_size: int, context_len: int) -> None:
    """ValueError where the logprobs of tokens that `request` asks for might take all memory.

    request: SGLang's TokenizedGenerateReqInput, whose types are right.
    """
    top, named, params = request.top_logprobs_num, len(request.token_ids_logprob or ()), request.sampling_params
    if named > vocab_size:
        raise ValueError(f"token_ids_logprob has {named} tokens, needs at most {vocab_size}, those of the vocabulary")
    if not request.return_logprob or top + named <= USUAL_LOGPROBS:
        return
    room = max(context_len - len(request.input_ids), 0)
    new = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
    length = context_len if request.session_params is not None else len(request.input_ids)  # of earlier turns the scheduler alone knows
    start = length if request.logprob_start_len == -1 else min(request.logprob_start_len, length)
    of_prompt = length - start if request.token_indices_to_pool is None else len(request.token_indices_to_pool)
    positions = params.n * min(of_prompt + new, context_len)
    if (count := positions * (top + named)) > MAX_LOGPROBS:
        raise ValueError(
            f"top_logprobs_num is {top} and token_ids_logprob has {named} tokens, which is {count} logprobs at {positions} positions, "
            f"needs at most {MAX_LOGPROBS}, or {USUAL_LOGPROBS} at each: fewer of them, a larger "
            "logprob_start_len or a smaller max_new_tokens"
        )


def _check_each(struct: msgspec.Struct, declared: type[msgspec.Struct]) -> None:
    for name, kind in get_type_hints(declared).items():
        value = getattr(struct, name)
        try:
            taken = _declared(value, kind)
        except msgspec.ValidationError as error:
            raise ValueError(f"{name.removesuffix('_strs')} is {value!r}, needs another type: {error}") from error
        if taken is not value:
            setattr(struct, name, taken)


def _declared(value: object, kind: object) -> object:
    """`value`, or the number of type `kind` that it stands for: 2 for 2.0, True for 1, and what is in an array or tensor of no dimensions.
    msgspec.ValidationError where it is neither."""
    if isinstance(value, list) and any(isinstance(item, np.generic) for item in value):
        value = [_scalar(item) for item in value]
    value = _scalar(value)
    try:
        msgspec.convert(value, kind)
        return value
    except msgspec.ValidationError:
        for other in _same_number(value):
            with contextlib.suppress(msgspec.ValidationError):
                msgspec.convert(other, kind)
                return other
        raise


def _scalar(value: object) -> object:
    return value.item() if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.dim() == 0) else value


def _same_number(value: object) -> Iterator[object]:
    if type(value) is float and value.is_integer() and abs(value) <= INT32_MAX:
        yield int(value)
    if type(value) is int and value in (0, 1):
        yield bool(value)


@functools.cache
def _declaration(struct: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Of the fields that are checked, in the form of a list."""
    fields = [(name, kind) for name, kind in get_type_hints(struct).items() if name in struct.__struct_fields__ and name not in UNTYPED]
    return msgspec.defstruct(struct.__name__, fields, array_like=True)


def check_samples(n: int, prompts: int) -> None:
    """ValueError where a request asks for `n` answers to each of so many prompts, and those are none, or too many."""
    if n < 1:
        raise ValueError(f"n is {n}, needs at least 1")
    if n > MAX_SAMPLES or (n > 1 and n * prompts > MAX_ANSWERS):
        raise ValueError(f"n is {n} for {prompts} prompts, needs at most {MAX_SAMPLES}, and {MAX_ANSWERS} answers in all")


def check_tokens(name: str, tokens: list[int] | set[int] | None, vocab_size: int) -> None:
    """ValueError where `tokens`, the argument `name`, are not all of the vocabulary."""
    for token in (min(tokens), max(tokens)) if tokens else ():
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} has {token}, needs tokens from 0 to {vocab_size - 1}")


def _check_sampling_params(params: dict, vocab_size: int, end_tokens: frozenset[int]) -> None:
    stops = {token for token in params.get("stop_token_ids") or () if token is not None}
    check_tokens("stop_token_ids", stops, vocab_size)
    for name in ("top_k", "min_new_tokens"):
        value = params.get(name)
        if isinstance(value, int) and value > INT32_MAX:
            raise ValueError(f"{name} is {value}, needs at most {INT32_MAX}")
    min_new_tokens = params.get("min_new_tokens")
    if isinstance(min_new_tokens, int) and min_new_tokens > 0:
        if end_tokens and max(end_tokens) >= vocab_size:
            raise ValueError(
                f"min_new_tokens is {min_new_tokens}, needs a checkpoint that ends answers with tokens from 0 to {vocab_size - 1}, it has "
                f"{max(end_tokens)} as eos_token_id"
            )
        if len(stops | end_tokens) == vocab_size:
            raise ValueError(f"min_new_tokens is {min_new_tokens}, needs a token that is not in stop_token_ids")
    logit_bias = params.get("logit_bias")
    for token, bias in logit_bias.items() if isinstance(logit_bias, dict) else ():
        if not isinstance(bias, int | float) or not abs(bias) <= LARGEST_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {bias!r} for {token}, needs numbers from {-LARGEST_LOGIT_BIAS:g} to {LARGEST_LOGIT_BIAS:g}")
    penalty = params.get("repetition_penalty")
    if isinstance(penalty, int | float) and penalty < SMALLEST_REPETITION_PENALTY:
        raise ValueError(f"repetition_penalty is {penalty}, needs at least {SMALLEST_REPETITION_PENALTY:g}")
    _check_patterns(params.get("stop_regex"))
    check_grammars(params)


def _continues_a_session(request) -> bool:
    """Whether the tokens of earlier turns come before those of the request."""
    return bool((request.session_params or {}).get("id"))


def _check_type(name: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}, needs {kind.__name__}")


def _check_positions(name: str, positions: list[int], length: int) -> None:
    if not positions or min(positions) < 0 or max(positions) >= length:
        raise ValueError(f"{name} is {positions}, needs positions of the prompt, from 0 to {length - 1}")


def _check_logit_processor(text: str) -> None:
    """Of a server with --enable-custom-logit-processor, which trusts those who ask with what is read here."""
    try:
        processor = _cache_from_str(text)
    except Exception as error:
        raise ValueError(f"custom_logit_processor cannot be read, needs what a CustomLogitProcessor's to_str() gives: {error!r}") from error
    if not isinstance(processor, type) or not issubclass(processor, CustomLogitProcessor):
        raise ValueError(f"custom_logit_processor is {processor!r}, needs a CustomLogitProcessor")


def _check_patterns(patterns: str | list[str] | None) -> None:
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise ValueError(f"stop_regex is {pattern!r}, needs a regular expression: {error}") from error
