"""SGLang's attention backend for Llama 4: every layer, local and global, prefill, decode and mixed, through ops.chunked_attention.

The kernel reads SGLang's own structures: req_to_token as the page table, one slot per position, and the full pool's mapping to the
SWA pool for layers that live there. What a step needs beside them is made on the device, once, without a look at what is there, and
recorded in CUDA graphs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.attention.verify_mask import VerifyMask, maybe_create_verify_mask
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.spec_info import SpecInput
from torch import Tensor

from llama4_kernels import ops


@dataclass(frozen=True)
class StepMetadata:
    """seq_lens [B] int32, keys in all; query_start_loc [B + 1] int32."""

    seq_lens: Tensor
    query_start_loc: Tensor


@dataclass(frozen=True)
class LayerCache:
    """What a layer's K and V are kept in.

    k, v: [pages, page_size, num_kv_heads, head_dim] bf16, fp32 or e4m3.
    slot_map: [slots of the full pool] int64, the layer's slot for each; None where they are the same.
    k_scale, v_scale: [] fp32, of an e4m3 cache that has scales; else None.
    """

    k: Tensor
    v: Tensor
    slot_map: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


def layer_cache(pool, layer: RadixAttention) -> LayerCache:
    """The KV cache of `layer` in SGLang's `pool`."""
    layer_id = layer.layer_id
    is_swa = isinstance(pool, SWAKVPool) and pool.layers_mapping[layer_id][1]
    k, v = (
        buffer.view(-1, pool.page_size, *buffer.shape[1:]) for buffer in (pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id))
    )
    scales = (layer.k_scale, layer.v_scale) if k.dtype == torch.float8_e4m3fn else (None, None)
    return LayerCache(k, v, pool.full_to_swa_index_mapping if is_swa else None, *scales)


class Llama4AttentionBackend(AttentionBackend):
    """Attention of all layers of a model runner, which SGLang asks for by the methods of its AttentionBackend."""

    needs_cpu_seq_lens = False

    def __init__(self, runner):
        super().__init__()
        self.device = runner.device
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.forward_metadata: StepMetadata | None = None

    @functools.cached_property
    def verify_mask(self) -> VerifyMask:
        """Drafts of each request's own that precede a draft. Nothing here reads it, but where a backend has none SGLang builds a mask
        over every key of the batch in each step, or fails where the lengths are not known on the host."""
        return maybe_create_verify_mask(
            is_draft_runner=False,
            skip_prefill=False,
            max_bs=self.req_to_token_pool.req_to_token.shape[0],
            max_context_len=0,
            num_draft_tokens=get_spec().speculative_num_draft_tokens,
            device=self.device,
            is_read=False,
        )

    def update_verify_buffers_to_fill_after_draft(self, spec_info: SpecInput, cuda_graph_bs: int | None) -> None:
        """A chain's metadata depends on lengths alone, which are known before its tokens."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to allocate: a graph's metadata lives in its own memory pool."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Every layer reads req_to_token and the SWA mapping as they are, so the scheduler may change them when the last one is done."""
        return SharedReadEnds.POST_REPLAY if fm.is_decode() or fm.is_target_verify() else SharedReadEnds.UNKNOWN

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        if in_capture:
            self.on_after_cuda_graph_warmup()

    def on_after_cuda_graph_warmup(self) -> None:
        """Have the capture that follows record its own metadata, from static buffers that replays refill. SGLang asks for it in a graph of
        decode or verification; in a prefill graph of one piece the first layer does."""
        self.forward_metadata = None

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Make the step's metadata on the device. ValueError for drafts that are a tree, not a chain."""
        seq_lens = forward_batch.seq_lens
        if forward_batch.forward_mode.is_decode_or_idle():
            query_start_loc = self._starts(forward_batch.batch_size, 1)
        elif forward_batch.forward_mode.is_target_verify():
            if forward_batch.spec_info.tree_topk != 1:
                raise ValueError("llama4_kernels verifies drafts that are one chain (--speculative-eagle-topk 1), these are a tree")
            drafted = forward_batch.spec_info.draft_token_num
            query_start_loc = self._starts(forward_batch.batch_size, drafted)
            seq_lens = seq_lens + drafted  # SGLang counts them when they are accepted
        else:
            ends = forward_batch.extend_seq_lens.cumsum(0, dtype=torch.int32)
            query_start_loc = torch.nn.functional.pad(ends, (1, 0))
        self.forward_metadata = StepMetadata(seq_lens.to(torch.int32), query_start_loc)

    def _starts(self, requests: int, queries: int) -> Tensor:
        """query_start_loc of requests of `queries` queries each: also of more than there can be, as data-parallel attention pads a batch."""
        return torch.arange(0, (requests + 1) * queries, queries, dtype=torch.int32, device=self.device)

    def forward_extend(
        self,
        q: Tensor,
        k: None,
        v: None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        *,
        chunk_size: int | None,
    ) -> Tensor:
        """Attention of q [T, num_heads, head_dim] over the cache, which ops.rope_qk_norm has written: [T, num_heads · head_dim]."""
        if self.forward_metadata is None:
            self.init_forward_metadata_in_graph(forward_batch)
        cache = layer_cache(self.token_to_kv_pool, layer)
        out = ops.chunked_attention(
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            cache.k,
            cache.v,
            page_table=self.req_to_token_pool.req_to_token,
            page_table_rows=forward_batch.req_pool_indices,
            page_table_holds="slots",
            slot_map=cache.slot_map,
            seq_lens=self.forward_metadata.seq_lens,
            query_start_loc=self.forward_metadata.query_start_loc,
            chunk_size=chunk_size,
            scale=layer.scaling,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
        return out.flatten(1)

    forward_decode = forward_extend
