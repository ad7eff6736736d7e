"""Weights as SGLang's layers hold them after loading, in the form that the ops take.

SGLang's quantisation methods create the parameters and load and shard the checkpoint into them. What they do next, repacking for
kernels of their own, is replaced here: each method's parameters become one ops.Linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.models.llama import LlamaMLP
from torch import Tensor, nn

from llama4_kernels import ops
from llama4_kernels.ops.types import SCALE_BLOCK, dtype_name

FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float32, FP8)
QUANTISATIONS = ("fp8", "compressed_tensors", "modelopt_fp8")
# SGLang answers a request to update weights with these
REQUANTISED = (
    "llama4_kernels has quantised the weights at load (--quantization fp8) and does not load others into them: start a server anew"
)
REPACKED = "SGLang has repacked FP8 weights outside of the MoE layers for its own kernels, and others cannot be loaded into them: start a server anew"


def adapt_quant_config(quant_config: QuantizationConfig) -> None:
    """Let fp8 checkpoints be served with float32 activations, which the ops take, and be built where there is no GPU to ask for its
    capability: the ops check their own. ValueError for a format whose parameters are not known here."""
    if (name := quant_config.get_name()) not in QUANTISATIONS:
        raise ValueError(f"--model-impl llama4_kernels does not serve Llama 4 quantised as {name}, needs {' or '.join(QUANTISATIONS)}")
    blocks = {}
    for target, scheme in getattr(quant_config, "target_scheme_map", {}).items():
        for part in ("weights", "input_activations"):
            found = scheme[part]
            if found is None or (found.type, found.num_bits) != ("float", 8):
                has = "none" if found is None else f"{found.type} of {found.num_bits} bits"
                raise ValueError(
                    f"--model-impl llama4_kernels does not serve Llama 4 with {part} of {target} quantised as {has}, needs float of 8 bits"
                )
        blocks[f"block_structure of {target}"] = scheme["weights"].block_structure
    blocks["weight_block_size"] = getattr(quant_config, "weight_block_size", None)
    for name, size in blocks.items():
        if size is not None and list(size) != [SCALE_BLOCK, SCALE_BLOCK]:
            raise ValueError(
                f"--model-impl llama4_kernels does not serve Llama 4 with {name} {list(size)}, needs [{SCALE_BLOCK}, {SCALE_BLOCK}]"
            )
    dtypes = [*quant_config.get_supported_act_dtypes(), torch.float32]
    quant_config.get_supported_act_dtypes = lambda: dtypes
    if not torch.cuda.is_available() and hasattr(quant_config, "_check_scheme_supported"):
        quant_config._check_scheme_supported = lambda *args, **kwargs: True


def adapt_text_only(quant_config: QuantizationConfig | None) -> None:
    """Have a text-only checkpoint's modules be left alone also where its list names them as parts of a `language_model`, as a list does
    that was taken from a checkpoint with a vision tower."""
    for attribute in ("ignore", "exclude_modules", "ignored_layers"):
        if names := getattr(quant_config, attribute, None):
            own = [re.sub(r"^((?:re:\^?)?)language_model\\?\.", r"\1", name) for name in names]
            setattr(quant_config, attribute, list(dict.fromkeys([*names, *own])))


def adopt(model: nn.Module) -> None:
    """Have routers, experts, shared experts and, where SGLang's own kernels cannot run, without a GPU and in float32, every fp8 linear layer
    keep their weights as ops.Linear when SGLang has loaded them, and not as SGLang's kernels want them. The fp8 layers that do run SGLang's
    kernels refuse updates where nothing can be loaded into what these want."""
    for name, layer in model.named_modules():
        if isinstance(layer, FusedMoE):
            layer.quant_method.process_weights_after_loading = _keep_experts
        elif isinstance(layer, LinearBase):
            is_read_by_moe = not {"router", "shared_expert"}.isdisjoint(name.split("."))
            is_plain = isinstance(layer.quant_method, UnquantizedLinearMethod)
            runs_theirs = torch.cuda.is_available() and layer.params_dtype != torch.float32
            runs_ours = not (is_plain or runs_theirs)
            if is_read_by_moe or runs_ours:
                layer.quant_method.process_weights_after_loading = _keep_linear
            elif not is_plain:
                layer.quant_method.process_weights_after_loading = _repack_once(layer.quant_method.process_weights_after_loading)
            if runs_ours:
                layer.quant_method.apply = _apply


def moe_is_fp8(model: nn.Module) -> bool:
    """Whether the weights of an MoE layer, its routed experts' or its shared one's, are FP8 when they have been loaded."""
    return any(
        isinstance(layer, (FusedMoE, LinearBase))
        and not {"experts", "shared_expert"}.isdisjoint(name.split("."))
        and not isinstance(layer.quant_method, (UnquantizedLinearMethod, UnquantizedFusedMoEMethod))
        for name, layer in model.named_modules()
    )


def moe_weights(router: LinearBase, experts: FusedMoE, shared_expert: LlamaMLP) -> ops.MoEWeights:
    """The weights of an MoE layer whose parts were adopted and loaded."""
    return ops.MoEWeights(
        router=router.ops_weight.weight,
        w13=experts.ops_w13,
        w2=experts.ops_w2,
        shared_w13=shared_expert.gate_up_proj.ops_weight,
        shared_w2=shared_expert.down_proj.ops_weight,
    )


def _repack_once(process: Callable[[LinearBase], None]) -> Callable[[LinearBase], None]:
    """SGLang's `process`, which may put other parameters in the place of those that weights are loaded into. It would take these for a
    checkpoint's the next time, so there is none."""

    def process_once(layer: LinearBase) -> None:
        if getattr(layer, "_derived_weight_cache_error", None):
            return
        is_quantised_at_load = _is_quantised_at_load(layer, layer.weight.data)
        loaded = dict(layer.named_parameters(recurse=False))
        process(layer)
        if any(getattr(layer, name, None) is not parameter for name, parameter in loaded.items()):
            layer._derived_weight_cache_error = REQUANTISED if is_quantised_at_load else REPACKED

    return process_once


def _keep_linear(layer: LinearBase) -> None:
    """Set layer.ops_weight. An fp8 weight's scale, float32: one for each of the layer's logical widths, [N, 1] per output channel, or
    [ceil(N / 128), ceil(K / 128)] per block."""
    if getattr(layer, "_derived_weight_cache_error", None):
        return
    weight = layer.weight.data
    scale = _parameter(layer, "weight_scale", "weight_scale_inv")
    if _is_quantised_at_load(layer, weight):
        quantized = ops.quantize_per_token(weight)
        layer.weight = nn.Parameter(quantized.codes, requires_grad=False)
        layer._derived_weight_cache_error = REQUANTISED
        _keep(layer, "ops_weight", ops.Linear(quantized.codes, quantized.scale))
    elif weight.dtype == FP8:
        if scale.dim() == 1 and scale.numel() == len(layer.logical_widths):
            scale = scale.repeat_interleave(torch.tensor(layer.logical_widths, device=scale.device))
        elif _is_per_channel(scale, weight):
            scale = scale.squeeze(-1)
        _keep(layer, "ops_weight", ops.Linear(weight, scale.contiguous(), _static_scale(layer, "input_scale")))
    else:
        _keep(layer, "ops_weight", ops.Linear(weight))


def _keep_experts(layer: FusedMoE) -> None:
    """Set layer.ops_w13 and layer.ops_w2. fp8 weights' scales, float32: per tensor [E, 2] of w13, for gate and up, and [E] of w2,
    [E, N, 1] per output channel, or [E, ceil(N / 128), ceil(K / 128)] per block."""
    if getattr(layer, "_derived_weight_cache_error", None):
        return
    for name in ("w13", "w2"):
        weight = getattr(layer, f"{name}_weight").data
        scale = _parameter(layer, f"{name}_weight_scale", f"{name}_weight_scale_inv")
        if _is_quantised_at_load(layer, weight):
            codes = torch.empty_like(weight, dtype=FP8)
            scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
            for expert in range(weight.shape[0]):
                quantized = ops.quantize_per_token(weight[expert])
                codes[expert], scale[expert] = quantized.codes, quantized.scale
            setattr(layer, f"{name}_weight", nn.Parameter(codes, requires_grad=False))
            layer._derived_weight_cache_error = REQUANTISED
            linear = ops.Linear(codes, scale)
        elif weight.dtype == FP8:
            if name == "w13" and scale.dim() == 2 and scale.shape[1] == 2:
                scale = scale.repeat_interleave(weight.shape[1] // 2, 1)
            elif _is_per_channel(scale, weight):
                scale = scale.squeeze(-1)
            linear = ops.Linear(weight, scale.contiguous(), _static_scale(layer, f"{name}_input_scale"))
        else:
            linear = ops.Linear(weight)
        _keep(layer, f"ops_{name}", linear)


def _keep(layer: nn.Module, name: str, linear: ops.Linear) -> None:
    """Set layer.name. Weights that are loaded again are written where the first ones are, which CUDA graphs have recorded."""
    kept = getattr(layer, name, None)
    if kept is None:
        setattr(layer, name, linear)
        return
    for old, new in ((kept.weight, linear.weight), (kept.scale, linear.scale), (kept.input_scale, linear.input_scale)):
        if old is not None and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _apply(layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ through ops.grouped_gemm, as one group."""
    linear = layer.ops_weight
    rows = x.flatten(0, -2).contiguous()
    offsets = torch.arange(2, dtype=torch.int32, device=x.device) * rows.shape[0]
    stacked = ops.Linear(linear.weight[None], linear.scale[None], linear.input_scale)
    out = ops.grouped_gemm(rows, stacked, offsets, out_dtype=x.dtype).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _is_quantised_at_load(layer: nn.Module, weight: Tensor) -> bool:
    """Whether the server was started with --quantization fp8 on a checkpoint that is not fp8; TypeError for formats not supported."""
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"llama4_kernels serves bf16, fp32 and fp8 weights, these are {dtype_name(weight.dtype)}, needs --dtype bfloat16 or float32"
        )
    config = getattr(layer.quant_method, "quant_config", None)
    return weight.dtype != FP8 and config is not None


def _parameter(layer: nn.Module, *names: str) -> Tensor | None:
    found = [getattr(layer, name).data for name in names if getattr(layer, name, None) is not None]
    return found[0] if found else None


def _static_scale(layer: nn.Module, name: str) -> Tensor | None:
    """One activation scale for all shards and experts: the largest, as SGLang takes it."""
    scale = _parameter(layer, name)
    return None if scale is None else scale.max()


def _is_per_channel(scale: Tensor, weight: Tensor) -> bool:
    """Whether scale is [.., N, 1] of a weight [.., N, K]; per block it is [.., ceil(N / 128), ceil(K / 128)]."""
    return scale.shape == (*weight.shape[:-1], 1)
