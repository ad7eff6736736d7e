"""Tiny random Llama 4 checkpoints in the layouts of the real ones, with a byte-level tokenizer; nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama4_kernels.cli.checkpoint_files import BLOCK, E4M3_MAX, EXPERTS, empty_folder, save_weights, scaled, write_json

CHUNK = 64
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)
BYTES = 256
VOCABULARY = 320
IMAGE_SIZE = 56
PATCH_SIZE = 14
PIXEL_SHUFFLE = 0.5

Like = Literal["scout", "maverick"]
Form = Literal["compressed-tensors-experts", "compressed-tensors", "redhat", "modelopt", "block"]

SHARED = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "attention_chunk_size": CHUNK,
    "num_experts_per_tok": 1,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": CHUNK,
    "tie_word_embeddings": False,
    "model_type": "llama4_text",
}
TEXT: dict[str, dict[str, Any]] = {
    "scout": SHARED
    | {
        "intermediate_size": 256,
        "intermediate_size_mlp": 512,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CHUNK,
        },
    },
    "maverick": SHARED
    | {
        "intermediate_size": 128,
        "intermediate_size_mlp": 512,
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "rope_scaling": None,
    },
}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "intermediate_size": 256,
    "vision_output_dim": 64,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "pixel_shuffle_ratio": PIXEL_SHUFFLE,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "model_type": "llama4_vision_model",
}

# The standard deviation of a weight is gain / sqrt(inputs). The gains keep attention, routing and logits far from uniform.
GAINS = {
    "embed_tokens.weight": 16.0,  # a lookup: 16 / sqrt(256) gives rows of unit size
    "q_proj.weight": 1.5,
    "k_proj.weight": 1.5,
    "router.weight": 2.0,
    "lm_head.weight": 2.5,
}

SHARED_EXPERT = r"feed_forward\.shared_expert\.\w+_proj\.weight$"
DENSE = r"feed_forward\.(gate|up|down)_proj\.weight$"
ATTENTION = r"(?<!vision_model)\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight$"

VISION_PARTS = ("vision_model", "multi_modal_projector")

# Projections that run as one GEMM
FUSED_GROUPS = (
    (".q_proj.weight", ".k_proj.weight", ".v_proj.weight"),
    (".gate_proj.weight", ".up_proj.weight"),
)

# Static activation scales of the ModelOpt form: the largest activation of the tiny models, by a margin, over 448.
INPUT_AMAX = {"hidden": 8.0, "intermediate": 32.0}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m['role'] }}<|header_end|>\n\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<|image|>{% endif %}{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def make(
    path: str | Path,
    like: Like = "scout",
    *,
    fp8: Form | None = None,
    fp8_attention: bool = False,
    vision: bool = False,
    text_only: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    **text_config: Any,
) -> Path:
    """Write a checkpoint of a few layers to the new or empty folder `path` and return it; the same arguments give the same bytes.

    like: "scout" (MoE in every layer, 16 experts, qk-norm, llama3 RoPE scaling) or "maverick" (MoE in every second layer, 128 experts,
        no qk-norm, no RoPE scaling). Every fourth layer has no RoPE and attends to everything.
    fp8: None, or the layout of an FP8 checkpoint
        "compressed-tensors-experts"  Meta's Maverick-FP8: routed experts only; one scale per output channel, activations per token
        "compressed-tensors"          the same with the shared experts and dense MLPs quantised too
        "redhat"                      the same modules as "compressed-tensors", with the ignored ones given as regular expressions,
                                      of the names in a checkpoint with a vision tower, also where text_only
        "modelopt"                    NVIDIA's: fused experts, one scale per tensor, static activation scales, hf_quant_config.json; the KV
                                      cache is left as it is
        "block"                       the modules of "compressed-tensors" with one scale per block of 128x128, `weight_scale_inv`, as
                                      DeepSeek stores it
    fp8_attention: also quantise the attention projections.
    vision: with vision tower, projector and processor, saved in shards with an index (SGLang looks for vision weights there).
    text_only: a Llama4ForCausalLM checkpoint, whose config.json is the text config alone.
    dtype: of everything that is not fp8: "float32" or "bfloat16".
    text_config: keys of the text config to set otherwise, such as num_hidden_layers=8 or attention_chunk_size=None.
    """
    if text_only and vision:
        raise ValueError("text_only and vision exclude each other")
    path = empty_folder(path)
    config = _config(TEXT[like] | text_config, text_only) | {"torch_dtype": dtype}
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in _weights(config, vision, seed).items()}
    if fp8:
        tensors = _quantise(tensors, config, path, fp8, fp8_attention)
    write_json(path / "config.json", config)
    save_weights(path, tensors, shards=3 if vision else 1)
    _save_tokenizer(path, vision)
    return path


def _config(text: dict[str, Any], text_only: bool) -> dict[str, Any]:
    tokens = {token: BYTES + i for i, token in enumerate(SPECIAL_TOKENS)}
    special = {
        "bos_token_id": tokens["<|begin_of_text|>"],
        "eos_token_id": [tokens["<|end_of_text|>"], tokens["<|eot|>"]],
        "pad_token_id": tokens["<|end_of_text|>"],
    }
    text = text | special
    if text_only:
        return text | {"architectures": ["Llama4ForCausalLM"]}
    return special | {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": VISION,
        "boi_token_index": tokens["<|image_start|>"],
        "eoi_token_index": tokens["<|image_end|>"],
        "image_token_index": tokens["<|patch|>"],
        "tie_word_embeddings": False,
    }


def _weights(config: dict[str, Any], vision: bool, seed: int) -> dict[str, Tensor]:
    """Random float32 weights under the names and shapes that transformers gives an unquantised checkpoint."""
    import transformers
    from transformers import Llama4Config, Llama4TextConfig

    kind = Llama4Config if "text_config" in config else Llama4TextConfig
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(kind(**config))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random(name, tuple(tensor.shape), generator)
        for name, tensor in model.state_dict().items()
        if vision or not name.startswith(VISION_PARTS)
    }


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise
    inputs = shape[-2] if ".experts." in name else shape[-1]
    gain = next((gain for suffix, gain in GAINS.items() if name.endswith(suffix)), 1.0)
    return noise * gain / inputs**0.5


def _quantise(tensors: dict[str, Tensor], config: dict[str, Any], path: Path, form: Form, attention: bool) -> dict[str, Tensor]:
    """The tensors as an FP8 checkpoint stores them; its description goes to `config`, or for ModelOpt to a file of its own."""
    patterns = [EXPERTS]
    if form != "compressed-tensors-experts":
        patterns += [SHARED_EXPERT, DENSE]
    if attention:
        patterns.append(ATTENTION)
    chosen = [name for name in tensors if any(re.search(pattern, name) for pattern in patterns)]
    if form == "modelopt":
        linears = _linear_modules(tensors, chosen)
        named = {re.sub(r"\.[qkvo]_proj$", "*", _without_language_model(name)) for name in linears if not name.startswith(VISION_PARTS)}
        excluded = sorted(named | {f"model.layers.{part}*" for part in VISION_PARTS if any(name.startswith(part) for name in linears)})
        write_json(
            path / "hf_quant_config.json",
            {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": excluded},
            },
        )
        return _quantise_modelopt(tensors, chosen)
    if form == "block":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": _linear_modules(tensors, chosen),
        }
        return _quantise_linears(tensors, chosen, _per_block, "weight_scale_inv")
    if form == "redhat":
        ignore = ["re:.*lm_head", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]
        ignore += [] if attention else [r"re:language_model\.model\.layers\.\d+\.self_attn\..*"]
    else:
        ignore = _linear_modules(tensors, chosen)
    config["quantization_config"] = _compressed_tensors_config(ignore)
    return _quantise_linears(tensors, chosen, _per_channel, "weight_scale")


def _linear_modules(tensors: dict[str, Tensor], quantised: list[str]) -> list[str]:
    """The linear modules that stay unquantised."""
    not_linear = ("embed_tokens.weight", "class_embedding", "positional_embedding_vlm")
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and name not in quantised and not name.endswith(not_linear)
    ]


def _compressed_tensors_config(ignore: list[str]) -> dict[str, Any]:
    def floats(strategy: str, dynamic: bool) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": strategy,
            "dynamic": dynamic,
            "group_size": None,
            "block_structure": None,
            "actorder": None,
            "observer": None if dynamic else "minmax",
            "observer_kwargs": {},
        }

    group = {
        "targets": ["Linear"],
        "weights": floats("channel", dynamic=False),
        "input_activations": floats("token", dynamic=True),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def _per_channel(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and a bfloat16 scale per output channel [N, 1]."""
    scale = (matrix.float().abs().amax(1, keepdim=True) / E4M3_MAX).bfloat16()
    return _encode(matrix, scale), scale


def _per_block(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and a float32 scale per block [ceil(N / 128), ceil(K / 128)]."""
    rows = [torch.stack([block.float().abs().amax() for block in row.split(BLOCK, 1)]) for row in matrix.split(BLOCK)]
    scale = torch.stack(rows) / E4M3_MAX
    return _encode(matrix, scaled(torch.ones_like(matrix), scale, "scale")), scale


def _quantise_linears(
    tensors: dict[str, Tensor], chosen: list[str], quantise: Callable[[Tensor], tuple[Tensor, Tensor]], scale_name: str
) -> dict[str, Tensor]:
    """Every expert by its own name, [N, K] as nn.Linear holds it, with its scale beside it."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in chosen:
            stored[name] = tensor
            continue
        prefix, projection = name.removesuffix(".weight").rsplit(".", 1)
        if tensor.dim() == 2:
            matrices = {f"{prefix}.{projection}": tensor}
        elif projection == "gate_up_proj":
            halves = {"gate_proj": 0, "up_proj": 1}
            matrices = {f"{prefix}.{e}.{half}": w.T.chunk(2)[i] for e, w in enumerate(tensor) for half, i in halves.items()}
        else:
            matrices = {f"{prefix}.{e}.{projection}": w.T for e, w in enumerate(tensor)}
        for module, matrix in matrices.items():
            stored[f"{module}.weight"], stored[f"{module}.{scale_name}"] = quantise(matrix)
    return stored


def _quantise_modelopt(tensors: dict[str, Tensor], chosen: list[str]) -> dict[str, Tensor]:
    """Fused experts with scalar scales beside them, names without the `language_model.` prefix.

    Projections that run as one GEMM share a scale, as ModelOpt exports them.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored_name = _without_language_model(name)
        if name not in chosen:
            stored[stored_name] = tensor
            continue
        group = next((group for group in FUSED_GROUPS if name.endswith(group)), (name,))
        own = next(suffix for suffix in group if name.endswith(suffix))
        together = [tensors[name.removesuffix(own) + suffix] for suffix in group]
        scale = torch.stack([t.float().abs().amax() for t in together]).amax() / E4M3_MAX
        amax = INPUT_AMAX["intermediate" if "down_proj" in name else "hidden"]
        stored[stored_name] = _encode(tensor, scale)
        suffix = ("_weight_scale", "_input_scale") if tensor.dim() == 3 else ("_scale", ".input_scale")
        stored[f"{stored_name}{suffix[0]}"] = scale
        stored[f"{stored_name.removesuffix('.weight')}{suffix[1]}"] = torch.tensor(amax / E4M3_MAX)
    return stored


def _encode(matrix: Tensor, scale: Tensor) -> Tensor:
    return (matrix.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _without_language_model(name: str) -> str:
    return name.removeprefix("language_model.")


def _save_tokenizer(path: Path, vision: bool) -> None:
    """One token per byte, then the special tokens, then reserved ones up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(VOCABULARY - BYTES - len(SPECIAL_TOKENS))]
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *reserved])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|end_of_text|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(path)
    if vision:
        from transformers import Llama4ImageProcessor, Llama4Processor

        images = Llama4ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, max_patches=4)
        Llama4Processor(
            image_processor=images, tokenizer=fast, patch_size=PATCH_SIZE, pixel_shuffle_ratio=PIXEL_SHUFFLE, chat_template=CHAT_TEMPLATE
        ).save_pretrained(path)
        images.save_pretrained(path)
