"""What of a Llama 4 checkpoint decides its memory, read from config.json alone, and the bytes of weights that each rank holds."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama4_kernels.cli.plan.errors import PlanError

Weights = Literal["bf16", "fp8", "int4"]
ARCHITECTURES = ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_BYTES = 4  # one float32 for each output channel of an fp8 weight
INT4_BYTES = 0.5 + 2 / 128  # codes, and a bf16 scale for each group of 128
VOCABULARY_PADDING = 64  # SGLang pads the vocabulary to a multiple of it before it is sharded

_SIZES = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "attention_chunk_size": 8192,
}
_VISION = {
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "intermediate_size": 5632,
    "vision_output_dim": 4096,
    "image_size": 336,
    "patch_size": 14,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}
_SCOUT = _SIZES | {"num_local_experts": 16, "interleave_moe_layer_step": 1, "max_position_embeddings": 10_485_760}
_MAVERICK = _SIZES | {"num_local_experts": 128, "interleave_moe_layer_step": 2, "max_position_embeddings": 1_048_576}


@dataclass(frozen=True)
class Preset:
    """A published model: its text config and, by the form of its weights, the repository and the modules that are quantised there."""

    text: dict[str, Any]
    repositories: dict[str, str]
    quantised: dict[str, frozenset[str]]


PRESETS = {
    "scout": Preset(
        _SCOUT,
        {
            "bf16": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "fp8": "RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic",
            "int4": "RedHatAI/Llama-4-Scout-17B-16E-Instruct-quantized.w4a16",
        },
        {"fp8": frozenset({"experts", "shared_expert", "mlp"}), "int4": frozenset({"experts", "shared_expert", "mlp"})},
    ),
    "maverick": Preset(
        _MAVERICK,
        {
            "bf16": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
            "fp8": "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
            "int4": "RedHatAI/Llama-4-Maverick-17B-128E-Instruct-quantized.w4a16",
        },
        {"fp8": frozenset({"experts"}), "int4": frozenset({"experts", "shared_expert", "mlp"})},
    ),
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    is_local: chunk-local attention.
    is_moe: routed experts and a shared one, or a dense MLP.
    quantised: which of "attention", "experts", "shared_expert" and "mlp" are stored in the quantised form.
    """

    is_local: bool
    is_moe: bool
    quantised: frozenset[str]


@dataclass(frozen=True)
class Vision:
    """Sizes of the vision tower; `patches` includes the class token."""

    hidden: int
    layers: int
    heads: int
    width: int
    output: int
    projector: tuple[int, int]
    patch_pixels: int
    patches: int


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama 4; `path` is what --model-path takes, `weights` the form of the quantised modules, `at_load` whether SGLang
    quantises them while it loads, `dtype_bytes` those of everything else."""

    path: str
    layers: tuple[Layer, ...]
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int
    expert_width: int
    mlp_width: int
    chunk: int | None
    max_context: int
    tied: bool
    dtype_bytes: int
    weights: Weights
    at_load: bool
    vision: Vision | None

    @property
    def form(self) -> str:
        """Of the quantised modules, or of all where there are none."""
        return (
            self.weights
            if self.weights != "bf16"
            else {size: name for name, size in DTYPE_BYTES.items() if name != "float16"}[self.dtype_bytes]
        )

    @property
    def local_layers(self) -> int:
        return sum(layer.is_local for layer in self.layers)

    @property
    def global_layers(self) -> int:
        return len(self.layers) - self.local_layers

    def check_ranks(self, tp: int, ep: int, given: str, give: str) -> None:
        """PlanError where `tp` ranks cannot share the heads or the widths, or `ep` groups the experts.

        given, give: what the error calls the option that says how many ranks, and what to do about it.
        """
        if self.q_heads % tp or (self.kv_heads % tp and tp % self.kv_heads):
            fitting = ", ".join(
                str(n) for n in range(1, self.q_heads + 1) if not self.q_heads % n and not (self.kv_heads % n and n % self.kv_heads)
            )
            raise PlanError(f"{given} does not divide the {self.q_heads} query and {self.kv_heads} KV heads: {give} one of {fitting}")
        if tp % ep or self.experts % ep:
            raise PlanError(f"--ep {ep} must divide the {tp} ranks and the {self.experts} experts")
        for name, width, ranks in (
            ("intermediate_size", self.expert_width, tp),
            ("intermediate_size_mlp", 0 if all(layer.is_moe for layer in self.layers) else self.mlp_width, tp),
        ):
            if width % ranks:
                raise PlanError(f"{given} does not divide {name} {width}: {give} a divisor of it")

    def weight_bytes(self, tp: int, ep: int = 1, vision: bool = False) -> dict[str, int]:
        """Bytes of one rank by part. Linear layers are sharded over tp; KV heads are repeated where tp exceeds them; the router and the
        norms are on every rank; experts are shared out over ep groups and sharded over the tp / ep ranks of each."""
        kv_heads = max(1, self.kv_heads // tp)
        q_size, kv_size = self.q_heads // tp * self.head_dim, kv_heads * self.head_dim
        parts = dict.fromkeys(("attention", "experts", "shared experts, MLPs", "router", "norms"), 0)
        for layer in self.layers:
            in_form = layer.quantised
            parts["attention"] += self._linear("attention" in in_form, q_size + 2 * kv_size, self.hidden)
            parts["attention"] += self._linear("attention" in in_form, self.hidden, q_size)
            parts["norms"] += 2 * self.hidden * self.dtype_bytes
            if layer.is_moe:
                width, local = self.expert_width * ep // tp, self.experts // ep
                parts["experts"] += local * self._mlp("experts" in in_form, width)
                parts["shared experts, MLPs"] += self._mlp("shared_expert" in in_form, self.expert_width // tp)
                parts["router"] += self.experts * self.hidden * self.dtype_bytes
            else:
                parts["shared experts, MLPs"] += self._mlp("mlp" in in_form, self.mlp_width // tp)
        parts["norms"] += self.hidden * self.dtype_bytes
        padded = -(-self.vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING
        table = -(-padded // tp) * self.hidden * self.dtype_bytes
        parts["embedding, lm_head"] = table * (1 if self.tied else 2)
        if vision:
            if self.vision is None:
                raise PlanError(f"--vision: {self.path} has no vision_config")
            parts["vision"] = self._vision_bytes(self.vision, tp)
        return parts

    def _linear(self, quantised: bool, rows: int, columns: int) -> int:
        """Bytes of a linear layer [rows, columns]."""
        if not quantised:
            return rows * columns * self.dtype_bytes
        if self.weights == "int4":
            return round(rows * columns * INT4_BYTES)
        return rows * columns + rows * SCALE_BYTES

    def _mlp(self, quantised: bool, width: int) -> int:
        return self._linear(quantised, 2 * width, self.hidden) + self._linear(quantised, self.hidden, width)

    def _vision_bytes(self, v: Vision, tp: int) -> int:
        """The tower, sharded by heads and MLP widths, and the projector, whole on every rank."""
        heads, width, projected = (-(-size // tp) for size in (v.heads, v.width, v.projector[0]))
        q_size = heads * (v.hidden // v.heads)
        layer = 3 * q_size * (v.hidden + 1) + q_size * v.hidden + v.hidden + width * (2 * v.hidden + 1) + v.hidden + 4 * v.hidden
        stem = v.hidden * v.patch_pixels // tp + (v.patches + 1) * v.hidden + 4 * v.hidden
        adapter = projected * v.width + v.projector[1] * projected
        return (v.layers * layer + stem + adapter + v.output * self.hidden) * self.dtype_bytes


def load(model: str, weights: Weights | None) -> Model:
    """The model of that preset or published repository, or of the checkpoint in the folder `model`; `weights`: None for those that the
    repository or checkpoint holds, bf16 for a preset. PlanError names what to change."""
    try:
        return _load(model, weights)
    except PlanError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise PlanError(f"--model {model}: its config.json or hf_quant_config.json is not that of a Llama 4 ({found})") from None


def _load(model: str, weights: Weights | None) -> Model:
    for name, preset in PRESETS.items():
        for form, repository in preset.repositories.items():
            if model == repository and not Path(model).is_dir():
                model, weights = name, weights or form
    if model in PRESETS:
        preset, weights = PRESETS[model], weights or "bf16"
        quantised = preset.quantised.get(weights, frozenset())
        config = {"text_config": preset.text, "vision_config": _VISION}
        return _model(preset.repositories[weights], config, 2, weights, lambda layer: quantised, at_load=False)
    config = _read(model, "config.json")
    dtype = config.get("torch_dtype") or config.get("dtype") or config.get("text_config", {}).get("torch_dtype") or "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"{model}/config.json: dtype {dtype} is not one of {', '.join(DTYPE_BYTES)}")
    ignored = _ignored(model, config)
    at_load = ignored is None and weights == "fp8"
    if ignored is not None and weights not in (None, "fp8"):
        raise PlanError(f"--weights {weights}: the checkpoint {model} holds fp8 weights; give --weights fp8 or leave it out")
    if ignored is None and weights in (None, "bf16"):
        return _model(model, config, DTYPE_BYTES[dtype], "bf16", lambda layer: frozenset(), at_load=False)
    if ignored is None:
        everything = frozenset({"experts", "shared_expert", "mlp"} | ({"attention"} if at_load else set()))
        return _model(model, config, DTYPE_BYTES[dtype], weights, lambda layer: everything, at_load=at_load)
    patterns = ignored

    def stored_quantised(layer: int) -> frozenset[str]:
        prefix = f"language_model.model.layers.{layer}"
        modules = {
            "attention": f"{prefix}.self_attn.q_proj",
            "experts": f"{prefix}.feed_forward.experts.0.gate_proj",
            "shared_expert": f"{prefix}.feed_forward.shared_expert.gate_proj",
            "mlp": f"{prefix}.feed_forward.gate_proj",
        }
        return frozenset(kind for kind, module in modules.items() if not any(_matches(pattern, module) for pattern in patterns))

    return _model(model, config, DTYPE_BYTES[dtype], "fp8", stored_quantised, at_load=False)


def _model(path: str, config: dict[str, Any], dtype_bytes: int, weights: Weights, quantised, *, at_load: bool) -> Model:
    text = config.get("text_config", config)
    try:
        count = text["num_hidden_layers"]
        chunk = text.get("attention_chunk_size", 8192)
        step = text.get("interleave_moe_layer_step", 1)
        moe = text.get("moe_layers")
        moe = set(range(step - 1, count, step) if moe is None else moe)
        rope = text.get("no_rope_layers") or [int((i + 1) % text.get("no_rope_layer_interval", 4) != 0) for i in range(count)]
        types = text.get("layer_types") or ["chunked_attention" if use else "full_attention" for use in rope]
        layers = tuple(Layer(types[i] == "chunked_attention" and chunk is not None, i in moe, quantised(i)) for i in range(count))
        return Model(
            path=path,
            layers=layers,
            hidden=text["hidden_size"],
            q_heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocabulary=text["vocab_size"],
            experts=text["num_local_experts"],
            expert_width=text["intermediate_size"],
            mlp_width=text.get("intermediate_size_mlp", 0),
            chunk=chunk,
            max_context=text["max_position_embeddings"],
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype_bytes=dtype_bytes,
            weights=weights,
            at_load=at_load,
            vision=_vision(config["vision_config"]) if config.get("vision_config") else None,
        )
    except KeyError as missing:
        raise PlanError(f"{path}/config.json lacks {missing.args[0]}") from None


def _vision(v: dict[str, Any]) -> Vision:
    return Vision(
        hidden=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        width=v["intermediate_size"],
        output=v["vision_output_dim"],
        projector=(v["projector_input_dim"], v["projector_output_dim"]),
        patch_pixels=v["num_channels"] * v["patch_size"] ** 2,
        patches=(v["image_size"] // v["patch_size"]) ** 2 + 1,
    )


def _read(model: str, name: str) -> dict[str, Any]:
    folder = Path(model)
    if not folder.is_dir():
        published = [repository for preset in PRESETS.values() for repository in preset.repositories.values()]
        raise PlanError(f"--model {model} is not a folder: give that of a checkpoint, or one of {', '.join((*PRESETS, *published))}")
    try:
        config = json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise PlanError(f"--model {model} holds no {name}: give the folder of a checkpoint") from None
    except json.JSONDecodeError as error:
        raise PlanError(f"{folder / name} is not JSON: {error}") from None
    if not set(config.get("architectures") or ()) & set(ARCHITECTURES):
        raise PlanError(f"--model {model} is {config.get('architectures')}: give a Llama 4 checkpoint ({' or '.join(ARCHITECTURES)})")
    return config


def _ignored(model: str, config: dict[str, Any]) -> list[str] | None:
    """Patterns of the modules that an fp8 checkpoint leaves alone, or None for a checkpoint that is not quantised."""
    file = Path(model) / "hf_quant_config.json"
    if file.exists():
        return json.loads(file.read_text())["quantization"].get("exclude_modules") or []
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if quantization.get("quant_method") == "compressed-tensors" and quantization.get("format") == "float-quantized":
        return quantization.get("ignore") or []
    if quantization.get("quant_method") in ("fp8", "modelopt"):
        return quantization.get("ignored_layers") or quantization.get("ignore") or []
    raise PlanError(
        f"{model}/config.json: quantization_config {quantization.get('quant_method')} {quantization.get('format', '')} is not fp8: "
        "give a bf16 or fp8 checkpoint"
    )


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern of an ignore list means `module`: a regular expression after "re:", else a name, possibly with wildcards."""
    names = (module, module.removeprefix("language_model."))
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
