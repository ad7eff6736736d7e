"""What a Llama 4 config.json says about each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

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


def check_supported(config: Llama4TextConfig) -> None:
    """ValueError for what a Llama 4 config can say and no Llama 4 checkpoint uses."""
    if config.num_experts_per_tok != 1:
        raise ValueError(f"llama4_kernels serves Llama 4 with num_experts_per_tok 1, config.json has {config.num_experts_per_tok}")
    if config.attention_bias:
        raise ValueError("llama4_kernels serves Llama 4 without attention_bias, config.json sets it")
    for name in ("no_rope_layers", "layer_types"):
        if len(getattr(config, name)) < config.num_hidden_layers:
            raise ValueError(f"config.json: {name} has {len(getattr(config, name))} entries for {config.num_hidden_layers} layers")
    unknown = set(config.layer_types) - {"chunked_attention", "full_attention"}
    if unknown:
        raise ValueError(f"config.json: layer_types has {', '.join(sorted(unknown))}, needs chunked_attention or full_attention")


def check_sharding(config: Llama4TextConfig, tp_size: int) -> None:
    """ValueError where `config` cannot be split among `tp_size` ranks."""
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "intermediate_size", "intermediate_size_mlp")}
    for name, size in sizes.items():
        if size % tp_size:
            raise ValueError(f"llama4_kernels serves Llama 4 with a --tp-size that divides {name} {size} of config.json, it is {tp_size}")
    kv_heads = config.num_key_value_heads
    if kv_heads % tp_size and tp_size % kv_heads:
        needs = f"divides num_key_value_heads {kv_heads} of config.json or is a multiple of it"
        raise ValueError(f"llama4_kernels serves Llama 4 with a --tp-size that {needs}, it is {tp_size}")


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
