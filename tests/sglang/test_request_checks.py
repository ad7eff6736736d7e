"""What is refused of a request; test_bad_requests.py and test_vision.py ask servers."""

import json
import math
from array import array
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.managers.io_struct import SessionParams, TokenizedGenerateReqInput
from sglang.srt.multimodal.modality import Modality, MultimodalInputFormat
from sglang.srt.sampling.sampling_params import SamplingParams

from llama4_kernels.sglang.media_checks import ImageTokens
from llama4_kernels.sglang.request_checks import MAX_LOGPROBS, check_beams, check_logprobs, check_request, check_rids, check_types

MODEL = {
    "vocab_size": 320,
    "end_tokens": frozenset({261, 262}),
    "computes_whole_prompts": True,
    "image_tokens": ImageTokens("<|image|>", 263, "<|patch|>", 264, 56, 2),
}
TILE = torch.zeros(1, 3, 56, 56)
PLAIN = {
    "text": None, "input_ids": None, "input_embeds": None, "image_data": None, "sampling_params": {}, "return_logprob": False,
    "logprob_start_len": -1, "top_logprobs_num": 0, "positional_embed_overrides": None, "session_params": None,
    "token_indices_to_pool": None, "custom_logit_processor": None, "lora_id": None, "video_data": None, "audio_data": None,
    "return_routed_experts": False, "return_indexer_topk": False, "return_hidden_states": False, "mm_hashes": None,
}  # fmt: skip


def check(tokens, fields, model=MODEL):
    check_request(SimpleNamespace(**PLAIN | fields), tokens, **model)


def referring(count):
    """A schema of so many levels three deep, each of which refers to the next."""
    definitions = {f"a~/{i}": {"properties": {"a": {"$ref": f"#/$defs/a~0~1{i + 1}"}}} for i in range(count)}
    return {"$ref": "#/$defs/a~0~10", "$defs": definitions}


@pytest.mark.parametrize("tokens, fields", [
    ([0, 319], {}),
    ([264, 264], {"input_ids": [264, 264]}),
    ([5, 264, 264], {"text": "<|image|>a", "image_data": ["a.png"]}),
    ([264] * 4, {"input_ids": [263, 5, 263], "image_data": ["a.png", "b.png"]}),
    ([5], {"text": "<|image|>", "image_data": [None]}),
    ([5], {"text": "<|image|><|patch|>", "image_data": [], "video_data": [], "audio_data": [None]}),
    ([264, 5, 264], {"input_ids": [264, 5, 264], "image_data": [{"format": "processor_output", "pixel_values": TILE}]}),
    ([264] * 4, {"text": "<|patch|>" * 4, "image_data": {
        "format": MultimodalInputFormat.PROCESSOR_OUTPUT, "pixel_values": TILE.repeat(2, 1, 1, 1), "modality": Modality.IMAGE,
        "offsets": torch.tensor([[0, 1], [2, 3]])}}),
    ([5], {"text": "a", "mm_hashes": ["ab"]}),
    ([], {"input_ids": [], "session_params": {"id": "a"}}),
    ([1], {"session_params": {"id": "a", "rid": None, "offset": -1, "replace": True}}),
    ([1], {"sampling_params": {"stop_token_ids": {0, 319, None}}}),
    ([1], {"sampling_params": {"stop_token_ids": None}}),
    ([1], {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 320}),
    ([1], {"return_logprob": True}),
    ([1], {"logprob_start_len": -9}),  # read with return_logprob only
    ([1], {"sampling_params": {"stop_regex": ["a+", "b|c"]}}),
    ([1], {"sampling_params": {"stop_regex": "[ab]"}}),
    ([1, 2], {"token_indices_to_pool": [0, 1]}),
    ([1, 2], {"token_indices_to_pool": [1], "return_logprob": True, "logprob_start_len": 1}),
    ([1], {"sampling_params": {"top_k": 2**31 - 1, "min_new_tokens": 2**31 - 1}}),
    ([1], {"sampling_params": {"logit_bias": {"5": -1e30, "6": 100}, "repetition_penalty": 1e-3}}),
    ([1], {"sampling_params": {"logit_bias": None, "repetition_penalty": None}}),
    ([1], {"sampling_params": {"min_new_tokens": 2, "stop_token_ids": list(range(1, 320))}}),
    ([1], {"sampling_params": {"min_new_tokens": 0, "stop_token_ids": list(range(320))}}),
    *(([1], {"return_hidden_states": mode}) for mode in (True, "last")),
    ([1], {"sampling_params": {"json_schema": '{"items": ' * 255 + "{}" + "}" * 255}}),
    ([1], {"sampling_params": {"json_schema": json.dumps({"enum": ["(" * 4096] * 2})}}),
    ([1], {"sampling_params": {"json_schema": json.dumps({"description": "f(x) " * 5000})}}),
    ([1], {"sampling_params": {"json_schema": json.dumps(referring(2700) | {"$id": "#/1", "not": {"$ref": "#/$defs/a/b/c"}})}}),
    ([1], {"sampling_params": {"json_schema": json.dumps([{"$ref": f"#/{i}"} for i in range(5000)])}}),
    ([1], {"sampling_params": {"json_schema": "$$ANY$$", "structural_tag": None, "regex": "(" * 5000}}),  # which SGLang reads, or refuses
    ([1], {"sampling_params": {"top_k": None, "min_new_tokens": "5"}}),  # read, or refused, by SGLang
], ids=lambda value: str(value)[:100])  # fmt: skip
def test_what_is_taken(tokens, fields):
    check(tokens, fields)


def test_a_model_without_images_takes_their_token_for_text_and_no_image():
    check([264], {"input_ids": [264]}, MODEL | {"image_tokens": None})
    with pytest.raises(ValueError, match="image_data is given, needs a checkpoint with a vision tower"):
        check([264], {"input_ids": [264], "image_data": ["a.png"]}, MODEL | {"image_tokens": None})


def test_positions_of_a_prompt_that_may_be_computed_in_part():
    with pytest.raises(ValueError, match="token_indices_to_pool is given, needs a server with --disable-radix-cache and --chunked-prefill"):
        check([1, 2], {"token_indices_to_pool": [0]}, MODEL | {"computes_whole_prompts": False})


def test_the_most_likely_tokens_of_a_large_vocabulary():
    check([1], {"top_logprobs_num": 8192}, MODEL | {"vocab_size": 202048})
    with pytest.raises(ValueError, match="top_logprobs_num is 8193, needs 0 to 8192"):
        check([1], {"top_logprobs_num": 8193}, MODEL | {"vocab_size": 202048})


def test_a_model_without_an_end_of_the_answer():
    check([1], {"sampling_params": {"min_new_tokens": 2}}, MODEL | {"end_tokens": frozenset()})


def test_an_end_of_the_answer_outside_of_the_vocabulary():
    model = MODEL | {"end_tokens": frozenset({2, 320})}
    check([1], {"sampling_params": {"min_new_tokens": 0}}, model)
    with pytest.raises(ValueError, match="min_new_tokens is 2, needs a checkpoint that ends answers with tokens from 0 to 319, it has 320"):
        check([1], {"sampling_params": {"min_new_tokens": 2}}, model)


@pytest.mark.parametrize("tokens, fields, message", [
    ([], {"text": ""}, "the prompt has no tokens"),
    ([5, -1], {}, r"input_ids has -1, needs tokens from 0 to 319"),
    ([320, 5], {}, r"input_ids has 320, needs tokens from 0 to 319"),
    (None, {"input_embeds": [[0.0] * 4]}, "input_embeds is given, needs text or input_ids instead"),
    ([], {"input_ids": [], "session_params": {"id": None}}, "the prompt has no tokens"),
    ([320], {"input_ids": [320], "session_params": {"id": "a"}}, "input_ids has 320, needs tokens from 0 to 319"),
    ([1], {"sampling_params": {"stop_token_ids": [5, 320]}}, "stop_token_ids has 320, needs tokens from 0 to 319"),
    ([1], {"sampling_params": {"stop_token_ids": {-1}}}, "stop_token_ids has -1, needs tokens from 0 to 319"),
    ([1], {"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len is -2, needs -1 or more"),
    ([1], {"return_logprob": True, "top_logprobs_num": 321}, "top_logprobs_num is 321, needs 0 to 320"),
    ([1], {"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num is -1, needs 0 to 320"),
    ([1], {"positional_embed_overrides": {"positions": [0]}}, "positional_embed_overrides is given, needs text"),
    ([1], {"return_logprob": True, "top_logprobs_num": [1]}, r"top_logprobs_num is \[1\], needs int"),
    ([1], {"return_logprob": True, "logprob_start_len": [0]}, r"logprob_start_len is \[0\], needs int"),
    ([1], {"top_logprobs_num": 321}, "top_logprobs_num is 321, needs 0 to 320"),
    ([1], {"top_logprobs_num": [1]}, r"top_logprobs_num is \[1\], needs int"),
    ([1], {"sampling_params": {"top_k": 2**31}}, "top_k is 2147483648, needs at most 2147483647"),
    ([1], {"sampling_params": {"min_new_tokens": 2**40}}, "min_new_tokens is 1099511627776, needs at most 2147483647"),
    ([1, 2], {"token_indices_to_pool": [1, 2]}, r"token_indices_to_pool is \[1, 2\], needs positions of the prompt, from 0 to 1"),
    ([1, 2], {"token_indices_to_pool": [0, -1]}, r"token_indices_to_pool is \[0, -1\], needs positions of the prompt, from 0 to 1"),
    ([1, 2], {"token_indices_to_pool": [1, 0], "return_logprob": True, "logprob_start_len": 1}, "logprob_start_len is 1, needs -1 or at most 0"),
    ([1, 2], {"token_indices_to_pool": []}, r"token_indices_to_pool is \[\], needs positions of the prompt, from 0 to 1"),
    ([1], {"sampling_params": {"stop_regex": "("}}, r"stop_regex is '\(', needs a regular expression"),
    ([1], {"sampling_params": {"stop_regex": ["a", "("]}}, r"stop_regex is '\(', needs a regular expression"),
    *(([1], {"sampling_params": {"logit_bias": {"5": bias}}}, r"logit_bias has .* for 5, needs numbers from -1e\+30 to 1e\+30")
      for bias in (1e39, -1e39, 3e38, math.nan, math.inf, "1", None)),
    ([1], {"sampling_params": {"repetition_penalty": 1e-42}}, "repetition_penalty is 1e-42, needs at least 0.001"),
    ([1], {"sampling_params": {"min_new_tokens": 1, "stop_token_ids": list(range(320))}}, "min_new_tokens is 1, needs a token that is not"),
    ([1], {"sampling_params": {"min_new_tokens": 1, "stop_token_ids": {*range(320)} - {262}}}, "min_new_tokens is 1, needs a token that"),
    ([1], {"sampling_params": {"stop_regex": "(" * 500 + ")" * 500}}, "stop_regex is .*, needs a regular expression"),
    *(([1], {"sampling_params": {name: text}}, f"{name} {message}") for name in ("json_schema", "structural_tag") for text, message in (
        ('{"items": ' * 256 + "{}" + "}" * 256, "is nested too deeply, needs at most 256 arrays and objects within each other"),
        ("[" * 2000 + "]" * 2000, "is nested too deeply"),
        (json.dumps({"pattern": "(" * 4097}), "has 4097 opening parentheses in one pattern, needs at most 4096"),
        (json.dumps({"(" * 4097: {}}).replace("(", "\\u0028"), "has 4097 opening parentheses"),
        ('{"pattern": "%s", "pattern": "a"}' % ("(" * 4097), "has 4097 opening parentheses"),
        (json.dumps(referring(2800)), "has 8405 levels, with those that it refers to, needs at most 8192"),
    )),
    ([1], {"lora_id": "a"}, "lora_id is given"),
    *(([1], {"return_hidden_states": mode}, 'return_hidden_states is .*, needs true, false or "last"') for mode in ([], [False], "first", None)),
    *(([1], {name: True}, f"{name} is set, needs an answer without") for name in ("return_routed_experts", "return_indexer_topk")),
    *(([5], {"text": "a", name: ["a.mp4"]}, f"{name} is given, needs text and images only") for name in ("video_data", "audio_data")),
    ([5], {"text": "a", "image_data": ["a.png"]}, r"image_data has 1 images, the prompt has <\|image\|> 0 times, needs one for each"),
    ([5], {"text": "<|image|>", "image_data": ["a.png", "b.png"]}, r"image_data has 2 images, the prompt has <\|image\|> 1 times"),
    ([5], {"text": "<|image|>", "image_data": ["a.png", None]}, r"image_data has 2 images, the prompt has <\|image\|> 1 times"),
    ([5], {"input_ids": [5], "image_data": "a.png"}, r"image_data has 1 images, the prompt has <\|image\|> 0 times"),
    ([5, 264], {"text": "<|image|><|patch|>", "image_data": ["a.png"]}, r"the prompt has <\|patch\|> beside image_data"),
    ([5, 264], {"input_ids": [264, 5], "image_data": ["a.png"]}, r"the prompt has <\|patch\|> beside image_data"),
    ([264], {"input_ids": [264], "image_data": [{"format": "processor_output"}, "a.png"]}, r"the prompt has <\|patch\|> beside"),
    ([264], {"input_ids": [264], "image_data": [{"format": "precomputed_embedding"}]}, "has the format precomputed_embedding, needs images"),
    ([264, 264], {"text": "<|image|>", "image_data": ["a.png"], "mm_hashes": ["ab"]}, "mm_hashes is given, needs images without"),
    *(([264, 264], {"text": "<|patch|>" * 2, "image_data": [{"format": "processor_output", "pixel_values": TILE} | fields]}, message)
      for fields, message in (
        ({"pixel_values": None}, r"pixel_values of NoneType, needs a tensor of floats, \[tiles, 3, 56, 56\]"),
        ({"pixel_values": [[0.5]]}, "pixel_values of list, needs a tensor"),
        ({"pixel_values": TILE.int()}, r"pixel_values of torch.int32 \[1, 3, 56, 56\], needs a tensor of floats"),
        ({"pixel_values": TILE[0]}, r"pixel_values of torch.float32 \[3, 56, 56\], needs"),
        ({"pixel_values": TILE[..., 1:]}, r"pixel_values of torch.float32 \[1, 3, 56, 55\], needs"),
        ({"pixel_values": TILE.repeat(2, 1, 1, 1)}, r"has 2 tiles, the prompt 2 times <\|patch\|>, needs 2 for each tile"),
        ({"modality": "video"}, "has the modality video, needs image"),
        ({"modality": Modality.AUDIO}, "has the modality Modality.AUDIO, needs image"),
        ({"offsets": [(0, 0)]}, "offsets other than the places of"),
        ({"offsets": [(1, 2)]}, "offsets other than the places of"),
    )),
], ids=lambda value: str(value)[:100])  # fmt: skip
def test_what_is_refused(tokens, fields, message):
    with pytest.raises(ValueError, match=message):
        check(tokens, fields)


def test_rids_of_health_checks_are_sglangs():
    def at(path, root=""):
        return SimpleNamespace(url=SimpleNamespace(path=root + path), scope={"root_path": root})

    check_rids(["a", "a HEALTH_CHECK"], at("/generate"))
    check_rids("HEALTH_CHECK_1", at("/health"))
    check_rids("HEALTH_CHECK_1", at("/health_generate", root="/proxy"))
    for rids, request in (("HEALTH_CHECK_1", at("/generate")), (["a", "HEALTH_CHECK"], at("/generate")), ("HEALTH_CHECK_1", None)):
        with pytest.raises(ValueError, match="needs one that does not start with HEALTH_CHECK"):
            check_rids(rids, request)


def tokenized(fields, params):
    """What a scheduler would get of a request with these fields and sampling parameters."""
    sampling_params = SamplingParams(**params)
    sampling_params.normalize(SimpleNamespace(encode=lambda text, **options: [1]))
    plain = {
        "rid": "a", "input_text": "a", "input_ids": array("q", [1]), "input_embeds": None, "mm_inputs": None, "token_type_ids": None,
        "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": None, "stream": False,
    }  # fmt: skip
    return TokenizedGenerateReqInput(sampling_params=sampling_params, **plain | fields)


@pytest.mark.parametrize("fields, params", [
    ({}, {}),
    ({"return_hidden_states": "last", "token_ids_logprob": [1, 2], "priority": 1}, {}),
    ({}, {"temperature": 1, "stop": "a", "stop_regex": ["a+", "b"], "stop_token_ids": [1, None], "max_new_tokens": None}),
    ({"session_params": SessionParams(id="a", rid=None, offset=-1, replace=True)}, {}),
    ({}, {"logit_bias": {"5": 1, 6: -0.5}, "custom_params": {"a": {"b": [[1]]}}}),
    ({}, {"temperature": np.float32(0.5), "top_p": np.float64(0.5), "max_new_tokens": np.int64(4)}),
], ids=str)  # fmt: skip
def test_types_that_are_taken(fields, params):
    check_types(tokenized(fields, params))


@pytest.mark.parametrize("name, given, taken", [
    ("max_new_tokens", 4.0, 4), ("max_new_tokens", np.float64(4), 4), ("top_k", 50.0, 50), ("ignore_eos", 1, True), ("no_stop_trim", 0, False),
    ("temperature", torch.tensor(0.5), 0.5), ("stop_token_ids", [np.int64(5)], {5}),
], ids=str)  # fmt: skip
def test_numbers_that_stand_for_another_type_become_it(name, given, taken):
    request = tokenized({}, {name: given})
    check_types(request)
    found = getattr(request.sampling_params, name)
    assert found == taken and type(found) is type(taken)


@pytest.mark.parametrize("fields, params, message", [
    ({"rid": 5}, {}, "rid is 5, needs another type: Expected `str"),
    ({"priority": "1"}, {}, "priority is '1', needs another type"),
    *(({"session_params": SessionParams(**{"id": "a"} | field)}, {}, f"{name} is .*, needs another type")
      for field in ({"id": ["a"]}, {"rid": ["b"]}, {"offset": "1"}, {"replace": "x"}, {"drop_previous_output": 2}) for name in field),
    ({}, {"max_new_tokens": 4.5}, "max_new_tokens is 4.5, needs another type: Expected `int"),
    ({}, {"max_new_tokens": np.float64(1e15)}, "needs another type: Expected `int"),
    ({}, {"top_k": 1e30}, r"top_k is 1e\+30, needs another type: Expected `int`, got `float`"),
    ({}, {"ignore_eos": 2}, "ignore_eos is 2, needs another type: Expected `bool`, got `int`"),
    ({}, {"temperature": True}, "temperature is True, needs another type: Expected `float`, got `bool`"),
    ({}, {"spaces_between_special_tokens": []}, r"spaces_between_special_tokens is \[\], needs another type"),
    ({}, {"stop": [["a"]]}, r"stop is \[\['a'\]\], needs another type"),
    ({}, {"is_normalized": True, "skip_special_tokens": None}, "skip_special_tokens is None, needs another type"),
], ids=str)  # fmt: skip
def test_types_that_are_refused(fields, params, message):
    with pytest.raises(ValueError, match=message):
        check_types(tokenized(fields, params))


@pytest.mark.parametrize("width, taken", [(None, True), (1, True), (2, False)])
def test_beams(width, taken):
    with nullcontext() if taken else pytest.raises(ValueError, match="beam_width is 2, needs 1"):
        check_beams(tokenized({}, {"beam_width": width}))


def ask_logprobs(length, fields, **params):
    fields = {"input_ids": array("q", [1]) * length, "return_logprob": True} | fields
    check_logprobs(tokenized(fields, params), vocab_size=202048, context_len=1 << 20)


@pytest.mark.parametrize("length, fields, params", [
    (1 << 20, {"top_logprobs_num": 20, "logprob_start_len": 0}, {"max_new_tokens": None}),
    (1, {"top_logprobs_num": 20}, {"max_new_tokens": None, "n": 1000}),
    (1 << 14, {"top_logprobs_num": 1023, "token_ids_logprob": [1], "logprob_start_len": 0}, {"max_new_tokens": 0}),
    (1 << 15, {"top_logprobs_num": 1024, "logprob_start_len": 1 << 14}, {"max_new_tokens": 0}),
    (1 << 19, {"token_ids_logprob": list(range(202048))}, {"max_new_tokens": 83}),
    (1 << 19, {"token_ids_logprob": list(range(202048)), "return_logprob": False, "logprob_start_len": 0}, {"max_new_tokens": None}),
    (1 << 10, {"top_logprobs_num": 1024, "logprob_start_len": 1 << 20}, {"max_new_tokens": 1 << 14}),  # which SGLang refuses
    (1 << 10, {"token_ids_logprob": [1] * 21, "session_params": SessionParams(id="a")}, {}),
    (1 << 15, {"token_ids_logprob": [1] * 513, "token_indices_to_pool": [1, 2], "logprob_start_len": 0}, {"max_new_tokens": 0}),
], ids=lambda value: str(value)[:100])  # fmt: skip
def test_logprobs_that_are_taken(length, fields, params):
    ask_logprobs(length, fields, **params)


@pytest.mark.parametrize("length, fields, params, message", [
    (1, {"token_ids_logprob": [1] * 202049, "return_logprob": False}, {}, "token_ids_logprob has 202049 tokens, needs at most 202048"),
    (1 << 14, {"top_logprobs_num": 1023, "token_ids_logprob": [1], "logprob_start_len": 0}, {"max_new_tokens": 1},
     f"top_logprobs_num is 1023 and token_ids_logprob has 1 tokens, which is {MAX_LOGPROBS + 1024} logprobs at 16385 positions"),
    (1, {"token_ids_logprob": list(range(202048))}, {"max_new_tokens": 84}, "at 84 positions"),
    (1 << 19, {"top_logprobs_num": 21, "logprob_start_len": 0}, {"max_new_tokens": None}, f"at {1 << 20} positions"),
    (1, {"top_logprobs_num": 1024}, {"max_new_tokens": 16, "n": 1025}, "at 16400 positions"),
    (5, {"top_logprobs_num": 1000, "logprob_start_len": 0, "session_params": SessionParams(id="a")}, {"max_new_tokens": 4},
     f"at {1 << 20} positions"),
], ids=lambda value: str(value)[:100])  # fmt: skip
def test_logprobs_that_memory_would_not_last_for(length, fields, params, message):
    with pytest.raises(ValueError, match=message):
        ask_logprobs(length, fields, **params)
