"""Hooks of the process that takes requests: what it is asked is read, checked and prepared before it is computed."""

from __future__ import annotations

import asyncio
import functools

from sglang.srt.plugins.hook_registry import HookType

from llama4_kernels.sglang.control_checks import CHECKS, check_memory
from llama4_kernels.sglang.plugin import is_our_model, server_has_flag

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_REQUESTS = "sglang.srt.managers.io_struct"
_PROCESSORS = "sglang.srt.multimodal.processors"


def _read_request(original, *args, **kwargs):
    if not server_has_flag():
        return original(*args, **kwargs)
    from llama4_kernels.sglang.request_errors import read_request

    with read_request():
        return original(*args, **kwargs)


def _check_samples(result, request) -> None:
    if server_has_flag():
        from llama4_kernels.sglang.request_checks import check_samples

        check_samples(request.parallel_sample_num, request.batch_size)


def _init_request_state(original, manager, request, http_request=None):
    if is_our_model(manager.model_config):
        from llama4_kernels.sglang.request_checks import check_rids

        check_rids(request.rid, http_request)
    return _read_request(original, manager, request, http_request)


async def _update_in_turn(original, manager, request):
    """SGLang keeps one update's answer to wait for: while generation is paused, a second update would end the server."""
    if not is_our_model(manager.model_config):
        return await original(manager, request)
    async with manager.__dict__.setdefault("llama4_kernels_updates", asyncio.Lock()):
        return await original(manager, request)


async def _tokenize_request(original, manager, *args):
    if not is_our_model(manager.model_config):
        return await original(manager, *args)
    from llama4_kernels.sglang.request_errors import read_request
    from llama4_kernels.sglang.text_checks import check_length

    with read_request():
        check_length("text", args[-1].text, manager)
        return await original(manager, *args)


def _check_request(result, manager, request, input_ids) -> None:
    config = manager.model_config
    if not is_our_model(config):
        return
    from sglang.srt.runtime_context import get_memory, get_schedule

    from llama4_kernels.sglang.request_checks import check_request

    check_request(
        request,
        input_ids,
        vocab_size=config.vocab_size,
        end_tokens=_end_tokens(config, manager.tokenizer),
        computes_whole_prompts=get_memory().disable_radix_cache and get_schedule().chunked_prefill_size == -1,
        image_tokens=_image_tokens(manager.mm_processor),
    )
    check_memory(manager)


def _check_tokenized(tokenized, manager, *args, **kwargs) -> None:
    if is_our_model(manager.model_config):
        from llama4_kernels.sglang.request_checks import check_beams, check_logprobs, check_types

        check_types(tokenized)
        check_beams(tokenized)
        check_logprobs(tokenized, vocab_size=manager.model_config.vocab_size, context_len=manager.context_len)


def _check_control_request(check, manager, request=None, *args, **kwargs) -> None:
    if is_our_model(manager.model_config):
        check(manager, request)


def _nest_images(request, *args, **kwargs) -> None:
    if server_has_flag():
        from llama4_kernels.sglang.images import nest

        nest(request)


def _check_image_file(image_file) -> None:
    if server_has_flag():
        from llama4_kernels.sglang.images import check_file

        check_file(image_file)


def _load_image(original, *args, **kwargs):
    if not server_has_flag():
        return original(*args, **kwargs)
    from llama4_kernels.sglang.images import read_image

    with read_image():
        return original(*args, **kwargs)


async def _process_images(original, processor, image_data, input_text, *args, **kwargs):
    if not server_has_flag() or not isinstance(input_text, list):
        return await original(processor, image_data, input_text, *args, **kwargs)
    from llama4_kernels.sglang.images import process_tokens

    return await process_tokens(original, processor, image_data, input_text, *args, **kwargs)


def _image_tokens(mm_processor):
    """None where SGLang has no processor of images."""
    if mm_processor is None:
        return None
    from llama4_kernels.sglang.media_checks import ImageTokens

    image, part_id, tokenizer = mm_processor._processor.image_token, mm_processor.IM_TOKEN_ID, mm_processor._processor.tokenizer
    vision = mm_processor.vision_config
    parts = round((vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio) ** 2)
    return ImageTokens(
        image, tokenizer.convert_tokens_to_ids(image), tokenizer.convert_ids_to_tokens(part_id), part_id, vision.image_size, parts
    )


def _end_tokens(model_config, tokenizer) -> frozenset[int]:
    """What SGLang keeps from an answer until it has min_new_tokens."""
    tokens = set(model_config.hf_eos_token_id or ())
    if tokenizer is not None:
        tokens |= {tokenizer.eos_token_id, *(tokenizer.additional_stop_token_ids or ())}
    return frozenset(tokens - {None})


REQUEST_HOOKS = (
    ("sglang.srt.utils.request_logger.RequestLogger.log_received_request", _read_request, HookType.AROUND),
    (f"{_REQUESTS}.GenerateReqInput.normalize_batch_and_arguments", _read_request, HookType.AROUND),
    (f"{_REQUESTS}.GenerateReqInput._handle_parallel_sampling", _check_samples, HookType.AFTER),
    (f"{_REQUESTS}.EmbeddingReqInput.normalize_batch_and_arguments", _read_request, HookType.AROUND),
    (f"{_MANAGER}._init_req_state", _init_request_state, HookType.AROUND),
    (f"{_MANAGER}._tokenize_one_request", _tokenize_request, HookType.AROUND),
    (f"{_MANAGER}._batch_tokenize_and_process", _tokenize_request, HookType.AROUND),
    (f"{_MANAGER}._validate_one_request", _check_request, HookType.AFTER),
    (f"{_MANAGER}._create_tokenized_object", _check_tokenized, HookType.AFTER),
    (f"{_MANAGER}._wait_for_model_update_from_disk", _update_in_turn, HookType.AROUND),
    *((f"{_MANAGER}.{name}", functools.partial(_check_control_request, check), HookType.BEFORE) for name, check in CHECKS.items()),
)
IMAGE_HOOKS = (
    (f"{_REQUESTS}.GenerateReqInput._normalize_image_data", _nest_images, HookType.BEFORE),
    ("sglang.srt.utils.common.get_image_bytes", _check_image_file, HookType.BEFORE),
    (f"{_PROCESSORS}.base_processor.BaseMultimodalProcessor._load_single_item", _load_image, HookType.AROUND),
    (f"{_PROCESSORS}.mllama4.Mllama4ImageProcessor.process_mm_data_async", _process_images, HookType.AROUND),
)
