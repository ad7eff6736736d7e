"""Names of workloads, and the least bytes and flops of each."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama4_kernels.bench import ceilings, inputs, record, timing, workloads
from llama4_kernels.ops import Linear
from llama4_kernels.ops.backend import OPS


def test_every_op_has_workloads():
    assert set(OPS) < set(workloads.OPS)
    assert {workload.op for workload in workloads.named()} == set(workloads.OPS)
    assert {workload.op for workload in workloads.default("cpu")} == set(workloads.OPS)


@pytest.mark.parametrize("where", ["grid", "cpu", "cuda"])
def test_a_name_is_its_workload_and_no_other(where):
    found = workloads.named() if where == "grid" else workloads.default(where)
    assert [workloads.parse(workload.name) for workload in found] == found
    assert len({workload.name for workload in found}) == len(found)


# These stand in committed results and in links: a change of one loses a history
@pytest.mark.parametrize(
    "name",
    [
        "fused_moe/fp8/scout/tp8/t64",
        "quantize_per_token/fp8/maverick/tp1/t1",
        "route_top1/bf16/maverick/tp4/t8192",
        "rope_qk_norm/bf16/scout/tp8/full/t64",
        "chunked_attention/fp8/scout/tp2/local/b64/q1/c65536/p64",
        "attention_part/bf16/scout/tp8/full/b1/q8192/c16384/p64",
        "decoder_layer/fp8/maverick/tp8/local/b1/q1024/c1024/p64",
    ],
)
def test_published_names_stay(name):
    assert name in {workload.name for workload in workloads.named()}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("fused_moe", "needs a name such as"),
        ("fused_moe/fp8/scout/tp8/t0", "needs a name such as"),
        ("fused_moe/fp8/scout/tp3/t1", "needs tp of 1, 2, 4, 8"),
        ("rope_qk_norm/bf16/tiny/tp4/full/t1", "that divides 2 KV heads"),
        ("fused_moe/fp8/scout/tp8/local/t1", "needs no layer"),
        ("rope_qk_norm/fp8/scout/tp8/t1", "needs a layer"),
        ("chunked_attention/bf16/scout/tp8/local/t1", "needs b, q, c and p"),
        ("fused_moe/fp8/scout/tp8/b1/q1/c1/p1", "needs t alone"),
        ("chunked_attention/bf16/scout/tp8/local/b1/q2/c1/p1", "no more queries than"),
        ("quantize_per_token/bf16/scout/tp8/t1", "needs fp8"),
    ],
)
def test_a_wrong_name_says_what_it_needs(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        workloads.parse(name)


def test_select_takes_names_patterns_and_ops():
    decode = workloads.select(["fused_moe/fp8/scout/tp8/t?", "grouped_gemm/fp8/scout/tp8/t3"], None, "cpu")
    assert [workload.tokens for workload in decode] == [1, 2, 4, 8, 3]
    assert {workload.op for workload in workloads.select(None, ["moe_down"], "cpu")} == {"moe_down"}
    with pytest.raises(ValueError, match="no workload of the grid matches"):
        workloads.select(["nothing/*"], None, "cpu")
    with pytest.raises(ValueError, match="op is 'moe', needs one of"):
        workloads.select(None, ["moe"], "cpu")


def mask(workload: workloads.Workload) -> torch.Tensor:
    """Which key each query of one request sees, from the definition."""
    query = torch.arange(workload.context - workload.queries, workload.context)[:, None]
    key = torch.arange(workload.context)
    chunk = workload.chunk_size or workload.context
    return (key <= query) & (key // chunk == query // chunk)


@pytest.mark.parametrize("layer", workloads.LAYERS)
@pytest.mark.parametrize(("queries", "context"), [(1, 1), (1, 64), (1, 65), (64, 64), (65, 65), (200, 200), (3, 130), (70, 200)])
def test_attention_work_counts_the_mask(layer, queries, context):
    workload = workloads.parse(f"chunked_attention/bf16/tiny/tp1/{layer}/b3/q{queries}/c{context}/p16")
    seen = mask(workload)
    work = workloads.work(workload)
    assert work.flops == {"bf16": 3 * int(seen.sum()) * 8 * 4 * 64}
    keys, query_rows = 3 * int(seen.any(0).sum()), 3 * queries
    assert work.bytes == keys * 2 * 2 * 64 * 2 + 2 * query_rows * 8 * 64 * 2


@pytest.mark.parametrize("model", ["scout", "maverick"])
@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_moe_work_is_dominated_by_its_weights_and_products(model, tokens):
    """15.73 MB of fp8 weights an expert at TP 8; 2 · 2 · 3 · I · H flops a token."""
    workload = workloads.parse(f"fused_moe/fp8/{model}/tp8/t{tokens}")
    distinct = workloads.expected_experts(workload.experts, tokens)
    work = workloads.work(workload)
    weights, activations = (1 + distinct) * 15_728_640, 2 * 2 * tokens * 5120
    assert weights + activations < work.bytes < 1.01 * weights + activations + 128 * 5120 * 2
    assert work.flops["fp8"] == 2 * 2 * tokens * 3 * 1024 * 5120


def parts(arguments, weights, names):
    """What of an op's arguments is read, and the weights that its rows are multiplied with."""
    taken = [getattr(arguments["weights"], name) for name in weights] if "weights" in arguments else [arguments[name] for name in weights]
    return [*(arguments[name] for name in names), *taken], [linear.weight if isinstance(linear, Linear) else linear for linear in taken]


@pytest.mark.parametrize(
    ("name", "weights", "read"),
    [
        ("quantize_per_token/fp8/tiny/tp1/t5", [], ["x"]),
        *((f"route_top1/{dtype}/tiny/tp1/t5", ["router"], ["x"]) for dtype in workloads.BYTES),
        *((f"grouped_gemm/{dtype}/tiny/tp1/t5", ["b"], ["a"]) for dtype in workloads.BYTES),
        *((f"moe_gate_up/{dtype}/tiny/tp2/t5", ["w13", "shared_w13"], ["x", "routing"]) for dtype in workloads.BYTES),
        *((f"moe_down/{dtype}/tiny/tp2/t5", ["w2", "shared_w2"], ["shared", "routed", "routing"]) for dtype in workloads.BYTES),
        *((f"fused_moe/{dtype}/tiny/tp1/t5", ["router", "w13", "w2", "shared_w13", "shared_w2"], ["x"]) for dtype in workloads.BYTES),
    ],
)
def test_work_is_that_of_the_tensors(name, weights, read):
    """Of inputs that reach every expert: their bytes and those of the result, and two flops a token and element of one expert's weight."""
    workload = workloads.parse(name)
    problem = inputs.make(workload, torch.device("meta"))
    used, multiplied = parts(problem.arguments, weights, read)
    sizes: list[int] = []
    inputs.mapped(lambda tensor: sizes.append(tensor.nbytes), [used, problem.call(**problem.arguments)])
    work = workloads.work(workload, distinct_experts=workload.experts)
    assert work.bytes == sum(sizes)
    assert work.total_flops == sum(2 * workload.tokens * weight.shape[-2] * weight.shape[-1] for weight in multiplied)


@pytest.mark.parametrize("dtype", workloads.BYTES)
@pytest.mark.parametrize("layer", workloads.LAYERS)
def test_work_of_the_attention_part_is_that_of_its_tensors(dtype, layer):
    """With keys that fill pages and chunks, each query's angles where there is RoPE, and what rope_qk_norm alone moves of them."""
    workload = workloads.parse(f"attention_part/{dtype}/tiny/tp1/{layer}/b3/q64/c64/p16")
    arguments = inputs.make(workload, torch.device("meta")).arguments
    caches = [arguments["attention"][name].nbytes for name in ("k_cache", "v_cache")]
    projections = [arguments[name] for name in ("qkv_proj", "o_proj")]
    angles = 4 * workload.head_dim * workload.tokens if layer == "local" else 0
    work, attention = workloads.work(workload), workloads.work(dataclasses.replace(workload, op="chunked_attention"))
    assert work.bytes == 2 * arguments["x"].nbytes + sum(weight.nbytes for weight in projections) + sum(caches) + angles
    assert work.total_flops == 2 * workload.tokens * sum(weight.numel() for weight in projections) + attention.total_flops
    rope = workloads.work(workloads.parse(f"rope_qk_norm/{dtype}/tiny/tp1/{layer}/t{workload.tokens}"))
    qkv, q = (2 * workload.tokens * width for width in (workload.qkv_width, workload.heads * workload.head_dim))
    assert rope.bytes == qkv + q + sum(caches) + angles + 2 * 8 * workload.tokens and not rope.flops


def test_how_many_experts_tokens_reach():
    assert [workloads.expected_experts(4, tokens) for tokens in (1, 2)] == pytest.approx([1, 1.75])


def test_a_layer_needs_what_its_parts_need_alone_but_for_what_one_hands_to_the_other():
    layer = workloads.work(workloads.parse("decoder_layer/fp8/scout/tp8/local/b64/q1/c8192/p64"))
    part = workloads.work(workloads.parse("attention_part/bf16/scout/tp8/local/b64/q1/c8192/p64"))
    moe = workloads.work(workloads.parse("fused_moe/fp8/scout/tp8/t64"))
    assert layer.total_flops == part.total_flops + moe.total_flops
    assert layer.bytes == part.bytes + moe.bytes - 2 * (64 * 5120 * 2)


@pytest.mark.parametrize(
    ("single_us", "footprint", "calls"), [(0.5, 1, 32), (20.0, 1, 25), (499.0, 1, 2), (500.0, 1, 1), (20.0, 3 << 28, 5), (20.0, 1 << 40, 1)]
)
def test_a_replay_has_calls_enough_and_memory_for_them(single_us, footprint, calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 << 30, 80 << 30))
    assert timing.calls_per_replay(single_us, footprint, torch.device("cuda")) == calls
    assert timing.calls_per_replay(single_us, footprint, torch.device("cpu")) == 1


@pytest.mark.parametrize("faster", [True, False])
def test_the_copy_ceiling_is_the_higher_of_a_copy_outside_of_a_graph_and_of_a_kernel(monkeypatch, faster):
    def time_calls(calls, device, rounds, *, graph):
        return timing.summary("wall_clock", False, [100.0 if graph == faster else 200.0]), []

    monkeypatch.setattr(timing, "time_calls", time_calls)
    assert ceilings.copy_gb_s(torch.device("cpu")) == pytest.approx(2 * ceilings.COPY_BYTES["cpu"] / 100 / 1e3)


def test_the_floor_is_the_larger_of_the_two_bounds():
    known = record.Ceilings(4000.0, {"bf16": 800.0, "fp8": 1600.0})
    assert ceilings.floor(workloads.Work(4_000_000, {}), known, 2.0).us == pytest.approx(1.0)
    found = ceilings.floor(workloads.Work(4_000_000, {"fp8": 1_600_000_000, "bf16": 800_000_000}), known, 4.0)
    assert (found.us, found.bound, found.ratio) == (pytest.approx(2.0), "compute", pytest.approx(0.5))
