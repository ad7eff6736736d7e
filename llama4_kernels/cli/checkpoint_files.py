"""What the files of a Llama 4 checkpoint hold: tensors, what their headers say, scales; and the float32 checkpoint of an FP8 one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

E4M3_MAX = 448.0
BLOCK = 128  # rows and columns of a weight that share a scale, where it has scales per block
SCALES = ("_scale", "_scale_inv")
EXPERTS = r"feed_forward\.experts\.(gate_up_proj|down_proj)$"


@dataclass(frozen=True)
class Header:
    """What a checkpoint's file says of a tensor before its data. dtype: as safetensors names it, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_fp8(self) -> bool:
        return self.dtype == "F8_E4M3"

    def is_per_block(self, weight: Header) -> bool:
        """Whether this is the scale of `weight` with one value for each block of 128x128."""
        return len(weight.shape) == 2 and weight.shape[0] > 1 and self.shape == _blocks(weight.shape)


def headers(path: str | Path) -> dict[str, Header]:
    """Of every tensor of the checkpoint in the folder `path`, by name; reads no weight."""
    from safetensors import safe_open

    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(name)
                found[name] = Header(tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def load_weights(path: str | Path, ending: str = "") -> dict[str, Tensor]:
    """The tensors of the checkpoint in the folder `path` whose names have this ending, by name."""
    from safetensors import safe_open

    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name.endswith(ending)}  # noqa: SIM118
    return found


def scale_of(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that is the scale of the weight `name`."""
    stem = f"{name}_weight_scale" if re.search(EXPERTS, name) else f"{name}_scale"
    return next((scale for scale in (stem, f"{stem}_inv") if scale in names), None)


def scaled(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    """codes * scale in float32. name: of the scale."""
    value, scale = codes.float(), scale.float()
    if scale.numel() == 1:
        return value.mul_(scale.view(()))
    if codes.dim() == 2 and scale.shape in ((len(codes),), (len(codes), 1)):
        return value.mul_(scale.view(-1, 1))
    if codes.dim() == 2 and scale.shape == _blocks(codes.shape):
        spread = scale.repeat_interleave(BLOCK, 0)[: len(codes)].repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
        return value.mul_(spread)
    raise ValueError(
        f"{name} has shape {list(scale.shape)} for a weight of {list(codes.shape)}, needs one scale of the whole, "
        f"one per output channel, or one per block of {BLOCK}x{BLOCK}"
    )


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)


def dequantised(path: str | Path, out: str | Path) -> Path:
    """Write to `out` the float32 checkpoint whose weights are codes * scale of the FP8 one at `path`, in the layout of an unquantised one.

    out: a new or empty folder, which is returned. Takes the memory of the float32 checkpoint, and some more.
    Raises ValueError, with its name, for an FP8 weight without a scale, and for a scale that is neither one of the whole weight, nor one per
    output channel, nor one per block of 128x128.
    """
    path, out = Path(path), empty_folder(out)
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "hf_quant_config.json"), dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config", None)
    config["torch_dtype"] = "float32"
    write_json(out / "config.json", config)

    stored = load_weights(path)
    tensors: dict[str, Tensor] = {}
    per_expert: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name in list(stored):
        if name.endswith(SCALES):
            continue
        scale_name = scale_of(name, stored)
        tensor = stored.pop(name)
        if tensor.dtype == torch.float8_e4m3fn and scale_name is None:
            raise ValueError(f"{name} is FP8, but the checkpoint holds no scale of it")
        value = tensor.float() if scale_name is None else scaled(tensor, stored[scale_name], scale_name)
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if expert:
            per_expert.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[expert[3]] = value
        else:
            tensors[name] = value
    while per_expert:
        prefix, experts = per_expert.popitem()
        ordered = [experts[e] for e in range(len(experts))]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]).T for e in ordered])
        tensors[f"{prefix}.down_proj"] = torch.stack([e["down"].T for e in ordered])
    if "text_config" in config:
        tensors = {_with_language_model(name): tensor for name, tensor in tensors.items()}
    save_weights(out, tensors, shards=3 if (path / "model.safetensors.index.json").exists() else 1)
    return out


def empty_folder(path: str | Path) -> Path:
    """The folder, made where it does not exist; FileExistsError where it holds anything: SGLang loads every *.safetensors of a folder."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty")
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_weights(path: Path, tensors: dict[str, Tensor], shards: int) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _with_language_model(name: str) -> str:
    return f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name
