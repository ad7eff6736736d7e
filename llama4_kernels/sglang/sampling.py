"""Sampling where nothing is left to sample: min_new_tokens rules out the tokens that end an answer, and a grammar may rule out all others.

SGLang 0.5.23 then divides zero by zero, and samples from NaN: what that raises ends the server.
"""

from __future__ import annotations

from http import HTTPStatus

import torch

# Stays finite in float32 when it is divided by the smallest temperature, 1e-6.
RULED_OUT = -1e30


def keep_probabilities_finite(logits: torch.Tensor, sampling_info) -> None:
    """Raise logits (requests, vocabulary) of -inf to RULED_OUT, in place, where a grammar or a custom logit processor may have put them.

    The probabilities of a row with a finite logit stay as they are, and those of a row without become equal. NaN stays NaN. Nothing waits for
    the device. Greedy requests are left alone: argmax takes any row.

    sampling_info: SGLang's SamplingBatchInfo of the requests.
    """
    if not sampling_info.is_all_greedy and (sampling_info.grammars or sampling_info.has_custom_logit_processor):
        logits.clamp_(min=RULED_OUT)


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
