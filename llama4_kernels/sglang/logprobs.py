"""Logprobs of prompts that SGLang 0.5.23 gives to the wrong request.

The scheduler of overlapped steps may retract a request, for want of memory, before it has read what the request's prefill gave. It then
skips the request, but does not skip the logprobs of its prompt, which the next request of the batch gets as its own.
"""

from __future__ import annotations

import torch


def leave_out_unread(processor, batch, result) -> None:
    """Take the logprobs of prompts that nobody will read out of those that a prefill gave.

    processor: SGLang's SchedulerBatchResultProcessor, which reads input_token_logprobs [prompt tokens of all requests] request by request.
    """
    # As process_batch_result_prefill decides on it.
    unread = [request.is_retracted or (request.finished() and request.inflight_middle_chunks <= 0) for request in batch.reqs]
    if not batch.return_logprob or not any(unread) or result.logits_output.input_token_logprobs is None:
        return
    if result.copy_done is not None:
        result.copy_done.synchronize()
    result.logits_output.finalize_input_logprobs()
    counts = [
        processor.logprob_result_processor.calculate_num_input_logprobs(request, length, start)
        for request, length, start in zip(
            batch.reqs, result.extend_input_len_per_req, result.extend_logprob_start_len_per_req, strict=True
        )
    ]
    values = result.logits_output.input_token_logprobs
    if sum(counts) == len(values):  # not where SGLang counts positions that it was not asked for, which it does not read either
        result.logits_output.input_token_logprobs = values[torch.repeat_interleave(~torch.tensor(unread), torch.tensor(counts))]
