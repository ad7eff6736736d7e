"""Sampling where nothing is left to sample from: min_new_tokens rules out the tokens that end an answer, and a grammar may rule out the others.

SGLang 0.5.23 then divides zero by zero, and samples from NaN: what that raises ends the server.
"""

from __future__ import annotations

import math
from http import HTTPStatus

import torch


def free_rows_ruled_out(logits: torch.Tensor) -> None:
    """Zero the rows of logits (rows, vocabulary) that are all -inf, in place. Other rows keep their bits, and NaN that the model computes stays
    NaN. Nothing waits for the device.

    To be called where a grammar has masked logits: the token sampled from such a row is one that it does not take, which ends that request
    alone.
    """
    logits.masked_fill_(logits.amax(-1, keepdim=True) == -math.inf, 0.0)


def blame_min_new_tokens(request) -> None:
    """Have a request that ends because its grammar did not take the token sampled last be answered with status 400 where min_new_tokens was
    not reached, in place of 500.

    request: SGLang's Req, of which the grammar has just been given a token.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    end, least = request.to_finish, request.sampling_params.min_new_tokens
    if isinstance(end, FINISH_ABORT) and end.status_code == HTTPStatus.INTERNAL_SERVER_ERROR and least >= len(request.output_ids):
        request.to_finish = FINISH_ABORT(
            f"min_new_tokens is {least}, needs a grammar that goes on so long: it allowed no token but an end of the answer before",
            HTTPStatus.BAD_REQUEST,
            "BadRequestError",
        )
