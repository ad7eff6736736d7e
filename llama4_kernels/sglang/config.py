"""What a Llama 4 config.json says about each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

# Those whose angles do not depend on the length of what is rotated.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")

# Positions beyond the context: SGLang's overlapped schedule runs a request that has reached it a step or more further and drops the result.
ROPE_MARGIN = 256

ARCHITECTURES = ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    chunk_size: tokens of a chunk of local attention, or None for full causal attention.
    use_rope: whether q and k are rotated; layers without RoPE may scale q by temperature instead.
    qk_norm_eps: epsilon of the weightless norm over q and k heads, or None.
    temperature: (attn_scale, floor_scale) of attention temperature tuning, or None.
    is_moe: routed experts and a shared one, or a dense MLP.
    """

    chunk_size: int | None
    use_rope: bool
    qk_norm_eps: float | None
    temperature: tuple[float, int] | None
    is_moe: bool


def layer_config(config: Llama4TextConfig, layer_id: int) -> LayerConfig:
    """The facts of layer `layer_id`, read as transformers' Llama4TextDecoderLayer reads them."""
    is_local = config.layer_types[layer_id] == "chunked_attention" and config.attention_chunk_size is not None
    use_rope = bool(config.no_rope_layers[layer_id])
    return LayerConfig(
        chunk_size=config.attention_chunk_size if is_local else None,
        use_rope=use_rope,
        qk_norm_eps=config.rms_norm_eps if config.use_qk_norm and use_rope else None,
        temperature=(config.attn_scale, config.floor_scale) if config.attn_temperature_tuning and not use_rope else None,
        is_moe=layer_id in config.moe_layers,
    )


def local_and_global_layers(config: Llama4TextConfig) -> tuple[list[int], list[int]]:
    """Layers with chunk-local attention, and layers with full attention."""
    local = [i for i in range(config.num_hidden_layers) if layer_config(config, i).chunk_size is not None]
    return local, [i for i in range(config.num_hidden_layers) if i not in local]


def apply_overrides(config: Llama4TextConfig, overrides: dict[str, Any]) -> None:
    """Derive anew which layers have RoPE, chunks and experts where `overrides`, which SGLang has written into `config`
    (--json-model-override-args), hold another rule for them, and not the layers themselves."""
    layers = {"num_hidden_layers": config.num_hidden_layers}
    if "moe_layers" not in overrides and "interleave_moe_layer_step" in overrides:
        step = config.interleave_moe_layer_step
        if step < 1:
            raise ValueError(f"interleave_moe_layer_step is {step}, needs at least 1; a model without experts has moe_layers []")
        config.moe_layers = Llama4TextConfig(**layers, interleave_moe_layer_step=step).moe_layers
    derived = Llama4TextConfig(
        **layers, no_rope_layers=overrides.get("no_rope_layers"), no_rope_layer_interval=config.no_rope_layer_interval
    )
    for name, rules in (("no_rope_layers", {"no_rope_layer_interval"}), ("layer_types", {"no_rope_layer_interval", "no_rope_layers"})):
        if name not in overrides and rules & overrides.keys():
            setattr(config, name, getattr(derived, name))


def check_supported(config: Llama4TextConfig) -> None:
    """ValueError for what a Llama 4 config can say and no Llama 4 checkpoint uses, or no model can compute."""
    has_experts = any(layer in config.moe_layers for layer in range(config.num_hidden_layers))
    if has_experts and config.num_experts_per_tok != 1:
        raise ValueError(f"llama4_kernels serves Llama 4 with num_experts_per_tok 1, config.json has {config.num_experts_per_tok}")
    if config.attention_bias:
        raise ValueError("llama4_kernels serves Llama 4 without attention_bias, config.json sets it")
    if config.hidden_act != "silu":
        raise ValueError(f"llama4_kernels serves Llama 4 with hidden_act silu, config.json has {config.hidden_act}")
    rope = config.rope_parameters
    for name in ("rope_type", "rope_theta"):
        if name not in rope:
            raise ValueError(f"config.json: rope_parameters is {rope}, needs a {name}")
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"llama4_kernels serves Llama 4 with rope_type {' or '.join(ROPE_TYPES)}, config.json has {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("llama4_kernels serves Llama 4 with RoPE over whole heads, config.json has a partial_rotary_factor")
    if config.attention_chunk_size is not None and config.attention_chunk_size < 1:
        needs = "needs at least 1, or null for full attention"
        raise ValueError(f"config.json: attention_chunk_size is {config.attention_chunk_size}, {needs}")
    for name, is_read in (
        ("num_key_value_heads", True),
        ("floor_scale", config.attn_temperature_tuning),
        ("num_local_experts", has_experts),
    ):
        if is_read and getattr(config, name) < 1:
            raise ValueError(f"config.json: {name} is {getattr(config, name)}, needs at least 1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads is {heads}, needs a multiple of num_key_value_heads, {kv_heads}")
    for name in ("no_rope_layers", "layer_types"):
        if len(getattr(config, name)) < config.num_hidden_layers:
            raise ValueError(f"config.json: {name} has {len(getattr(config, name))} entries for {config.num_hidden_layers} layers")
    unknown = set(config.layer_types) - {"chunked_attention", "full_attention"}
    if unknown:
        raise ValueError(f"config.json: layer_types has {', '.join(sorted(unknown))}, needs chunked_attention or full_attention")


def check_sharding(config: Llama4TextConfig, tp_size: int, attn_tp_size: int) -> None:
    """ValueError where `config` cannot be split: MLPs and experts among `tp_size` ranks, heads among the `attn_tp_size` of them that serve the
    same requests."""
    attention = "--tp-size" if attn_tp_size == tp_size else "--tp-size over --dp-size"
    is_moe = {layer in config.moe_layers for layer in range(config.num_hidden_layers)}
    for flag, ranks, name, is_read in (
        (attention, attn_tp_size, "num_attention_heads", True),
        ("--tp-size", tp_size, "intermediate_size", True in is_moe),
        ("--tp-size", tp_size, "intermediate_size_mlp", False in is_moe),
    ):
        size = getattr(config, name)
        if is_read and size % ranks:
            raise ValueError(f"llama4_kernels serves Llama 4 with a {flag} that divides {name} {size} of config.json, it is {ranks}")
    kv_heads = config.num_key_value_heads
    if kv_heads % attn_tp_size and attn_tp_size % kv_heads:
        needs = f"divides num_key_value_heads {kv_heads} of config.json or is a multiple of it"
        raise ValueError(f"llama4_kernels serves Llama 4 with a {attention} that {needs}, it is {attn_tp_size}")


def rope_positions(context_length: int, draft_steps: int, draft_tokens: int) -> int:
    """Rows that the RoPE table needs, as SGLang reckons them for its own tables.

    context_length: in tokens. draft_steps, draft_tokens: of speculative decoding, 0 without it.
    """
    return context_length + 2 * draft_steps * draft_tokens + ROPE_MARGIN


def cos_sin_cache(config: Llama4TextConfig, positions: int) -> torch.Tensor:
    """[positions, head_dim] float32: head_dim / 2 cosines, then as many sines, of position · inverse frequency, with the config's RoPE
    scaling (llama3 among others) as transformers computes it."""
    rotary = Llama4TextRotaryEmbedding(config)
    inv_freq = rotary.inv_freq.float()
    cache = torch.empty(positions, config.head_dim, dtype=torch.float32)
    for block, rows in zip(torch.arange(positions, dtype=torch.float32).split(65536), cache.split(65536)):
        angles = torch.outer(block, inv_freq)
        torch.cat([angles.cos(), angles.sin()], dim=-1, out=rows)
    return cache.mul_(rotary.attention_scaling)
