"""Peers of chunked_attention, by name; each calls prefill.py or decode.py, as the workload asks.

What they are given is the chunk-local attention cut into requests of their own, prepared outside the timed region: none of them but
FlashAttention-3's attention_chunk knows chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama4_kernels.bench.inputs import Problem
from llama4_kernels.bench.peers import Case, Unavailable, decode, load, peer, prefill

# Softmax weights rounded to bf16 before the product with v
BOUND = 1e-2
Build = Callable[[Problem], Case]


def _by_phase(problem: Problem, *, decoding: Build | None, prefilling: Build | None) -> Case:
    load.require_gpu()
    w = problem.workload
    if w.dtype != "bf16":
        raise Unavailable("compared with a bf16 KV cache only")
    build = decoding if w.queries == 1 else prefilling if w.queries == w.context else None
    if build is None:
        phase = "decode" if w.queries == 1 else "prefill" if w.queries == w.context else "prefill after a prefix"
        raise Unavailable(f"not compared in {phase}")
    return build(problem)


def _register(name: str, about: str, *, decoding: Build | None = None, prefilling: Build | None = None) -> None:
    peer(name, "chunked_attention", about=about, bound=BOUND)(lambda problem: _by_phase(problem, decoding=decoding, prefilling=prefilling))


_CUDNN, _FLASH = torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION

_register(
    "flash_attn_3",
    "FlashAttention-3 from sgl_kernel, a request per chunk: what SGLang runs by default",
    decoding=decode.flash_attn_3,
    prefilling=prefill.flash_attn_3,
)
_register("flash_attn_3_chunk", "FlashAttention-3 with its own attention_chunk", prefilling=prefill.flash_attn_3_chunk)
_register("flash_attn_4", "flash-attn-4, a request per chunk", decoding=decode.flash_attn_4, prefilling=prefill.flash_attn_4)
_register(
    "torch_cudnn",
    "torch SDPA through cuDNN, an entry of the batch per chunk",
    decoding=decode.cudnn,
    prefilling=lambda problem: prefill.sdpa(problem, _CUDNN),
)
_register("torch_flash", "torch SDPA through FlashAttention-2", prefilling=lambda problem: prefill.sdpa(problem, _FLASH))
_register("torch_flex", "torch FlexAttention with a block mask", decoding=decode.flex, prefilling=prefill.flex)
_register("flashinfer", "FlashInfer, a request per chunk", decoding=decode.flashinfer, prefilling=prefill.flashinfer)
_register("sglang_triton", "SGLang's Triton attention, a request per chunk", decoding=decode.sglang, prefilling=prefill.sglang)
