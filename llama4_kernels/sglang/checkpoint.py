"""Checks a Llama 4 checkpoint while SGLang loads it: every tensor there, whole, of the shape that config.json implies, and with a place in
the model."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Llama4Config, Llama4TextConfig

from llama4_kernels.ops.types import dtype_name

_LAYER_TENSOR = re.compile(
    r"(?:language_model\.)?model\.(layers\.\d+\..*|embed_tokens\.weight|norm\.weight)$|(?:language_model\.)?(lm_head\.weight)$"
)
_KV_SCALE = re.compile(r"\.self_attn\.(?:[kv]_proj\.|attn\.)?([kv])_scale$")
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the tensor."""


class CheckedWeights:
    """Iterates over (name, tensor) of a checkpoint and raises CheckpointError for what does not fit `config` and `parameters`. Tensors
    without data, on the meta device, are checked but for what their values say. What is in vain is left out: the vision tower where the
    model has none, KV-cache scales where it has no place for them.

    parameters: dtype of each of the model's parameters by name.
    path: where the checkpoint is, for errors in reading it.
    complete: whether a weight or scale that never came is an error.
    current: the name given last, for errors of whoever loads it.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, Tensor]],
        config: Llama4Config | Llama4TextConfig,
        parameters: Mapping[str, torch.dtype],
        *,
        path: str | os.PathLike,
        complete: bool,
    ):
        self.current = ""
        self._weights = weights
        self._parameters = parameters
        self._has_vision = any(_is_vision(name) for name in parameters)
        self._path = path
        self._shapes = expected_shapes(config.get_text_config())
        self._is_tied = config.get_text_config().tie_word_embeddings
        self._complete = complete

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        missing = set(self._shapes)
        is_fp8 = torch.float8_e4m3fn in self._parameters.values()  # else scales are those of weights quantised at load
        untouched = {name for name in self._parameters if not _KV_SCALE.search(name) and (is_fp8 or "scale" not in name)}
        scales: set[str] = set()
        fp8: set[str] = set()
        tied: dict[str, Tensor] = {}
        for name, tensor in self._read():
            self.current = name
            if _KV_SCALE.search(name):
                name = _KV_SCALE.sub(r".self_attn.attn.\1_scale", name)
                if parameter_name(name) in self._parameters:
                    yield name, tensor
                continue
            if _is_vision(name) and not self._has_vision:
                continue
            if "scale" in name:
                _check_scale(name, tensor)
                scales.add(re.sub(r"[._]weight_scale(_inv)?$", "", name))
            elif tensor.dtype == torch.float8_e4m3fn:
                fp8.add(name.removesuffix(".weight"))
            match = _LAYER_TENSOR.match(name)
            if match and self._is_tied and (match[1] or match[2]) in ("embed_tokens.weight", "lm_head.weight"):
                tied[name] = tensor
                if not all(tensor.is_meta or torch.equal(tensor, other) for other in tied.values()):
                    raise CheckpointError(f"checkpoint tensors {' and '.join(tied)} differ, config.json has tie_word_embeddings")
                if match[2]:
                    continue
            if match:
                for part, shape in _parts(match[1] or match[2], tuple(tensor.shape)):
                    if shape != self._shapes.get(part, shape if "scale" in part else None):
                        implied = f"implies {list(self._shapes[part])} for" if part in self._shapes else "has no place for"
                        raise CheckpointError(f"checkpoint tensor {name} has shape {list(tensor.shape)}, config.json {implied} {part}")
                    missing.discard(part)
            self._check_place(name, tensor)
            untouched.discard(parameter_name(name))
            yield name, tensor
        if not self._complete:
            return
        if missing := missing or untouched:
            some = ", ".join(sorted(missing)[:3])
            raise CheckpointError(f"checkpoint lacks {len(missing)} tensors that config.json implies: {some}{' …' * (len(missing) > 3)}")
        if fp8 - scales:
            raise CheckpointError(f"checkpoint tensor {min(fp8 - scales)} is fp8, but has no weight_scale beside it")

    def _check_place(self, name: str, tensor: Tensor) -> None:
        """CheckpointError where SGLang would have no parameter for the tensor, or would round it to fp8 without a scale."""
        parameter = parameter_name(name)
        if parameter not in self._parameters:
            raise CheckpointError(f"checkpoint tensor {name} has no place in the model, needs a parameter {parameter}")
        held = self._parameters[parameter]
        if (tensor.dtype == torch.float8_e4m3fn) != (held == torch.float8_e4m3fn):
            is_, needs = map(dtype_name, (tensor.dtype, held))
            raise CheckpointError(f"checkpoint tensor {name} is {is_}, the model holds {needs}")

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from self._weights
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._path} cannot be read after tensor {self.current or '(none)'}: {error}{truncated_tensor(self._path)}"
            ) from error


def _check_scale(name: str, tensor: Tensor) -> None:
    values = tensor.flatten().float()
    wrong = values[~(values.isfinite() & (values >= 0))] if not tensor.is_meta else values[:0]
    if len(wrong):
        raise CheckpointError(f"checkpoint tensor {name} holds {wrong[0].item()}, needs scales that are finite and at least 0")


def without_data(files: Iterable[str | os.PathLike]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the meta device) of every tensor of safetensors files, as their headers tell."""
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                tensor = opened.get_slice(name)
                shape = tensor.get_shape()
                dtype = (tensor[:0] if shape else opened.get_tensor(name)).dtype
                yield name, torch.empty(shape, dtype=dtype, device="meta")


def parameter_name(name: str) -> str:
    """The parameter of SGLang's Llama 4 that checkpoint tensor `name` goes into, alone or beside others."""
    if "vision" in name:
        name = name.replace(".self_attn.o_proj", ".self_attn.proj")
    elif not _is_vision(name) and not name.startswith("language_model."):
        name = f"language_model.{name}"
    name = re.sub(r"\.self_attn\.[qkv]_proj\.", ".self_attn.qkv_proj.", name)
    if ".experts." not in name:
        return re.sub(r"\.(?:gate|up)_proj\.", ".gate_up_proj.", name)
    name = re.sub(r"\.experts\.(?:\d+\.)?(?:gate_up|gate|up)_proj[._]?", ".experts.w13_", name)
    name = re.sub(r"\.experts\.(?:\d+\.)?down_proj[._]?", ".experts.w2_", name)
    return f"{name}weight" if name.endswith("_") else name


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
    """ " (FILE ends within tensor NAME)" for the first safetensors file under `path` that is cut off, else ""."""
    for file in sorted(Path(path).glob("*.safetensors")) if os.path.isdir(path) else ():
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
            if 8 + length > size:
                return f" ({file.name} ends within its header)"
            header = stream.read(length)
        try:
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"}
        except (ValueError, AttributeError, LookupError, TypeError):
            return f" ({file.name} has a header that is not one of safetensors)"
        cut = [name for name, end in ends.items() if end > size]
        if cut:
            return f" ({file.name} ends within tensor {min(cut, key=ends.__getitem__)})"
    return ""


def _is_vision(name: str) -> bool:
    return "vision" in name or "multi_modal_projector" in name


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
