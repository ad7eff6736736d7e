"""The adapters of peers, on a CPU: each is given a stand-in that computes what the peer's own documentation says it does.

A stand-in reads the arguments as the peer would (layouts, scales, page tables, offsets), so that a wrong one gives a wrong result.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import math
import subprocess
import sys
import types

import pytest
import torch
import torch._dynamo  # now: it does not import beside the stand-in for sdpa_kernel
import torch.nn.functional as F
from torch import Tensor

from llama4_kernels.bench import inputs, peers, timing, workloads
from llama4_kernels.bench.peers import NotInstalled, Unavailable, decode, load, moe, prefill
from llama4_kernels.reference.quantization import E4M3_MAX

CPU = torch.device("cpu")
NAMES = [(op, name) for op in ("grouped_gemm", "fused_moe", "route_top1", "chunked_attention") for name in peers.peers_of(op)]
GEMM = "grouped_gemm/fp8/tiny/tp1/t37"
MOE = "fused_moe/fp8/tiny/tp1/t37"
ROUTING = "route_top1/bf16/tiny/tp1/t37"
ATTENTION = "chunked_attention/bf16/tiny/tp1"
PREFILLS = [f"{ATTENTION}/{layer}/b2/q{n}/c{n}/p16" for layer, n in itertools.product(("local", "full"), (40, 64, 150))]
DECODES = [f"{ATTENTION}/{layer}/b3/q1/c{n}/p16" for layer, n in itertools.product(("local", "full"), (1, 16, 64, 65, 150))]


def problem(name: str) -> inputs.Problem:
    return inputs.make(workloads.parse(name), CPU)


def error(name: str, workload: str) -> float:
    """Of a peer's canonical result; its own bound must hold."""
    given = problem(workload)
    case = peers.build(name, given)
    found = given.error(case.result(case.run()))
    assert found <= peers.peers_of(given.workload.op)[name].bound
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("op", "name"), NAMES)
def test_without_a_gpu_every_peer_says_why_it_is_absent(op, name):
    workload = {"grouped_gemm": GEMM, "fused_moe": MOE, "route_top1": ROUTING, "chunked_attention": DECODES[0]}[op]
    with pytest.raises(NotInstalled, match="needs an NVIDIA GPU|is not installed"):
        peers.build(name, problem(workload))


def test_an_unknown_peer_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="peer is 'cublas', needs one of torch, fbgemm_cutlass"):
        peers.build("cublas", problem(GEMM))


# ---------------------------------------------------------------- stand-ins


@pytest.fixture(autouse=True)
def here(monkeypatch, request):
    """Peers run on the CPU, with stand-ins for other projects' functions, and nothing is compiled."""
    if "absent" in request.node.name:
        return
    monkeypatch.setattr(load, "require_gpu", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda inner: inner))
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    for module in (prefill, decode):
        monkeypatch.setattr(module, "compiled_flex", lambda: (flex_attention, create_block_mask))
    for name in ("fbgemm", "deep_gemm", "sgl_kernel", "sglang", "flash_attn_3", "flash_attn_4", "flashinfer"):
        monkeypatch.setattr(load, name, globals()[f"fake_{name}"])
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "_scaled_mm", fake_scaled_mm)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", fake_scaled_grouped_mm)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")


def rows_times(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """fp8 rows with a scale each, times fp8 channels with a scale each."""
    return ((a.float() * a_scale[:, None]) @ (b.float() * b_scale[:, None]).T).bfloat16()


def grouped(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, sizes: Tensor) -> Tensor:
    parts = zip(a.split(sizes.tolist()), a_scale.split(sizes.tolist()), b, b_scale, strict=True)
    return torch.cat([rows_times(*part) for part in [(x, s, w, t) for x, s, w, t in parts]])


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(1) / E4M3_MAX
    return (x.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).bfloat16()


def fake_scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1]) and b.stride(0) == 1
    return rows_times(a, scale_a[:, 0], b.t(), scale_b[0])


def fake_scaled_grouped_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, offs: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
):
    assert b.stride(1) == 1 and offs.dtype == torch.int32
    return grouped(a, b.transpose(1, 2), scale_a, scale_b, F.pad(offs, (1, 0)).diff())


def fake_fbgemm() -> types.SimpleNamespace:
    def triton_grouped(a, b, sizes, a_scale, b_scale, *, _output_tensor=None, _scatter_add_indices=None, **_):
        n = len(b) // len(sizes)
        out = grouped(a, b.unflatten(0, (-1, n)), a_scale, b_scale.unflatten(0, (-1, n)), sizes)
        return out if _output_tensor is None else _output_tensor.index_add_(0, _scatter_add_indices.long(), out)

    def shuffle(scores):
        ids = scores.argmax(1)
        order = ids.argsort(stable=True)
        return torch.bincount(ids, minlength=scores.shape[1] + 1).int(), ids[order].int()[None], order.int()[None]

    def gather(x, token_ids, expert_ids, scores):
        return quantise_rows((x[token_ids.long()] * scores[token_ids.long(), expert_ids.long()][:, None]).bfloat16())

    ops = types.SimpleNamespace(
        f8f8bf16_rowwise_grouped_stacked=grouped,
        f8f8bf16_rowwise=lambda a, b, a_scale, b_scale: rows_times(a, a_scale, b, b_scale),
        index_shuffling=shuffle,
    )
    return types.SimpleNamespace(
        ops=ops, grouped_gemm_fp8_rowwise=triton_grouped, quantize_fp8_row=quantise_rows, gather_scale_quant=gather,
        silu_mul_quant=lambda gate, up: quantise_rows(silu_mul(gate, up)),
        scatter_add=lambda out, rows, token_ids: out.index_add_(0, token_ids.long(), rows),
    )  # fmt: skip


def fake_deep_gemm() -> types.SimpleNamespace:
    def contiguous(a, b, out, layout):
        (codes, scale), (weight, weight_scale) = a, b
        assert len(layout) % 16 == 0 and (weight_scale == 1).all()
        wide = codes.float() * scale.repeat_interleave(128, 1)
        for row in (layout >= 0).nonzero().flatten().tolist():
            assert layout[row] == layout[row // 16 * 16], "a block of rows belongs to one group"
            out[row] = (wide[row] @ weight[layout[row]].float().T).bfloat16()

    return types.SimpleNamespace(
        m_grouped_fp8_gemm_nt_contiguous=contiguous,
        get_mk_alignment_for_contiguous_layout=lambda: 16,
        get_mn_major_tma_aligned_tensor=lambda t: t,
    )


def fake_sgl_kernel() -> types.SimpleNamespace:
    def multiply(out, a, b, a_scale, b_scale, a_stride, b_stride, d_stride, sizes, starts, workspace):
        assert (b_scale == 1).all() and (a_stride == a.shape[1]).all() and (d_stride == out.shape[1]).all()
        wide = a.float() * a_scale.repeat_interleave(128, 1)
        for group, ((rows, n, k), start) in enumerate(zip(sizes.tolist(), starts.tolist(), strict=True)):
            assert (n, k) == (out.shape[1], a.shape[1])
            out[start : start + rows] = (wide[start : start + rows] @ b[group].float()).bfloat16()

    return types.SimpleNamespace(es_fp8_blockwise_scaled_grouped_mm=multiply)


def fake_sglang() -> types.SimpleNamespace:
    def fused_experts(x, w13, w2, choice, config, *, use_fp8_w8a8, per_channel_quant, w1_scale=None, w2_scale=None):
        weights, ids, _ = choice
        assert config["apply_router_weight_on_input"] and config["no_combine"]
        out = torch.empty(len(x), 1, x.shape[1], dtype=x.dtype)
        for token, expert in enumerate(ids.flatten().tolist()):
            scaled = x[token : token + 1] * weights[token]
            if not use_fp8_w8a8:
                out[token] = silu_mul(*(scaled @ w13[expert].T).chunk(2, 1)) @ w2[expert].T
                continue
            gate_up = rows_times(*quantise_rows(scaled), w13[expert], w1_scale[expert, :, 0])
            out[token] = rows_times(*quantise_rows(silu_mul(*gate_up.chunk(2, 1))), w2[expert], w2_scale[expert, :, 0])
        return out

    def gate(logits, bias, k, *, scoring_func, renormalize):
        best, ids = logits.float().topk(k, 1)
        return best.sigmoid(), ids.int()

    def topk_sigmoid(weights, ids, logits, renormalize):
        best, found = logits.float().topk(1, 1)
        weights.copy_(best.sigmoid())
        ids.copy_(found)

    def decode_attention(q, k, v, out, starts, slots, partial, lse, splits, most, scale, k_scale, v_scale):
        for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
            out[row] = attend(q[row : row + 1], k[slots[start:end]], v[slots[start:end]], scale, causal=False)[0]

    def extend_attention(
        q, k, v, out, k_cache, v_cache, starts, prefix, slots, mask, causal, mask_starts, longest, k_scale, v_scale, *, sm_scale
    ):
        assert (prefix == 0).all() and longest == int(starts.diff().max())
        out.copy_(varlen(q, k, v, starts, sm_scale))

    return types.SimpleNamespace(
        fused_experts=fused_experts, MoeRunnerConfig=dict, fast_topk=lambda values, k, dim: values.topk(k, dim), fused_gate=gate,
        topk_sigmoid=topk_sigmoid, align=lambda ids, block, experts: None, decode_attention=decode_attention, extend_attention=extend_attention,
        num_kv_splits={(1,): lambda *_, **__: None}, scaled_fp8_quant=lambda x, scale, use_per_token_if_dynamic: quantise_rows(x),
        fp8_scaled_mm=lambda a, b, a_scale, b_scale, out_dtype: rows_times(a, a_scale, b.t(), b_scale[:, 0]),
        silu_and_mul=lambda gate_up, out: out.copy_(silu_mul(*gate_up.chunk(2, 1))),
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = True) -> Tensor:
    """q [n, Hq, D], k, v [m, Hkv, D]; with causal the last query sees every key."""
    k, v = (t.float().repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * scale
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).to(q.dtype)


def varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, chunk: int = 0) -> Tensor:
    parts = []
    for start, end in itertools.pairwise(starts.tolist()):
        cuts = range(start, end, chunk or end - start)
        parts += [attend(*(t[cut : min(cut + (chunk or end - start), end)] for t in (q, k, v)), scale) for cut in cuts]
    return torch.cat(parts)


def paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor, scale: float) -> Tensor:
    """One query [B, Hq, D] each over the first `lengths` keys of its pages."""
    out = []
    for row, length in enumerate(lengths.tolist()):
        k, v = (cache[table[row].long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out.append(attend(q[row : row + 1], k, v, scale))
    return torch.cat(out)


def fake_flash_attn_3() -> types.SimpleNamespace:
    def dense(q, k, v, cu_q, cu_k, most_q, most_k, *, softmax_scale, causal, attention_chunk=0):
        assert causal and torch.equal(cu_q, cu_k) and most_q == most_k == int(cu_q.diff().max())
        return varlen(q, k, v, cu_q, softmax_scale, attention_chunk), None

    def cached(q, k_cache, v_cache, *, cache_seqlens, page_table, softmax_scale, causal):
        return paged(q[:, 0], k_cache, v_cache, cache_seqlens, page_table, softmax_scale)[:, None]

    return types.SimpleNamespace(flash_attn_varlen_func=dense, flash_attn_with_kvcache=cached)


def fake_flash_attn_4():
    def run(
        q, k, v, *, cu_seqlens_q, softmax_scale, causal, cu_seqlens_k=None, max_seqlen_q, max_seqlen_k, seqused_k=None, page_table=None
    ):
        if page_table is None:
            return varlen(q, k, v, cu_seqlens_q, softmax_scale), None
        assert max_seqlen_q == 1 and max_seqlen_k == int(seqused_k.max())
        return paged(q, k, v, seqused_k, page_table, softmax_scale), None

    return run


def fake_flashinfer() -> types.SimpleNamespace:
    class Ragged:
        def __init__(self, workspace, layout):
            assert layout == "NHD"

        def plan(self, q_starts, kv_starts, heads, kv_heads, head_dim, *, causal, sm_scale, q_data_type):
            assert causal and torch.equal(q_starts, kv_starts)
            self.planned = q_starts, sm_scale

        def run(self, q, k, v):
            return varlen(q, k, v, *self.planned)

    class Paged:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert layout == "NHD"

        def plan(self, starts, pages, last, heads, kv_heads, head_dim, page, *, sm_scale, q_data_type, kv_data_type):
            table = torch.stack([pages[start:end] for start, end in itertools.pairwise(starts.tolist())])
            self.planned = (starts.diff() - 1) * page + last, table, sm_scale

        def run(self, q, caches):
            return paged(q, *caches, *self.planned)

    return types.SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=Ragged, BatchDecodeWithPagedKVCacheWrapper=Paged)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["torch", "fbgemm_cutlass", "fbgemm_triton", "deep_gemm", "sgl_kernel_es"])
def test_grouped_gemm(name):
    assert error(name, GEMM) < 6e-3


def test_grouped_gemm_of_torch_in_bf16():
    assert error("torch", GEMM.replace("fp8", "bf16")) < 4e-3


@pytest.mark.parametrize("name", ["fbgemm_cutlass", "deep_gemm", "sgl_kernel_es"])
def test_peers_of_fp8_refuse_bf16(name):
    with pytest.raises(Unavailable, match="compared in fp8 only"):
        peers.build(name, problem(GEMM.replace("fp8", "bf16")))


@pytest.mark.parametrize("name", ["torch", "sglang_one_stream", "fbgemm_cutlass", "fbgemm_triton"])
def test_moe_layer(name):
    assert 1e-4 < error(name, MOE) < 5e-2  # not the reference's own arithmetic


def test_tuned_sglang_runs_with_the_fastest_tiles_that_can_be_launched(monkeypatch):
    seen: list[tuple[int, ...]] = []

    @contextlib.contextmanager
    def tiles(config):
        seen.append(tuple(config[name] for name in (*(f"BLOCK_SIZE_{axis}" for axis in "MNK"), "num_warps", "num_stages")))
        if seen[-1] == moe.TILES[0]:
            raise RuntimeError("out of shared memory")
        yield

    def time_calls(calls, device, rounds):
        calls[0]()
        return timing.summary("cuda_graph", True, [1.0 if seen[-1] == moe.TILES[3] else 2.0]), []

    on_streams = moe._sglang  # there is none on a CPU
    monkeypatch.setattr(moe, "_sglang", lambda problem, two_streams: on_streams(problem, two_streams=False))
    monkeypatch.setattr(load, "sglang_tiles", tiles)
    monkeypatch.setattr(timing, "time_calls", time_calls)
    monkeypatch.setattr(moe, "_FASTEST", {})
    assert 1e-4 < error("sglang_tuned", MOE) < 5e-2
    assert set(seen) == set(moe.TILES) and seen[-1] == moe.TILES[3]
    searched = len(seen)
    case = peers.build("sglang_tuned", problem(MOE))
    assert len(seen) == searched and str(moe.TILES[3]) in case.note

    monkeypatch.setattr(moe, "_FASTEST", {})
    monkeypatch.setattr(moe, "TILES", moe.TILES[:1])
    with pytest.raises(Unavailable, match="none of its tiles can be launched: RuntimeError: out of shared memory"):
        peers.build("sglang_tuned", problem(MOE))


@pytest.mark.parametrize("name", ["torch", "sglang_one_stream"])
def test_moe_layer_in_bf16(name):
    assert error(name, MOE.replace("fp8", "bf16")) < 2e-2


@pytest.mark.parametrize("name", ["sglang", "sglang_fused_gate", "sglang_topk_sigmoid", "fbgemm"])
def test_routing(name):
    assert error(name, ROUTING) < 6e-3


@pytest.mark.parametrize("workload", PREFILLS)
@pytest.mark.parametrize(
    "name",
    ["flash_attn_3", "flash_attn_3_chunk", "flash_attn_4", "torch_cudnn", "torch_flash", "torch_flex", "flashinfer", "sglang_triton"],
)
def test_prefill(name, workload):
    assert error(name, workload) < 1e-2


@pytest.mark.parametrize("workload", DECODES)
@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_4", "torch_cudnn", "torch_flex", "flashinfer", "sglang_triton"])
def test_decode(name, workload):
    assert error(name, workload) < 1e-2


def test_what_attention_peers_are_not_compared_in_is_said():
    with pytest.raises(Unavailable, match="bf16 KV cache only"):
        peers.build("flash_attn_3", problem(DECODES[0].replace("bf16", "fp8")))
    with pytest.raises(Unavailable, match="not compared in prefill after a prefix"):
        peers.build("flash_attn_3", problem(f"{ATTENTION}/local/b1/q8/c100/p16"))
    with pytest.raises(Unavailable, match="not compared in decode"):
        peers.build("torch_flash", problem(DECODES[0]))
    with pytest.raises(Unavailable, match="needs chunks of whole pages"):
        peers.build("flash_attn_3", problem(f"{ATTENTION}/local/b1/q1/c100/p48"))


@pytest.mark.skipif(not any(importlib.metadata.distributions(name="sglang")), reason="no sglang")
def test_what_is_used_of_sglang_stands_where_it_is_looked_for():
    """In a process of its own: an import of SGLang leaves much behind."""
    code = """
from llama4_kernels.bench.peers import load
for where in load._SGLANG.values():
    load._from_sglang(*where)
choose = load._from_sglang(*load._SGLANG["optimal_config"])
with load.sglang_tiles({"BLOCK_SIZE_M": 32}):
    assert choose((16, 2048, 5120), (16, 5120, 1024), 1, "fp8_w8a8", 64, per_channel_quant=True) == {"BLOCK_SIZE_M": 32}
assert load.importlib.import_module(f"sglang.{load._TRITON_MOE}").get_config() is None
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
