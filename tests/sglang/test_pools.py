"""The planner's memory model against what SGLang reports: weights within 1 %, KV tokens within 2 %, its own defaults exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_runner import FREE
from sglang.srt.environ import envs

from llama4_kernels.cli.plan import gpus, memory, model

SCRIPT = Path(__file__).with_name("model_runner.py")
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


@pytest.fixture(scope="module")
def reports(make):
    """What SGLang reports, by case, of the rank that is asked for the most."""
    cases = []
    for (like, options), flags, tp, differs in CASES.values():
        dtype = "bfloat16" if differs.get("kv_bytes") == 2 else "float32"
        common = ("--device=cpu", "--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled", f"--dtype={dtype}")
        own = (f"--model-path={make(like, **options)}", "--model-impl=llama4_kernels", "--mem-fraction-static=0.5")
        own += () if "max_position_embeddings" in options else (f"--context-length={CONTEXT}",)
        cases.append({"flags": [*own, *common, *flags], "tp": tp})
    for gpu, tp, flags, differs in DEFAULTS.values():
        own = (f"--model-path={make('scout', vision=True)}", "--model-impl=llama4_kernels", "--attention-backend=fa3", "--device=cuda")
        graphs = () if differs.get("vision") else ("--cuda-graph-backend-prefill=breakable",)
        cases.append({"flags": [*own, f"--tp-size={tp}", *graphs, *flags], "gpu_mib": gpus.load(gpu).total_mib})
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "SGLANG_NCCL_SO_PATH": "/none"}
    done = subprocess.run([sys.executable, SCRIPT], input=json.dumps(cases), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = iter([json.loads(line) for line in done.stdout.splitlines()])
    return {name: [next(lines) for _ in range(case[2])] for name, case in CASES.items()} | {name: next(lines) for name in DEFAULTS}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_pools(name, reports, make):
    (like, options), flags, tp, differs = CASES[name]
    found = model.load(str(make(like, **options)), "fp8" if "--quantization=fp8" in flags else None)
    assumed = {"mem_fraction_static": 0.5, "swa_full_tokens_ratio": memory.SWA_RATIO, "page_size": 1, "kv_bytes": 4}
    asked = memory.Flags(context_length=CONTEXT, tp=tp, chunked_prefill_size=4096, **assumed | differs)
    loaded = sum(memory.loaded_bytes(found, asked).values())
    room = int(FREE * asked.mem_fraction_static) - loaded - (memory.MULTIMODAL_BYTES if asked.vision else 0)
    pools = memory.pools(found, asked, room)
    for report in reports[name]:
        assert loaded == pytest.approx(report["weight_bytes"], rel=0.01)
        assert pools.tokens == pytest.approx(report["tokens"], rel=0.02)
        assert (pools.swa_tokens or 0) == pytest.approx(report["swa_tokens"] or 0, rel=0.02)
        assert pools.bytes == pytest.approx(report["kv_bytes"], rel=0.02)
        requests = asked.max_running_requests or memory.default_requests(pools.tokens, CONTEXT)
        assert requests == report["requests"]
        assert memory.request_table_bytes(requests, CONTEXT) == report["request_table_bytes"]
        assert memory.rope_table_bytes(found, CONTEXT) == report["rope_table_bytes"] and report["rope_table_survives"]


def test_what_sglang_has_environment_variables_for():
    assert memory.EVICTION_INTERVAL == envs.SGLANG_SWA_EVICTION_INTERVAL.get()
    assert memory.MULTIMODAL_BYTES == envs.SGLANG_VLM_CACHE_SIZE_MB.get() << 20


@pytest.mark.parametrize("name", DEFAULTS)
def test_sglangs_own_defaults(name, reports, make):
    gpu, tp, _, differs = DEFAULTS[name]
    gpu, found = gpus.load(gpu), model.load(str(make("scout", vision=True)), None)
    chunked = differs.get("chunked_prefill_size") or memory.default_chunked_prefill(gpu)
    asked = {"mem_fraction_static": 0.0, "swa_full_tokens_ratio": memory.SWA_RATIO, "chunked_prefill_size": chunked, "page_size": 1}
    flags = memory.Flags(context_length=CONTEXT, tp=tp, kv_bytes=2, **asked | differs)
    batch = memory.default_graph_batch(gpu, tp, flags.max_running_requests)
    assert reports[name] == {
        "mem_fraction_static": pytest.approx(memory.default_mem_fraction(gpu, flags, batch, found.vision), abs=1e-9),
        "chunked_prefill_size": chunked,
        "cuda_graph_max_bs": batch,
        "prefill_graphs": memory.prefill_graphs(chunked),
    }
