"""What a server may be asked for that this model does not have. It is refused while the model is built: SGLang would start, and the answers
would be wrong or the first request would end the server."""

from __future__ import annotations

import torch
from sglang.srt.environ import envs
from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
from sglang.srt.runtime_context import (
    get_device,
    get_disagg,
    get_exec,
    get_lora,
    get_memory,
    get_model,
    get_parallel,
    get_schedule,
    get_spec,
)

from llama4_kernels import switches
from llama4_kernels.ops import backend
from llama4_kernels.ops.types import E4M3_CAPABILITY

# Speculative algorithms whose drafts are one chain of tokens, with --speculative-eagle-topk 1. NGRAM's never are: it fills up short ones
# with siblings of their first token.
CHAIN_DRAFTS = ("EAGLE", "EAGLE3", "STANDALONE")

# Caches that rope_qk_norm writes and chunked_attention reads: no e5m2, no 4 bits, no scales per block.
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3")

# Others have SGLang store w13 with up before gate, transposed or padded.
MOE_RUNNER_BACKENDS = ("auto", "triton")

# Those that give the model tensor by tensor, or none. Others write into parameters when what is derived from them has been made, scales per
# channel or weights quantised at load, or have never been seen to work.
LOAD_FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "mistral", "pt", "npcache", "dummy")

MODEL_OPS = ("fused_moe", "rope_qk_norm", "chunked_attention")
GRAPH_FLAGS = "--cuda-graph-backend-decode=disabled --cuda-graph-backend-prefill=disabled"


def check_server() -> None:
    """ValueError where this process's server, as SGLang has resolved its flags, is asked for a mode that the model does not have."""
    parallel, model, spec = get_parallel(), get_model(), get_spec()
    moe, offload, overlap = get_exec().moe, get_exec().offload, get_exec().overlap
    algorithm, topk = spec.speculative_algorithm, spec.speculative_eagle_topk
    schedule, disagg = get_schedule(), get_disagg()
    for is_asked, flag, needs in (
        (parallel.moe_ep_size > 1, f"--ep-size {parallel.moe_ep_size}", "1: every rank has a part of every expert"),
        (parallel.pp_size > 1, f"--pp-size {parallel.pp_size}", "1"),
        (parallel.attn_cp_size > 1, f"--attn-cp-size {parallel.attn_cp_size}", "1: attention reads whole sequences"),
        (parallel.attn_dcp_size > 1, f"--dcp-size {parallel.attn_dcp_size}", "1: attention reads whole sequences"),
        (parallel.moe_dp_size > 1, f"--moe-dp-size {parallel.moe_dp_size}", "1"),
        (parallel.dwdp_size > 1, f"--dwdp-size {parallel.dwdp_size}", "1"),
        (
            parallel.moe_dense_tp_size not in (None, parallel.tp_size),
            f"--moe-dense-tp-size {parallel.moe_dense_tp_size}",
            f"--tp-size, {parallel.tp_size}: every rank has a part of every dense MLP",
        ),
        (
            moe.moe_runner_backend not in MOE_RUNNER_BACKENDS,
            f"--moe-runner-backend {moe.moe_runner_backend}",
            f"{' or '.join(MOE_RUNNER_BACKENDS)}: the MoE layer runs kernels of its own, on weights laid out as these have them",
        ),
        (moe.moe_a2a_backend != "none", f"--moe-a2a-backend {moe.moe_a2a_backend}", "none: every rank has a part of every expert"),
        (moe.kt_weight_path is not None, "--kt-weight-path", "every expert on the GPU"),
        (moe.enable_paged_experts, "--enable-paged-experts", "every expert on the GPU"),
        (offload.cpu_offload_gb > 0, f"--cpu-offload-gb {offload.cpu_offload_gb}", "0: the MoE layer reads its weights where they are"),
        (offload.offload_group_size > 0, f"--offload-group-size {offload.offload_group_size}", "weights that stay on the GPU"),
        (
            get_exec().features.enable_return_routed_experts,
            "--enable-return-routed-experts",
            "answers without them: which experts a token took is not kept",
        ),
        (get_exec().features.enable_mis, "--enable-mis", "a sequence for each item that is scored: attention has no mask between items"),
        (overlap.enable_two_batch_overlap, "--enable-two-batch-overlap", "batches in one piece: the model has no stages of two to overlap"),
        (overlap.enable_single_batch_overlap, "--enable-single-batch-overlap", "the MoE layer in one piece: it has no stages to overlap"),
        (disagg.enable_pdmux, "--enable-pdmux", "prefills of all layers at once: the model has none of a few layers"),
        (get_lora().enable_lora, "--enable-lora", "weights without adapters: the MoE layer reads those of its experts itself"),
        (model.load_format not in LOAD_FORMATS, f"--load-format {model.load_format}", " or ".join(LOAD_FORMATS)),
        (
            model.weight_cache_mode != "off",
            f"--weight-cache-mode {model.weight_cache_mode}",
            "off: the MoE layer's weights are made where the checkpoint is loaded",
        ),
        (model.is_embedding, "--is-embedding", "a model with a pooling layer"),
        (get_memory().enable_unified_memory, "--enable-unified-memory", "K and V of a layer in one piece, at the slots of the page table"),
        (
            parallel.dp_size > 1
            and parallel.load_balance_method == "follow_bootstrap_room"
            and disagg.disaggregation_mode == "null"
            and disagg.disaggregation_transfer_backend != "fake",
            "--load-balance-method follow_bootstrap_room",
            "auto: requests without --disaggregation-mode have no bootstrap room, and the first would end the server",
        ),
        (
            schedule.max_queued_requests == 0 and schedule.enable_priority_scheduling,
            "--max-queued-requests 0",
            "1 or more with --enable-priority-scheduling: of an empty queue SGLang finds no request of the lowest priority, and ends",
        ),
        (
            get_device().device == "cpu" and get_memory().enable_hierarchical_cache,
            "--enable-hierarchical-cache on the CPU",
            "a GPU, or no such flag: SGLang copies KV caches to the host with kernels for GPUs",
        ),
        (
            not envs.SGLANG_USE_PICKLE_IPC.get(),
            "SGLANG_USE_PICKLE_IPC=0",
            "1: SGLang's scheduler ends at a nested field of a request that is not of the type that it declares",
        ),
        (envs.SGLANG_USE_HND_KVCACHE.get(), "SGLANG_USE_HND_KVCACHE=1", "a cache in which the heads of a token lie side by side"),
        *(
            (variable.get(), f"{variable.name}=1", "tokens that go to the experts of their router")
            for variable in (envs.SGLANG_SIMULATE_UNIFORM_EXPERTS, envs.SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS)
        ),
        (model.kv_cache_dtype not in KV_CACHE_DTYPES, f"--kv-cache-dtype {model.kv_cache_dtype}", " or ".join(KV_CACHE_DTYPES)),
        (
            get_exec().deterministic.enable_deterministic_inference,
            "--enable-deterministic-inference",
            "ops whose bits do not depend on the batch: the order of the MoE layer's sums depends on its tokens",
        ),
        (algorithm not in (None, *CHAIN_DRAFTS), f"--speculative-algorithm {algorithm}", " or ".join(CHAIN_DRAFTS)),
        (algorithm is not None and topk != 1, f"--speculative-eagle-topk {topk}", "1: drafts of one chain"),
    ):
        if is_asked:
            raise ValueError(f"--model-impl llama4_kernels does not serve Llama 4 with {flag}, needs {needs}")


def check_graphs(device: torch.device, *, is_fp8: bool, checkpoint_cache: str) -> None:
    """ValueError where CUDA graphs would be captured of ops that read on the host: those in plain PyTorch sizes, others values if they check them.

    is_fp8: whether weights of the MoE layers are FP8. checkpoint_cache: "fp8" where the checkpoint asks for an FP8 KV cache, which it has where
    no flag says otherwise.
    """
    if device.type != "cuda" or cuda_graph_fully_disabled():
        return
    if switches.is_on(switches.CHECK_VALUES):
        raise ValueError(
            f"{switches.CHECK_VALUES}=1 has ops read values on the host, which CUDA graphs cannot capture, needs {GRAPH_FLAGS}"
        )
    for choice in backend.choices(device):
        if choice.op in MODEL_OPS and choice.backend == "reference":
            raise ValueError(
                f"--model-impl llama4_kernels computes {choice.op} on {device} in plain PyTorch, which CUDA graphs cannot capture "
                f"({choice.why}), needs {GRAPH_FLAGS}"
            )
    cache = get_model().kv_cache_dtype
    for is_asked, what, instead in (
        (is_fp8, "FP8 weights", "bf16 weights"),
        (cache == "fp8_e4m3", f"--kv-cache-dtype {cache}", "bfloat16"),
        (cache == "auto" and checkpoint_cache == "fp8", "the FP8 KV cache that the checkpoint asks for", "--kv-cache-dtype bfloat16"),
    ):
        if is_asked and torch.cuda.get_device_capability(device) < E4M3_CAPABILITY:
            raise ValueError(
                f"--model-impl llama4_kernels does not serve Llama 4 with {what} in CUDA graphs on {torch.cuda.get_device_name(device)}: "
                f"before compute capability {'.'.join(map(str, E4M3_CAPABILITY))} FP8 is computed in plain PyTorch, which they cannot capture; "
                f"needs {instead}, or {GRAPH_FLAGS}"
            )
