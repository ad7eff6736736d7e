"""Where the memory of one rank goes under given flags, by SGLang 0.5.23's own rules.

SGLang splits what is free before loading by --mem-fraction-static. The static part holds weights and KV pools: the pools get what the
weights leave of it. The rest must hold everything else: the table of slots by request, the allocators' lists, activations, logits, CUDA
graphs and workspaces. Nothing checks that they fit, so the table below does.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama4_kernels.cli.plan.gpus import MIB, Gpu
from llama4_kernels.cli.plan.model import Model, Vision

SWA_RATIO = 0.8  # SGLang's --swa-full-tokens-ratio where none is given
EVICTION_INTERVAL = 128  # tokens that may slide out of a chunk before SGLang frees their slots (SGLANG_SWA_EVICTION_INTERVAL)
EXTRA_POSITIONS = 4  # columns of the request table beyond the context length
ROPE_MARGIN = 256  # rows of the RoPE table beyond the context length
MULTIMODAL_BYTES = 100 * MIB  # SGLang's image-embedding cache (SGLANG_VLM_CACHE_SIZE_MB)
LEAST_REQUESTS, MOST_REQUESTS = 2048, 4096


@dataclass(frozen=True)
class Flags:
    """What a server is started with, each field the flag of its name.

    swa_full_tokens_ratio: None for --disable-hybrid-swa-memory, one pool for all layers.
    max_running_requests: None where SGLang chooses.
    """

    context_length: int
    tp: int
    mem_fraction_static: float
    swa_full_tokens_ratio: float | None
    chunked_prefill_size: int
    page_size: int
    kv_bytes: int
    ep: int = 1
    max_running_requests: int | None = None
    cuda_graph_max_bs: int | None = None
    vision: bool = False


@dataclass(frozen=True)
class Pools:
    """Tokens that the global and the local layers hold; one pool has no swa_tokens. token_bytes: of one token in all layers of each."""

    tokens: int
    swa_tokens: int | None
    token_bytes: tuple[int, int]
    page_size: int

    @property
    def bytes(self) -> int:
        """Both, each with the page that takes the writes of padding."""
        return sum(
            (tokens + self.page_size) * size for tokens, size in zip((self.tokens, self.swa_tokens), self.token_bytes) if tokens is not None
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `static` lies within --mem-fraction-static of what is free before loading, `dynamic` must fit beside it.

    budget: of the static part. pools: None where the weights leave no room for one.
    """

    static: dict[str, int]
    dynamic: dict[str, int]
    budget: int
    free: int
    pools: Pools | None
    requests: int

    @property
    def spare(self) -> int:
        """Bytes that no part needs; negative where the dynamic part does not fit."""
        return self.free - self.budget - sum(self.dynamic.values())


def rope_table_bytes(model: Model, context: int) -> int:
    """cos and sin, head_dim / 2 float32 of each, for every position that the server may see."""
    return (context + ROPE_MARGIN) * model.head_dim * 4


def request_table_bytes(requests: int, context: int) -> int:
    """One int32 slot for each position of each request that may run, and a row for padding."""
    return (requests + 1) * (context + EXTRA_POSITIONS) * 4


def token_bytes(model: Model, flags: Flags) -> tuple[int, int]:
    """Bytes of a token's K and V in all global layers and in all local ones, of one rank; all in the first where there is one pool."""
    layer = max(1, model.kv_heads // flags.tp) * 2 * model.head_dim * flags.kv_bytes
    if not has_two_pools(model, flags):
        return layer * len(model.layers), 0
    return layer * model.global_layers, layer * model.local_layers


def has_two_pools(model: Model, flags: Flags) -> bool:
    """Local layers free slots only where a context may be longer than a chunk."""
    frees_slots = model.local_layers and model.global_layers and model.chunk < flags.context_length
    return flags.swa_full_tokens_ratio is not None and bool(frees_slots)


def pools(model: Model, flags: Flags, kv_bytes: int, most_tokens: int | None = None) -> Pools | None:
    """The pools that SGLang makes of `kv_bytes`, with at most `most_tokens` (--max-total-tokens); None where it would refuse."""
    page, cells = flags.page_size, token_bytes(model, flags)
    ratio = flags.swa_full_tokens_ratio if has_two_pools(model, flags) else 0.0
    tokens = int(kv_bytes // (cells[0] + ratio * cells[1]))
    if most_tokens is not None:
        tokens = min(tokens, most_tokens)
    tokens = tokens // page * page
    if tokens <= 0:
        return None
    if not has_two_pools(model, flags):
        return Pools(tokens, None, cells, page)
    swa_tokens = int(tokens * ratio) // page * page
    if swa_tokens <= model.chunk + page:
        return None
    return Pools(tokens, swa_tokens, cells, page)


def local_tokens(model: Model, flags: Flags, requests: int) -> int:
    """Tokens that local layers hold at most for `requests` at once: of each its chunk, what waits to be freed and pages begun, and two
    pieces of prefill in flight, one computing and one scheduled."""
    page = flags.page_size
    each = min(flags.context_length, model.chunk + EVICTION_INTERVAL) + 2 * page
    return requests * each + min(2 * flags.chunked_prefill_size, requests * flags.context_length) + page


def default_graph_batch(gpu: Gpu, tp: int, max_running_requests: int | None) -> int:
    """Largest batch that SGLang captures a decode graph for."""
    if gpu.total_mib < 60 * 1024:
        most = (32 if tp < 4 else 160) if gpu.total_mib >= 35 * 1024 else (48 if tp < 4 else 160) if gpu.total_mib >= 20 * 1024 else 8
    else:
        most = 256 if tp < 4 and gpu.total_mib < 160 * 1024 else 512
    return min(most, max_running_requests or most)


def default_chunked_prefill(gpu: Gpu) -> int:
    for below_gib, size in ((20, 2048), (60, 4096), (160, 8192)):
        if gpu.total_mib < below_gib * 1024:
            return size
    return 16384


def prefill_graphs(chunked_prefill_size: int) -> int:
    """How many prefill graphs SGLang captures: one for each of its token counts up to the prefill size."""
    steps = (range(4, 33, 4), range(48, 257, 16), range(288, 513, 32), range(576, 1025, 64), range(1280, 4097, 256))
    sizes = [size for step in steps for size in step] + list(range(4608, chunked_prefill_size + 1, 512))
    return sum(size <= chunked_prefill_size for size in sizes)


def graph_bytes(flags: Flags, batch: int) -> int:
    """SGLang's allowance for CUDA graphs: 2 MiB for each request of the largest decode graph, 8 MiB for each prefill graph. Image
    input turns prefill graphs off."""
    return (2 * batch + (0 if flags.vision else 8 * prefill_graphs(flags.chunked_prefill_size))) * MIB


def default_mem_fraction(gpu: Gpu, flags: Flags, batch: int, vision: Vision | None) -> float:
    """--mem-fraction-static where none is given: the total less SGLang's allowances, for image input less again by the tower's size."""
    reserved = 512 * MIB + max(flags.chunked_prefill_size, 2048) * 1.5 * MIB + flags.tp / 8 * 1024 * MIB + graph_bytes(flags, batch)
    if gpu.total_mib > 60 * 1024:
        reserved = max(reserved, 10 * 1024 * MIB)
    fraction = round(1 - reserved / MIB / gpu.total_mib, 3)
    if flags.vision and vision is not None:
        size = vision.layers * vision.hidden**2 / (24 * 1024**2)
        fraction *= 0.95 * max(0.8, min(1.05, 1 - 0.1 * (size - 1)))
    return fraction


def default_requests(tokens: int, context: int) -> int:
    """--max-running-requests where none is given."""
    return min(max(min(int(tokens / context * 512), MOST_REQUESTS), LEAST_REQUESTS), tokens // 2)


def activation_bytes(model: Model, flags: Flags) -> int:
    """Activations that are alive together at the widest point of a layer, for a full prefill piece: the residual, the input of a block,
    what its two GEMMs hold between them, and its output before and after the all-reduce."""
    size, tp = model.dtype_bytes, flags.tp
    heads = model.q_heads // tp + 2 * max(1, model.kv_heads // tp)
    attention = (heads + 2 * model.q_heads // tp) * model.head_dim * size
    moe = 2 * (model.expert_width // tp) * size + model.hidden * (1 if model.weights == "fp8" else size)
    mlp = 3 * (model.mlp_width // tp) * size if any(not layer.is_moe for layer in model.layers) else 0
    return flags.chunked_prefill_size * (4 * model.hidden * size + max(attention, moe, mlp))


def logit_bytes(model: Model, batch: int) -> int:
    """Logits of `batch` requests over the whole vocabulary: gathered in the model's dtype, then float32 for sampling and its sort."""
    return batch * model.vocabulary * (model.dtype_bytes + 2 * 4)


def loaded_bytes(model: Model, flags: Flags) -> dict[str, int]:
    """What a rank holds once the model is loaded, by part."""
    return model.weight_bytes(flags.tp, flags.ep, flags.vision) | {"RoPE table": rope_table_bytes(model, flags.context_length)}


def kv_room(model: Model, gpu: Gpu, flags: Flags) -> int:
    """Bytes that the static part has for the KV pools; negative where the weights alone exceed it."""
    loaded = sum(loaded_bytes(model, flags).values())
    return int(gpu.free * flags.mem_fraction_static) - loaded - (MULTIMODAL_BYTES if flags.vision else 0)


def memory(model: Model, gpu: Gpu, flags: Flags) -> Memory:
    """Everything of one rank under `flags`."""
    static = loaded_bytes(model, flags)
    budget = int(gpu.free * flags.mem_fraction_static)
    made = pools(model, flags, kv_room(model, gpu, flags))
    tokens, swa_tokens = (made.tokens, made.swa_tokens or 0) if made else (0, 0)
    if made:
        static["KV cache"] = made.bytes
    requests = flags.max_running_requests or default_requests(tokens, flags.context_length)
    batch = flags.cuda_graph_max_bs or default_graph_batch(gpu, flags.tp, flags.max_running_requests)
    dynamic = {
        "request table": request_table_bytes(requests, flags.context_length),
        "slot lists": (tokens // flags.page_size + swa_tokens // flags.page_size + (tokens if swa_tokens else 0)) * 8,
        "activations": activation_bytes(model, flags),
        "logits": logit_bytes(model, batch),
        "CUDA graphs": graph_bytes(flags, batch),
        "workspaces": int((512 + flags.tp / 8 * 1024) * MIB) + (MULTIMODAL_BYTES if flags.vision else 0),
    }
    return Memory(static, dynamic, budget, gpu.free, made, requests)
