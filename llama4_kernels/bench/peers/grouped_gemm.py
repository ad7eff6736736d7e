"""Peers of grouped_gemm. The rows are gathered beforehand: what each peer multiplies is sorted by group already."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_kernels.bench.inputs import FP8, Problem
from llama4_kernels.bench.peers import Case, Unavailable, load, peer

# A second rounding, to bf16 before the channels' scales, where a peer cannot apply them itself
TWICE_ROUNDED = 6e-3
GATHERED = "rows gathered beforehand"


@dataclass(frozen=True)
class Inputs:
    """a [M, K] sorted by group, b [E, N, K], offsets [E + 1]; fp8 with a_scale [M] and b_scale [E, N], or bf16 without."""

    a: Tensor
    b: Tensor
    offsets: Tensor
    a_scale: Tensor | None
    b_scale: Tensor | None

    @property
    def group_of_row(self) -> Tensor:
        rows = torch.arange(len(self.a), device=self.a.device)
        return torch.searchsorted(self.offsets[1:].long(), rows, right=True)


def inputs(problem: Problem) -> Inputs:
    a, b, offsets, rows = (problem.arguments[name] for name in ("a", "b", "offsets", "rows"))
    if b.scale is None:
        return Inputs(a[rows], b.weight, offsets, None, None)
    codes = a.codes.view(torch.uint8)[rows].view(FP8)
    return Inputs(codes, b.weight, offsets, a.scale[rows], b.scale)


def fp8_inputs(problem: Problem) -> Inputs:
    found = inputs(problem)
    if found.b_scale is None:
        raise Unavailable("compared in fp8 only")
    return found


def whole(raw: Tensor) -> list[Tensor]:
    return [raw]


@peer("torch", "grouped_gemm", about="torch._scaled_grouped_mm in fp8, torch._grouped_mm in bf16")
def _torch(problem: Problem) -> Case:
    load.require_gpu()
    p = inputs(problem)
    ends, b = p.offsets[1:].contiguous(), p.b.transpose(1, 2)
    if p.a_scale is None:
        return Case(lambda: torch._grouped_mm(p.a, b, offs=ends, out_dtype=torch.bfloat16), whole, GATHERED)

    def run() -> Tensor:
        return torch._scaled_grouped_mm(p.a, b, p.a_scale, p.b_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Case(run, whole, f"{GATHERED}; use_fast_accum=True")


@peer("fbgemm_cutlass", "grouped_gemm", about="FBGEMM f8f8bf16_rowwise_grouped_stacked (CUTLASS)")
def _fbgemm_cutlass(problem: Problem) -> Case:
    multiply, p = load.fbgemm().ops.f8f8bf16_rowwise_grouped_stacked, fp8_inputs(problem)
    sizes = p.offsets.diff().long()
    return Case(lambda: multiply(p.a, p.b, p.a_scale, p.b_scale, sizes), whole, f"{GATHERED}, group sizes too")


@peer("fbgemm_triton", "grouped_gemm", about="FBGEMM grouped_gemm_fp8_rowwise (Triton)")
def _fbgemm_triton(problem: Problem) -> Case:
    multiply, p = load.fbgemm().grouped_gemm_fp8_rowwise, fp8_inputs(problem)
    sizes, b, b_scale = p.offsets.diff().int(), p.b.flatten(0, 1), p.b_scale.flatten()

    def run() -> Tensor:
        return multiply(p.a, b, sizes, p.a_scale, b_scale, use_fast_accum=True, _use_warp_specialization=False)

    return Case(run, whole, f"{GATHERED}, group sizes too; stock Triton, without TMA and warp specialisation, which need Meta's")


@peer("deep_gemm", "grouped_gemm", about="DeepGEMM m_grouped_fp8_gemm_nt_contiguous (128-block scales)", bound=TWICE_ROUNDED)
def _deep_gemm(problem: Problem) -> Case:
    dg, p = load.deep_gemm(), fp8_inputs(problem)
    (m, k), (experts, n, _), device = p.a.shape, p.b.shape, p.a.device
    align = dg.get_mk_alignment_for_contiguous_layout()
    padded = (p.offsets.diff() + align - 1) // align * align
    starts, group = F.pad(padded.cumsum(0), (1, 0)), p.group_of_row
    place = torch.arange(m, device=device) - p.offsets.long()[group] + starts[group]
    total = int(starts[-1])
    layout = torch.full((total,), -1, device=device, dtype=torch.int32)
    layout[place] = group.int()
    a = torch.zeros(total, k, device=device, dtype=FP8)
    a.view(torch.uint8)[place] = p.a.view(torch.uint8)
    a_scale = torch.zeros(total, k // 128, device=device)
    a_scale[place] = p.a_scale[:, None].expand(-1, k // 128)
    a_scale = dg.get_mn_major_tma_aligned_tensor(a_scale)
    # 128 × 128 blocks cannot express a scale per channel: blocks of 1 here, the channels' scales in the result
    b_scale = torch.ones(experts, -(-n // 128), k // 128, device=device)
    out = torch.empty(total, n, device=device, dtype=torch.bfloat16)

    def run() -> Tensor:
        dg.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (p.b, b_scale), out, layout)
        return out

    note = f"{GATHERED} and padded to {align} a group ({m} -> {total}), 128-block scales in TMA layout; channel scales applied after"
    return Case(run, lambda raw: [raw[place].float() * p.b_scale[group]], note)


@peer(
    "sgl_kernel_es", "grouped_gemm", about="sgl_kernel es_fp8_blockwise_scaled_grouped_mm (CUTLASS, 128-block scales)", bound=TWICE_ROUNDED
)
def _sgl_kernel_es(problem: Problem) -> Case:
    multiply, p = load.sgl_kernel().es_fp8_blockwise_scaled_grouped_mm, fp8_inputs(problem)
    (m, k), (experts, n, _), device, group = p.a.shape, p.b.shape, p.a.device, p.group_of_row
    if n % 128 or k % 128:
        raise Unavailable(f"needs N and K in multiples of 128, got N {n}, K {k}")
    sizes = torch.stack([p.offsets.diff(), *(torch.full_like(p.offsets[1:], size) for size in (n, k))], 1).int()
    a_scale = p.a_scale[:, None].expand(-1, k // 128).contiguous()
    b, b_scale = p.b.transpose(1, 2), torch.ones(experts, n // 128, k // 128, device=device).transpose(1, 2)
    out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
    ab_stride, d_stride = (torch.full((experts,), size, device=device, dtype=torch.int64) for size in (k, n))
    workspace, starts = torch.empty(1 << 30, device=device, dtype=torch.uint8), p.offsets[:-1].contiguous()

    def run() -> Tensor:
        multiply(out, p.a, b, a_scale, b_scale, ab_stride, ab_stride, d_stride, sizes, starts, workspace)
        return out

    return Case(
        run, lambda raw: [raw.float() * p.b_scale[group]], f"{GATHERED}, 128-block scales and sizes too; channel scales applied after"
    )


@peer("sglang", "grouped_gemm", about="SGLang's fused_moe_kernel (Triton) with the tiles that SGLang chooses")
def _sglang(problem: Problem) -> Case:
    import triton
    import triton.language as tl

    sg, p = load.sglang(), fp8_inputs(problem)
    (m, k), (experts, n, _) = p.a.shape, p.b.shape
    config = sg.optimal_config((experts, n, k), (experts, k, n // 2), 1, "fp8_w8a8", m, per_channel_quant=True)
    config = {name: value for name, value in config.items() if name != "USE_TMA"}
    sorted_ids, expert_ids, padded = sg.align(p.group_of_row.int()[:, None], config["BLOCK_SIZE_M"], experts)
    out, weights = torch.empty(m, n, device=p.a.device, dtype=torch.bfloat16), torch.ones(m, 1, device=p.a.device)
    a_scale, b_scale = p.a_scale[:, None], p.b_scale[:, :, None]
    grid = (triton.cdiv(sorted_ids.shape[0], config["BLOCK_SIZE_M"]) * triton.cdiv(n, config["BLOCK_SIZE_N"]),)
    tensors = (p.a, None, p.b, None, None, out, a_scale, b_scale, weights, sorted_ids, expert_ids, padded, None)
    sizes = (n, k, sorted_ids.shape[0], m)
    strides = (k, 1, n * k, 1, k, 0, 0, n, 1, 1, 0, n, 0, 1, 0, 0)
    options: dict[str, Any] = {
        "MUL_ROUTED_WEIGHT": False,
        "top_k": 1,
        "compute_type": tl.bfloat16,
        "use_fp8_w8a8": True,
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "per_channel_quant": True,
        "even_Ks": k % config["BLOCK_SIZE_K"] == 0,
        "c_sorted": False,
        "filter_expert": False,
        "swap_ab": sg.should_enable_swap_ab(config["BLOCK_SIZE_M"], config["BLOCK_SIZE_N"]),
        "FUSE_ADD_TO_OUTPUT": False,
        "MASK_OUTPUT": False,
        "LORA_PRESERVE_BASE": False,
        "FUSE_SUM_ALL_REDUCE": False,
        "ROUTER_TOPK": 1,
    }
    options = {name: value for name, value in options.items() if name in sg.fused_moe_kernel.arg_names}  # they differ by release

    def run() -> Tensor:
        sg.fused_moe_kernel[grid](*tensors, *sizes, *strides, **options, **config)
        return out

    version = importlib.metadata.version("sglang")
    return Case(run, whole, f"SGLang {version}; {GATHERED}, alignment and quantisation too; its tiles {config}")
