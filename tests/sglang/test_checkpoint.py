"""A checkpoint that does not fit its config.json is refused with the name of the tensor."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from llama4_kernels.cli import checkpoint_files
from llama4_kernels.sglang.checkpoint import CheckedWeights, CheckpointError, parameter_name, without_data

LAYER = "language_model.model.layers.2"
UP = f"{LAYER}.feed_forward.shared_expert.up_proj.weight"
EXPERTS = f"{LAYER}.feed_forward.experts.down_proj"


def parameters(path, config):
    """Of the model that the checkpoint at `path` is of, where that fits its config.json."""
    found = {parameter_name(name): tensor.dtype for name, tensor in checkpoint_files.load_weights(path).items()}
    if config.get_text_config().tie_word_embeddings:
        del found["language_model.lm_head.weight"]
    return found


def read(path, tensors, complete=True, more=()):
    """Check `tensors` for the model that the checkpoint at `path` is of, with `more` float32 parameters."""
    config = AutoConfig.from_pretrained(path)
    held = parameters(path, config) | dict.fromkeys(more, torch.float32)
    return dict(CheckedWeights(tensors.items(), config, held, path=path, complete=complete))


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
        (lambda t: t.update({f"{UP}_scale": t[UP][:1, 0]}), f"checkpoint tensor {UP}_scale has no place in the model, needs a parameter"),
        (lambda t: t.update({"bias": t[UP]}), "checkpoint tensor bias has no place in the model, needs a parameter language_model.bias"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"checkpoint tensor {UP} is float8_e4m3fn, the model holds float32"),
    ],
    ids=["shape", "expert shape", "too many experts", "too few experts", "missing", "unknown", "scale", "unknown outside", "fp8"],
)
def test_the_tensor_is_named(change, message, make):
    path = make("scout")
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        read(path, tensors)
    assert message in str(error.value)


FP8 = {"fp8": "compressed-tensors", "fp8_attention": True}


@pytest.mark.parametrize(
    "made, change, message",
    [
        (FP8, lambda t: t.pop(f"{UP}_scale"), f"checkpoint tensor {UP.removesuffix('.weight')} is fp8, but has no weight_scale beside it"),
        (FP8, lambda t: t.update({UP: t[UP].float()}), f"checkpoint tensor {UP} is float32, the model holds float8_e4m3fn"),
        (
            {"fp8": "modelopt"},
            lambda t: t.pop("model.layers.2.feed_forward.shared_expert.down_proj.input_scale"),
            f"lacks 1 tensors that config.json implies: {LAYER}.feed_forward.shared_expert.down_proj.input_scale",
        ),
        (
            {"vision": True},
            lambda t: t.pop("multi_modal_projector.linear_1.weight"),
            "checkpoint lacks 1 tensors that config.json implies: multi_modal_projector.linear_1.weight",
        ),
    ],
    ids=["no scale", "fp8 wanted", "no activation scale", "vision"],
)
def test_what_quantised_and_multimodal_checkpoints_lack(made, change, message, make):
    path = make("scout", **made)
    tensors = checkpoint_files.load_weights(path)
    assert read(path, tensors) == tensors
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        read(path, tensors)
    assert message in str(error.value)


def test_vision_weights_of_no_use(make):
    tensors = checkpoint_files.load_weights(make("scout", vision=True))
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    assert len(text) < len(tensors) and read(make("scout"), tensors) == text


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
    quantised = make("scout", **FP8)
    tensors = {UP: checkpoint_files.load_weights(quantised)[UP]}
    assert read(quantised, tensors, complete=False) == tensors


def test_kv_scales_get_the_name_that_the_model_has(make):
    path = make("scout")
    tensors = {f"{LAYER}.self_attn.k_proj.k_scale": torch.tensor(0.5), f"{LAYER}.self_attn.v_proj.v_scale": torch.tensor(2.0)}
    renamed = {f"{LAYER}.self_attn.attn.k_scale": torch.tensor(0.5), f"{LAYER}.self_attn.attn.v_scale": torch.tensor(2.0)}
    assert read(path, tensors, complete=False, more=renamed) == renamed
    assert read(path, tensors, complete=False) == {}
    everything = checkpoint_files.load_weights(path)
    assert read(path, everything, more=renamed) == everything


@pytest.mark.parametrize("options", [{}, FP8, {"fp8": "modelopt"}, {"vision": True}, {"tie_word_embeddings": True}], ids=str)
def test_tensors_without_data(options, make):
    """Names, shapes and dtypes of every tensor, which pass where the tensors do."""
    path = make("scout", **options)
    tensors = checkpoint_files.load_weights(path)
    bare = dict(without_data(sorted(path.glob("*.safetensors"))))
    assert all(tensor.is_meta for tensor in bare.values())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in bare.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }
    assert len(read(path, bare)) == len(bare) - bool(options.get("tie_word_embeddings"))


def test_scales_of_weights_quantised_at_load(make):
    path = make("scout")
    tensors = checkpoint_files.load_weights(path)
    assert read(path, tensors, more=[f"{LAYER}.feed_forward.experts.w13_weight_scale"]) == tensors


def test_a_truncated_file_names_its_tensor(make, tmp_path):
    path = shutil.copytree(make("scout"), tmp_path / "checkpoint")
    config = AutoConfig.from_pretrained(path)
    held, file = parameters(path, config), path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)

    with pytest.raises(CheckpointError, match=r"model\.safetensors ends within tensor language_model\.model\.layers\."):
        dict(CheckedWeights(without_data([file]), config, held, path=path, complete=True))


@pytest.mark.parametrize("header", [b"\xff\xfe", b"[]", b'{"a": {}}', b'{"a": 1}', b"{"], ids=str)
def test_a_header_that_cannot_be_read(header, make, tmp_path):
    """The error of whoever read it is kept."""
    config = AutoConfig.from_pretrained(make("scout"))
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    def weights():
        raise OSError("the first error")
        yield

    message = r"the first error \(model\.safetensors has a header that is not one of safetensors\)"
    with pytest.raises(CheckpointError, match=message):
        dict(CheckedWeights(weights(), config, {}, path=tmp_path, complete=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt", "block"])
def test_a_scale_that_is_none(form, value, make):
    path = make("scout", fp8=form)
    tensors = checkpoint_files.load_weights(path)
    name = next(name for name in tensors if "scale" in name and "experts" in name)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=rf"checkpoint tensor {name} holds {value}, needs scales that are finite and at least 0"):
        read(path, tensors)
