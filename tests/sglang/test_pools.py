"""The planner's memory model against what SGLang reports: weights within 1 %, KV tokens within 2 %, its own defaults exactly."""

import model_runner
import pytest
from sglang.srt.environ import envs

from llama4_kernels.cli.plan import gpus, memory, model

CONTEXT = 2048

# name -> (checkpoint, further flags, --tp-size, what of memory.Flags differs)
CASES = {
    "scout": (("scout", {}), (), 1, {}),
    "scout, one pool": (("scout", {}), ("--disable-hybrid-swa-memory",), 1, {"swa_full_tokens_ratio": None}),
    "scout, a chunk as long as the context": (("scout", {"attention_chunk_size": CONTEXT}), (), 1, {}),
    "scout, pages, a context that RoPE's scaling makes": (
        ("scout", {"max_position_embeddings": CONTEXT // 2, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("--page-size=16", "--swa-full-tokens-ratio=0.3"),
        1,
        {"page_size": 16, "swa_full_tokens_ratio": 0.3},
    ),
    "scout, repeated KV heads": (("scout", {"num_key_value_heads": 1}), (), 2, {}),
    "maverick, rows": (("maverick", {"dtype": "bfloat16"}), ("--max-running-requests=24",), 2, {"max_running_requests": 24, "kv_bytes": 2}),
    "maverick, fp8 experts": (("maverick", {"fp8": "compressed-tensors-experts"}), (), 2, {}),
    "scout, fp8": (("scout", {"fp8": "redhat", "fp8_attention": True}), (), 1, {}),
    "scout, fp8 at load": (("scout", {}), ("--quantization=fp8",), 1, {}),
    "scout, ModelOpt, images": (("scout", {"fp8": "modelopt", "vision": True}), ("--enable-multimodal",), 2, {"vision": True}),
    "scout, images, random weights": (("scout", {}), ("--enable-multimodal", "--load-format=dummy"), 1, {"vision": True}),
    "text only, a pattern of its own": (
        (
            "scout",
            {
                "text_only": True,
                "fp8": "redhat",
                "num_hidden_layers": 5,
                "no_rope_layers": [0, 1, 1, 0, 1],
                "moe_layers": [1, 2, 4],
            },
        ),
        ("--mem-fraction-static=0.7",),
        1,
        {"mem_fraction_static": 0.7},
    ),
}

# name -> (GPU, --tp-size, further flags, what of memory.Flags differs)
DEFAULTS = {
    "h100": ("h100", 8, (), {}),
    "h200, a long piece": ("h200", 8, ("--chunked-prefill-size=16384",), {"chunked_prefill_size": 16384}),
    "h100, two ranks": ("h100", 2, (), {}),
    "h200, few requests": ("h200", 4, ("--max-running-requests=64",), {"max_running_requests": 64}),
    "h100, images": ("h100", 8, ("--enable-multimodal",), {"vision": True}),
    "a small one": ("40GiB", 4, (), {}),
    "a large one": ("b200", 2, (), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_pools(name, make):
    (like, options), flags, tp, differs = CASES[name]
    path = make(like, **options)
    found = model.load(str(path), "fp8" if "--quantization=fp8" in flags else None)
    assumed = {"mem_fraction_static": 0.5, "swa_full_tokens_ratio": memory.SWA_RATIO, "page_size": 1, "kv_bytes": 4}
    asked = memory.Flags(context_length=CONTEXT, tp=tp, chunked_prefill_size=4096, **assumed | differs)
    loaded = sum(memory.loaded_bytes(found, asked).values())
    room = int(model_runner.FREE * asked.mem_fraction_static) - loaded - (memory.MULTIMODAL_BYTES if asked.vision else 0)
    pools = memory.pools(found, asked, room)
    dtype = "bfloat16" if asked.kv_bytes == 2 else "float32"
    common = ("--device=cpu", "--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled", f"--dtype={dtype}")
    own = (f"--model-path={path}", "--model-impl=llama4_kernels", "--mem-fraction-static=0.5")
    own += () if "max_position_embeddings" in options else (f"--context-length={CONTEXT}",)
    for report in model_runner.reports([*own, *common, *flags], tp):
        assert loaded == pytest.approx(report["weight_bytes"], rel=0.01)
        assert pools.tokens == pytest.approx(report["tokens"], rel=0.02)
        assert (pools.swa_tokens or 0) == pytest.approx(report["swa_tokens"] or 0, rel=0.02)
        assert pools.bytes == pytest.approx(report["kv_bytes"], rel=0.02)
        requests = asked.max_running_requests or memory.default_requests(pools.tokens, CONTEXT)
        assert requests == report["requests"]
        assert memory.request_table_bytes(requests, CONTEXT) == report["request_table_bytes"]
        assert memory.rope_table_bytes(found, CONTEXT) == report["rope_table_bytes"]
        assert report["tables_that_survive"] == ["cos_sin_cache", *(["freqs_ci"] if asked.vision else [])]


def test_what_sglang_has_environment_variables_for():
    assert memory.EVICTION_INTERVAL == envs.SGLANG_SWA_EVICTION_INTERVAL.get()
    assert memory.MULTIMODAL_BYTES == envs.SGLANG_VLM_CACHE_SIZE_MB.get() << 20


@pytest.mark.parametrize("name", DEFAULTS)
def test_sglangs_own_defaults(name, make):
    gpu, tp, more, differs = DEFAULTS[name]
    path = make("scout", vision=True)
    gpu, found = gpus.load(gpu), model.load(str(path), None)
    chunked = differs.get("chunked_prefill_size") or memory.default_chunked_prefill(gpu)
    asked = {"mem_fraction_static": 0.0, "swa_full_tokens_ratio": memory.SWA_RATIO, "chunked_prefill_size": chunked, "page_size": 1}
    flags = memory.Flags(context_length=CONTEXT, tp=tp, kv_bytes=2, **asked | differs)
    batch = memory.default_graph_batch(gpu, tp, flags.max_running_requests)
    own = (f"--model-path={path}", "--model-impl=llama4_kernels", "--attention-backend=fa3", "--device=cuda", f"--tp-size={tp}")
    graphs = () if differs.get("vision") else ("--cuda-graph-backend-prefill=breakable",)
    assert model_runner.settings([*own, *graphs, *more], gpu.total_mib) == {
        "mem_fraction_static": pytest.approx(memory.default_mem_fraction(gpu, flags, batch, found.vision), abs=1e-9),
        "chunked_prefill_size": chunked,
        "cuda_graph_max_bs": batch,
        "prefill_graphs": memory.prefill_graphs(chunked),
    }
