"""Whether a checkpoint has a vision tower, told by the names of its tensors before any of them is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

INDEX = "model.safetensors.index.json"


def vision_tensors(checkpoint: str, revision: str | None, cache: str | None) -> list[str]:
    """Names of the vision tower's tensors.

    checkpoint: a folder, or a repository of the Hugging Face Hub, of which what is looked at is downloaded to the folder `cache`.
    revision, cache: of that repository; None for the latest, and for where huggingface_hub keeps them.
    Raises ValueError, which says what was looked at, where the checkpoint has none.
    """
    index = _file(checkpoint, INDEX, revision, cache)
    if index is not None:
        looked_at, names = INDEX, list(json.loads(index.read_text())["weight_map"])
    else:
        if Path(checkpoint).is_dir():
            files = sorted(Path(checkpoint).glob("*.safetensors"))
        else:
            files = list(filter(None, [_file(checkpoint, "model.safetensors", revision, cache)]))
        looked_at = ", ".join(file.name for file in files) or f"{INDEX} and *.safetensors, and found neither"
        names = [name for file in files for name in _names(file)]
    found = [name for name in names if "vision_model." in name]
    if not found:
        needs = f"needs weights of a vision_model: looked at {looked_at}"
        raise ValueError(f"--model-impl llama4_kernels does not serve {checkpoint} with --enable-multimodal, {needs}")
    return found


def _file(checkpoint: str, name: str, revision: str | None, cache: str | None) -> Path | None:
    if Path(checkpoint).is_dir():
        return Path(checkpoint, name) if Path(checkpoint, name).is_file() else None
    try:
        return Path(hf_hub_download(checkpoint, name, revision=revision, cache_dir=cache))
    except EntryNotFoundError:
        return None


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
