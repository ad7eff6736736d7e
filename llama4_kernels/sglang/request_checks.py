"""Requests that SGLang 0.5.23 takes and that then end the server, with all that it computes, or are answered with status 500. They are
refused where SGLang validates requests, so that the answer is status 400 and the others go on."""

from __future__ import annotations

import re


def check_request(
    request, input_ids: list[int] | None, *, vocab_size: int, hidden_size: int, image_token_id: int | None, image_token: str | None
) -> None:
    """ValueError for a request that the model cannot compute.

    request: SGLang's GenerateReqInput of one prompt.
    input_ids: its tokens, those of its images included; None where it came as embeddings.
    image_token_id, image_token: what stands for a part of an image, in input_ids and in text; None where the model sees no images.
    """
    if request.input_embeds is not None:
        for row in request.input_embeds:
            if len(row) != hidden_size:
                raise ValueError(f"input_embeds has a row of {len(row)} numbers, needs {hidden_size}, the hidden size")
    elif input_ids is not None:
        if not input_ids:
            raise ValueError("the prompt has no tokens, needs at least one")
        for token in (min(input_ids), max(input_ids)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"input_ids has {token}, needs tokens from 0 to {vocab_size - 1}")
    if isinstance(request.positional_embed_overrides, dict):
        raise ValueError("positional_embed_overrides is a JSON object, needs SGLang's own type: it has no form over HTTP")
    if request.return_logprob:
        if request.logprob_start_len < -1:
            raise ValueError(f"logprob_start_len is {request.logprob_start_len}, needs -1 or more")
        if not 0 <= request.top_logprobs_num <= vocab_size:
            raise ValueError(f"top_logprobs_num is {request.top_logprobs_num}, needs 0 to {vocab_size}, the tokens of the vocabulary")
    _check_patterns(request.sampling_params.get("stop_regex"))
    if request.image_data and image_token_id is not None:
        if image_token_id in (request.input_ids or ()) or (request.text and image_token and image_token in request.text):
            raise ValueError(
                f"the prompt has {image_token or image_token_id} beside image_data, needs one <|image|> for each image, no more"
            )


def _check_patterns(patterns: str | list[str] | None) -> None:
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"stop_regex is {pattern!r}, needs a regular expression: {error}") from error
