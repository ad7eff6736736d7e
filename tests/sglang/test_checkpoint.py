"""A checkpoint that does not fit its config.json is refused with the name of the tensor."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from llama4_kernels.sglang.checkpoint import CheckedWeights, CheckpointError

LAYER = "language_model.model.layers.2"
UP = f"{LAYER}.feed_forward.shared_expert.up_proj.weight"
EXPERTS = f"{LAYER}.feed_forward.experts.down_proj"


def read(path, tensors, complete=True, has_kv_scales=False):
    config = AutoConfig.from_pretrained(path)
    return dict(CheckedWeights(tensors.items(), config, complete=complete, has_kv_scales=has_kv_scales))


@pytest.mark.parametrize(
    "like, form", [("scout", None), ("maverick", None), ("maverick", "compressed-tensors-experts"), ("scout", "modelopt")]
)
def test_a_checkpoint_that_fits_passes_through(like, form, make):
    path = make(like, fp8=form)
    tensors = load_file(path / "model.safetensors")
    assert read(path, tensors) == tensors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({UP: t[UP][:-1]}), f"checkpoint tensor {UP} has shape [255, 256], config.json implies [256, 256]"),
        (lambda t: t.update({EXPERTS: t[EXPERTS][:, :-1]}), f"checkpoint tensor {EXPERTS} has shape [16, 255, 256], config.json implies"),
        (
            lambda t: t.update({EXPERTS: t[EXPERTS].repeat(2, 1, 1)}),
            f"checkpoint tensor {EXPERTS} has shape [32, 256, 256], config.json has no",
        ),
        (
            lambda t: t.update({EXPERTS: t[EXPERTS][:-1]}),
            "checkpoint lacks 1 tensors that config.json implies: layers.2.feed_forward.experts.15",
        ),
        (lambda t: t.pop(UP), "checkpoint lacks 1 tensors that config.json implies: layers.2.feed_forward.shared_expert.up_proj.weight"),
        (lambda t: t.update({f"{UP}_2": t[UP]}), f"checkpoint tensor {UP}_2 has shape [256, 256], config.json has no place for"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"checkpoint tensor {UP.removesuffix('.weight')} is fp8, but has no"),
    ],
    ids=["shape", "expert shape", "too many experts", "too few experts", "missing", "unknown", "no scale"],
)
def test_the_tensor_is_named(change, message, make):
    path = make("scout")
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        read(path, tensors)
    assert message in str(error.value)


def test_a_head_that_is_the_embedding_again(make):
    path = make("scout", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    head = next(name for name in tensors if name.endswith("lm_head.weight"))
    assert read(path, tensors | {head: tensors[embedding].clone()}).keys() == tensors.keys() - {head}
    with pytest.raises(CheckpointError, match=f"{head}.* differ, config.json has tie_word_embeddings"):
        read(path, tensors)


def test_part_of_a_checkpoint_is_enough_for_an_update(make):
    path = make("scout")
    tensors = {UP: load_file(path / "model.safetensors")[UP]}
    assert read(path, tensors, complete=False) == tensors


def test_kv_scales_get_the_name_that_the_model_has(make):
    path = make("scout")
    tensors = {f"{LAYER}.self_attn.k_proj.k_scale": torch.tensor(0.5), f"{LAYER}.self_attn.v_proj.v_scale": torch.tensor(2.0)}
    renamed = {f"{LAYER}.self_attn.attn.k_scale": torch.tensor(0.5), f"{LAYER}.self_attn.attn.v_scale": torch.tensor(2.0)}
    assert read(path, tensors, complete=False, has_kv_scales=True) == renamed
    assert read(path, tensors, complete=False) == {}


def test_a_truncated_file_names_its_tensor(make, tmp_path):
    path = shutil.copytree(make("scout"), tmp_path / "checkpoint")
    file = path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)

    def weights():
        with safe_open(file, "pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in opened.keys())

    with pytest.raises(CheckpointError, match=r"model\.safetensors ends within tensor language_model\.model\.layers\."):
        dict(CheckedWeights(weights(), AutoConfig.from_pretrained(path), complete=True, has_kv_scales=False))
