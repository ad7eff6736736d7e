"""Checks a Llama 4 checkpoint while SGLang loads it: every tensor there, whole, and of the shape that config.json implies."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import Llama4Config, Llama4TextConfig

_LAYER_TENSOR = re.compile(r"(?:language_model\.)?model\.(layers\.\d+\..*|embed_tokens\.weight|norm\.weight)$|(?:language_model\.)?(lm_head\.weight)$")
_KV_SCALE = re.compile(r"\.self_attn\.(?:[kv]_proj\.)?([kv])_scale$")
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the tensor."""


class CheckedWeights:
    """Iterates over (name, tensor) of a checkpoint and raises CheckpointError for what does not fit `config`.

    current: the name given last, for errors of whoever loads it.
    complete: whether a tensor that never came is an error.
    has_kv_scales: whether the model has a place for KV-cache scales; without one they are left out.
    """

    def __init__(
        self, weights: Iterable[tuple[str, Tensor]], config: Llama4Config | Llama4TextConfig, *, complete: bool, has_kv_scales: bool
    ):
        self.current = ""
        self._weights = weights
        self._path = getattr(config, "_name_or_path", "")
        self._shapes = expected_shapes(config.get_text_config())
        self._is_tied = config.get_text_config().tie_word_embeddings
        self._complete = complete
        self._has_kv_scales = has_kv_scales

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        missing = set(self._shapes)
        scales: set[str] = set()
        fp8: set[str] = set()
        tied: dict[str, Tensor] = {}
        for name, tensor in self._read():
            self.current = name
            if _KV_SCALE.search(name):
                if self._has_kv_scales:
                    yield _KV_SCALE.sub(r".self_attn.attn.\1_scale", name), tensor
                continue
            if "scale" in name:
                scales.add(re.sub(r"[._]weight_scale(_inv)?$", "", name))
            elif tensor.dtype == torch.float8_e4m3fn:
                fp8.add(name.removesuffix(".weight"))
            match = _LAYER_TENSOR.match(name)
            if match and self._is_tied and (match[1] or match[2]) in ("embed_tokens.weight", "lm_head.weight"):
                tied[name] = tensor
                if not all(torch.equal(tensor, other) for other in tied.values()):
                    raise CheckpointError(f"checkpoint tensors {' and '.join(tied)} differ, config.json has tie_word_embeddings")
                if match[2]:
                    continue
            if match:
                for part, shape in _parts(match[1] or match[2], tuple(tensor.shape)):
                    if shape != self._shapes.get(part, shape if "scale" in part else None):
                        implied = f"implies {list(self._shapes[part])} for" if part in self._shapes else "has no place for"
                        raise CheckpointError(f"checkpoint tensor {name} has shape {list(tensor.shape)}, config.json {implied} {part}")
                    missing.discard(part)
            yield name, tensor
        if self._complete and missing:
            some = ", ".join(sorted(missing)[:3])
            raise CheckpointError(f"checkpoint lacks {len(missing)} tensors that config.json implies: {some}{' …' * (len(missing) > 3)}")
        if fp8 - scales:
            raise CheckpointError(f"checkpoint tensor {min(fp8 - scales)} is fp8, but has no weight_scale beside it")

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from self._weights
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._path} cannot be read after tensor {self.current or '(none)'}: {error}{truncated_tensor(self._path)}"
            ) from error


def expected_shapes(config: Llama4TextConfig) -> dict[str, tuple[int, ...]]:
    """Shape by name, without prefix, of every weight of the text model, experts one by one as torch.nn.Linear holds them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def mlp(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (size, hidden),
            f"{prefix}.up_proj.weight": (size, hidden),
            f"{prefix}.down_proj.weight": (hidden, size),
        }

    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (q_size, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, q_size),
        }
        prefix += ".feed_forward"
        if layer in config.moe_layers:
            shapes[f"{prefix}.router.weight"] = (config.num_local_experts, hidden)
            shapes |= mlp(f"{prefix}.shared_expert", inner)
            for expert in range(config.num_local_experts):
                shapes |= mlp(f"{prefix}.experts.{expert}", inner)
        else:
            shapes |= mlp(prefix, config.intermediate_size_mlp)
    return shapes


def truncated_tensor(path: str | os.PathLike) -> str:
    """" (FILE ends within tensor NAME)" for the first safetensors file under `path` that is cut off, else ""."""
    for file in sorted(Path(path).glob("*.safetensors")) if os.path.isdir(path) else ():
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
            if 8 + length > size:
                return f" ({file.name} ends within its header)"
            header = json.loads(stream.read(length))
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        cut = [name for name, end in ends.items() if end > size]
        if cut:
            return f" ({file.name} ends within tensor {min(cut, key=ends.__getitem__)})"
    return ""


def _parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights that a checkpoint tensor holds: itself, or, of fused experts [E, K, N], one [N, K] for each expert and projection."""
    fused = _FUSED_EXPERTS.search(name)
    if not fused:
        yield name, shape
        return
    if len(shape) != 3:
        raise CheckpointError(f"checkpoint tensor {name} has shape {list(shape)}, needs [experts, in, out]")
    experts, size_in, size_out = shape
    prefix = name[: fused.start()]
    for expert in range(experts):
        if fused[1] == "down":
            yield f"{prefix}.experts.{expert}.down_proj.weight", (size_out, size_in)
        else:
            yield f"{prefix}.experts.{expert}.gate_proj.weight", (size_out // 2, size_in)
            yield f"{prefix}.experts.{expert}.up_proj.weight", (size_out // 2, size_in)
