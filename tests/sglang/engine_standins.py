"""What SGLang lacks on a CPU for speculative decoding, CUDA graphs and data-parallel attention, so that its real engine runs them in the tests.

A plugin of SGLang beside the one under test, in every process of a server started with environment(). Of SGLang's own code this takes the
Triton kernels for verification, which it has for XPU, in Triton's interpreter, and the collectives of data-parallel attention that it has
for CPUs with kernels of its own. Replaced are: the draft model's attention, for which SGLang has no backend here, by its torch_native
backend; the drafts, where a test has planted others; the copies of a rank's rows in data-parallel attention; pinned memory by any; and the
recording of a graph (recorded_graph.py).
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

FOLDER = "ENGINE_STANDINS"
INSTALLED = "engine_standins: installed"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a server with the stand-ins. `folder` takes what they and the test tell each other:

    answers.json, from the test: request id -> token ids from the prompt on. A draft for one of these positions is replaced by its token.
    hidden.pt, from the server: (request id, first position, hidden states [tokens, 3 · hidden_size]) of what an EAGLE3 draft was given.
    """
    metadata = folder / "engine_standins-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: engine_standins\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nengine_standins = engine_standins:register\n")
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "LLAMA4_KERNELS_BACKEND": "reference",
        "SGLANG_ENABLE_OVERLAP_PLAN_STREAM": "1",
        FOLDER: str(folder),
    }


def register() -> None:
    import recorded_graph
    from sglang.kernels.ops.speculative import cache_locs, spec_tree
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.rotary_embedding import base as rotary_embedding
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    spec_tree._is_xpu = cache_locs._is_xpu = True  # kernels in Triton
    rotary_embedding._is_musa = True  # RoPE of the draft model in PyTorch
    parallel_state._is_cpu = True  # data-parallel attention gathers without NCCL
    dp_attention.memcpy_func = _memcpy
    for target, hook in (
        # As on a GPU: a step is scheduled before the accepted lengths of the last one are known on the host.
        ("sglang.srt.arg_groups.speculative_hook._disable_overlap_schedule_for_cpu", lambda original, args: None),
        ("sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend", _create_decode_backend),
        ("sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend", _create_draft_extend_backend),
        ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.draft_forward", _draft_forward),
        ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._draft_extend_for_prefill", _draft_extend_for_prefill),
        ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._draft_extend_for_decode", _draft_extend_for_decode),
        ("sglang.srt.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch", _without_pinned_memory),
        *recorded_graph.install(),
    ):
        HookRegistry.register(target, hook, HookType.AROUND)
    print(INSTALLED, flush=True)


def _memcpy(dst, src, dim, offset, sz, offset_src: bool) -> None:
    """`sz` rows of src from `offset` on into dst, or of src into dst from `offset` on. SGLang's own for CPUs asks for both numbers on the
    host, its kernel on GPUs reads them from the device as this does, so that a graph can hold it."""
    rows = torch.arange(len(dst))
    source = rows + offset if offset_src else rows - offset
    is_copied = (rows < sz if offset_src else (source >= 0) & (source < sz)).unsqueeze(1)
    dst.copy_(torch.where(is_copied, src.index_select(0, source.clamp(0, len(src) - 1)), dst))


def _without_pinned_memory(original, *arguments):
    tensor = torch.tensor
    with mock.patch.object(torch, "tensor", lambda *values, pin_memory=False, **options: tensor(*values, **options)):
        return original(*arguments)


def _draft_attention(runner, step: int = 0):
    """SGLang's torch_native backend for drafts, in the step of that number after the last verified token."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class DraftAttention(TorchNativeAttnBackend):
        needs_cpu_seq_lens = False  # as fa3, which drafts have on a Hopper GPU

        def forward_decode(self, q, k, v, layer, forward_batch, *args, **kwargs):
            at_step = copy.copy(forward_batch)
            at_step.seq_lens = forward_batch.seq_lens + step
            return super().forward_decode(q, k, v, layer, at_step, *args, **kwargs)

    return DraftAttention(runner)


def _create_decode_backend(original, factory):
    steps = [_draft_attention(factory.draft_model_runner, step) for step in range(1, factory.speculative_num_steps)]
    return SimpleNamespace(attn_backends=steps, needs_cpu_seq_lens=False, init_forward_metadata=lambda forward_batch: None)


def _create_draft_extend_backend(original, factory):
    return _draft_attention(factory.draft_model_runner)


def _draft_forward(original, worker, forward_batch):
    result = original(worker, forward_batch)
    drafts = result[2]
    answers = json.loads((Path(os.environ[FOLDER]) / "answers.json").read_text())
    for row, (rid, length) in enumerate(zip(forward_batch.rids, forward_batch.seq_lens.tolist())):
        for column, token in enumerate(answers.get(rid, [])[length + 1 :][: drafts.shape[1]]):
            drafts[row, column] = token
    return result


_seen: list[tuple[str, int, torch.Tensor]] = []


def _note(requests, starts, lengths, hidden_states, stride: int | None) -> None:
    if hidden_states is None:
        return
    rows = 0
    for request, start, length in zip(requests, starts, lengths):
        _seen.append((request.rid, int(start), hidden_states[rows : rows + int(length)].clone()))
        rows += stride or int(length)
    torch.save(_seen, Path(os.environ[FOLDER]) / "hidden.pt")


def _draft_extend_for_prefill(original, worker, batch, hidden_states, *args, **kwargs):
    _note(batch.reqs, batch.prefix_lens, batch.extend_lens, hidden_states, stride=None)
    return original(worker, batch, hidden_states, *args, **kwargs)


def _draft_extend_for_decode(original, worker, batch, result, **kwargs):
    stride = worker.speculative_num_draft_tokens
    _note(batch.reqs, batch.seq_lens, result.accept_lens, result.logits_output.hidden_states, stride)
    return original(worker, batch, result, **kwargs)
