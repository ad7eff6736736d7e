"""Peers of fused_moe: the whole MoE layer, router to sum, without the all-reduce."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_kernels.bench import timing
from llama4_kernels.bench.inputs import FP8, Problem
from llama4_kernels.bench.peers import Case, Unavailable, load, peer
from llama4_kernels.bench.peers.grouped_gemm import whole
from llama4_kernels.bench.workloads import Workload
from llama4_kernels.ops import Linear, MoEWeights
from llama4_kernels.reference.quantization import E4M3_MAX

# They round s · x and h to bf16 and quantise h with one scale per token: that differs from the reference by more than rounding once
BOUND = 5e-2


@functools.cache
def llama4_routing(fast_topk: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What SGLang's Llama 4 compiles as its routing function: logits [T, E] -> top-1 scores [T, 1] and int32 ids [T, 1]."""

    @torch.compile(dynamic=True)
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = fast_topk(logits, 1, -1)
        return torch.sigmoid(scores.float()).to(logits.dtype), ids.to(torch.int32)

    return route


def _sglang(problem: Problem, two_streams: bool) -> Case:
    sg = load.sglang()
    x, w = problem.arguments["x"], problem.arguments["weights"]
    fp8, experts, route = w.w13.scale is not None, len(w.router), llama4_routing(sg.fast_topk)
    # no_combine with top-1 writes the result as the server's in-place call does, but leaves x as it is, so that the call can be repeated
    config = sg.MoeRunnerConfig(
        num_experts=experts, num_local_experts=experts, top_k=1, apply_router_weight_on_input=True, inplace=False, no_combine=True
    )
    scales = {"w1_scale": w.w13.scale[:, :, None].contiguous(), "w2_scale": w.w2.scale[:, :, None].contiguous()} if fp8 else {}
    other = torch.cuda.Stream() if two_streams else None

    def linear(values: Tensor, weight: Linear) -> Tensor:
        if not fp8:
            return F.linear(values, weight.weight)
        codes, scale = sg.scaled_fp8_quant(values, None, use_per_token_if_dynamic=True)
        return sg.fp8_scaled_mm(codes, weight.weight.t(), scale, weight.scale[:, None], out_dtype=torch.bfloat16)

    def shared() -> Tensor:
        gate_up = linear(x, w.shared_w13)
        hidden = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        sg.silu_and_mul(gate_up, hidden)
        return linear(hidden, w.shared_w2)

    def routed() -> Tensor:
        logits = F.linear(x, w.router)
        weights, ids = route(logits)
        choice = (weights, ids, logits)
        out = sg.fused_experts(x, w.w13.weight, w.w2.weight, choice, config, use_fp8_w8a8=fp8, per_channel_quant=fp8, **scales)
        return out.view_as(x)

    def run() -> Tensor:
        if not two_streams:
            shared_out = shared()
            return routed() + shared_out
        main = torch.cuda.current_stream()
        other.wait_stream(main)
        shared_out = shared()
        with torch.cuda.stream(other):
            routed_out = routed()
        main.wait_stream(other)
        return routed_out + shared_out

    version = importlib.metadata.version("sglang")
    return Case(run, whole, f"SGLang {version}, written out after its Llama 4 MoE from its own functions; its own choice of tiles")


@peer("sglang", "fused_moe", about="SGLang's Llama 4 MoE, the routed experts on a second stream", bound=BOUND)
def _sglang_two_streams(problem: Problem) -> Case:
    return _sglang(problem, two_streams=True)


@peer("sglang_one_stream", "fused_moe", about="SGLang's Llama 4 MoE on one stream", bound=BOUND)
def _sglang_one_stream(problem: Problem) -> Case:
    return _sglang(problem, two_streams=False)


# Of the space that SGLang's own tuner searches, the corners that fp8 weights on Hopper are likely to want: M, N, K, warps, stages
TILES = (
    (16, 64, 128, 4, 5),
    (16, 128, 128, 4, 4),
    (16, 128, 256, 8, 3),
    (32, 128, 128, 4, 4),
    (64, 128, 128, 4, 4),
    (64, 256, 128, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 256, 128, 8, 3),
)
TILE_ROUNDS = 5
_FASTEST: dict[Workload, tuple[int, ...]] = {}


@peer("sglang_tuned", "fused_moe", about="SGLang's Llama 4 MoE with the fastest of a few tiles, for each workload", bound=BOUND)
def _sglang_tuned(problem: Problem) -> Case:
    case, device = _sglang(problem, two_streams=True), problem.arguments["x"].device

    def with_tiles(tiles: tuple[int, ...]) -> Callable[[], Tensor]:
        m, n, k, warps, stages = tiles
        blocks = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": 1 if m < 64 else 16}

        def run() -> Tensor:
            with load.sglang_tiles({**blocks, "num_warps": warps, "num_stages": stages}):
                return case.run()

        return run

    if problem.workload not in _FASTEST:
        times: dict[tuple[int, ...], float] = {}
        refused = ""
        for tiles in TILES:
            run = with_tiles(tiles)
            try:
                run()
                times[tiles] = timing.time_calls([run], device, TILE_ROUNDS)[0].median_us
            except Exception as error:  # tiles may not fit this GPU
                refused = timing.one_line(error)
        if not times:
            raise Unavailable(f"none of its tiles can be launched: {refused}")
        _FASTEST[problem.workload] = min(times, key=times.__getitem__)
    tiles = _FASTEST[problem.workload]
    return Case(with_tiles(tiles), case.result, f"{case.note} replaced by the fastest of {len(TILES)}: M, N, K, warps, stages {tiles}")


def _fbgemm(problem: Problem, cutlass: bool) -> Case:
    """MetaShuffling's sequence of operators, without communication."""
    fb = load.fbgemm()
    x, w = problem.arguments["x"], problem.arguments["weights"]
    if w.w13.scale is None:
        raise Unavailable("compared in fp8 only")
    experts, two_inner, _ = w.w13.weight.shape
    routed_experts = _cutlass_experts(fb, w) if cutlass else _triton_experts(fb, w)

    def run() -> Tensor:
        codes, scale = fb.quantize_fp8_row(x)
        gate_up = fb.ops.f8f8bf16_rowwise(codes, w.shared_w13.weight, scale, w.shared_w13.scale)
        codes, scale = fb.silu_mul_quant(gate_up[:, : two_inner // 2], gate_up[:, two_inner // 2 :])
        out = fb.ops.f8f8bf16_rowwise(codes, w.shared_w2.weight, scale, w.shared_w2.scale)
        scores = torch.sigmoid(F.linear(x, w.router))
        counts, expert_ids, token_ids = fb.ops.index_shuffling(scores)
        token_ids = token_ids.flatten()
        rows, scale = fb.gather_scale_quant(x, token_ids, expert_ids.flatten(), scores)
        return routed_experts(out, rows, scale.flatten(), counts[:experts], token_ids)

    return Case(run, whole, "MetaShuffling's operators without communication; not deterministic (atomics)")


Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _cutlass_experts(fb: object, w: MoEWeights) -> Experts:
    inner = w.w2.weight.shape[2]

    def run(out: Tensor, rows: Tensor, scale: Tensor, counts: Tensor, token_ids: Tensor) -> Tensor:
        sizes = counts.long()
        gate_up = fb.ops.f8f8bf16_rowwise_grouped_stacked(rows, w.w13.weight, scale, w.w13.scale, sizes)
        codes, scale = fb.silu_mul_quant(gate_up[:, :inner], gate_up[:, inner:])
        down = fb.ops.f8f8bf16_rowwise_grouped_stacked(codes, w.w2.weight, scale.flatten(), w.w2.scale, sizes)
        fb.scatter_add(out, down, token_ids)
        return out

    return run


def _triton_experts(fb: object, w: MoEWeights) -> Experts:
    inner = w.w2.weight.shape[2]
    w13, w2 = (linear.weight.flatten(0, 1) for linear in (w.w13, w.w2))
    w13_scale, w2_scale = (linear.scale.flatten() for linear in (w.w13, w.w2))

    def run(out: Tensor, rows: Tensor, scale: Tensor, counts: Tensor, token_ids: Tensor) -> Tensor:
        gate_up = fb.grouped_gemm_fp8_rowwise(rows, w13, counts, scale, w13_scale, _use_warp_specialization=False)
        codes, scale = fb.silu_mul_quant(gate_up[:, :inner], gate_up[:, inner:])
        target = {"_output_tensor": out, "_scatter_add_indices": token_ids, "_use_warp_specialization": False}
        return fb.grouped_gemm_fp8_rowwise(codes, w2, counts, scale.flatten(), w2_scale, **target)

    return run


@peer("fbgemm_cutlass", "fused_moe", about="MetaShuffling with FBGEMM's CUTLASS grouped GEMM", bound=BOUND)
def _fbgemm_cutlass(problem: Problem) -> Case:
    return _fbgemm(problem, cutlass=True)


@peer("fbgemm_triton", "fused_moe", about="MetaShuffling with FBGEMM's Triton grouped GEMM", bound=BOUND)
def _fbgemm_triton(problem: Problem) -> Case:
    return _fbgemm(problem, cutlass=False)


def _torch_moe(x: Tensor, w: MoEWeights) -> Tensor:
    """The layer out of torch's own products, for torch.compile to fuse what lies between them."""
    best, ids = F.linear(x, w.router).max(1)
    sorted_ids, order = ids.sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(len(w.router), device=x.device), right=True).int()
    rows = (x * best.float().sigmoid().to(x.dtype)[:, None])[order]
    out = _torch_linear(_silu_mul(_torch_linear(x, w.shared_w13)), w.shared_w2)
    routed = _torch_grouped(_silu_mul(_torch_grouped(rows, w.w13, ends)), w.w2, ends)
    return out.index_add(0, order, routed)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, 1)
    return (F.silu(gate) * up).bfloat16()


def _torch_quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = (values.float().abs().amax(1) / E4M3_MAX).clamp(min=1e-12)
    return (values.float() / scale[:, None]).to(FP8), scale


def _torch_linear(values: Tensor, weight: Linear) -> Tensor:
    if weight.scale is None:
        return F.linear(values, weight.weight)
    codes, scale = _torch_quantised(values)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(codes, weight.weight.t(), scale_a=scale[:, None], scale_b=weight.scale[None], **options)


def _torch_grouped(rows: Tensor, weight: Linear, ends: Tensor) -> Tensor:
    if weight.scale is None:
        return torch._grouped_mm(rows, weight.weight.transpose(1, 2), offs=ends, out_dtype=torch.bfloat16)
    codes, scale = _torch_quantised(rows)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_grouped_mm(codes, weight.weight.transpose(1, 2), scale, weight.scale, offs=ends, **options)


@functools.cache
def _compiled_torch_moe() -> Callable[[Tensor, MoEWeights], Tensor]:
    return load.compiled(_torch_moe)


@peer(
    "torch", "fused_moe", about="torch._scaled_grouped_mm and _scaled_mm (bf16: _grouped_mm), the rest through torch.compile", bound=BOUND
)
def _torch(problem: Problem) -> Case:
    load.require_gpu()
    run = functools.partial(_compiled_torch_moe(), problem.arguments["x"], problem.arguments["weights"])
    return Case(run, whole, "use_fast_accum=True")
