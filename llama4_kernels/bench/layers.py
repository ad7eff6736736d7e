"""The two parts of a decoder layer that are no single op, from ops and plain PyTorch, one rank, before each all-reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama4_kernels import ops
from llama4_kernels.ops import MoEWeights

EPS = 1e-5


def attention_part(x: Tensor, *, qkv_proj: Tensor, o_proj: Tensor, rope: dict[str, Any], attention: dict[str, Any]) -> Tensor:
    """qkv projection, rope_qk_norm into the caches, chunked_attention, output projection: x [T, H] -> [T, H].

    qkv_proj: [(heads + 2 · kv_heads) · D, H]. o_proj: [H, heads · D]. rope, attention: the arguments of rope_qk_norm and of
    chunked_attention but for qkv and q; the caches stand in `attention`.
    """
    caches = {name: attention[name] for name in ("k_cache", "v_cache")}
    q = ops.rope_qk_norm(torch.nn.functional.linear(x, qkv_proj), **rope, **caches)
    return torch.nn.functional.linear(ops.chunked_attention(q, **attention).flatten(1), o_proj)


def decoder_layer(x: Tensor, *, norms: tuple[Tensor, Tensor], moe: MoEWeights, **attention: Any) -> Tensor:
    """`Llama4TextDecoderLayer` of Hugging Face transformers (modeling_llama4.py) on one rank: x [T, H] -> [T, H].

    norms: [H] weights of the norms before attention and before the MoE layer. attention: the arguments of attention_part.
    """
    shape = x.shape[-1:]
    x = x + attention_part(torch.nn.functional.rms_norm(x, shape, norms[0], EPS), **attention)
    return x + ops.fused_moe(torch.nn.functional.rms_norm(x, shape, norms[1], EPS), moe)
