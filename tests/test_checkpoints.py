"""The tiny checkpoints that the demo and the engine tests serve, and the oracle that reads them."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from llama4_kernels.cli import checkpoint, checkpoint_files, oracle
from llama4_kernels.cli.oracle import Oracle, rounding_bound

PROMPT = torch.randint(0, checkpoint.BYTES, (3 * checkpoint.CHUNK + 7,), generator=torch.Generator().manual_seed(1)).tolist()
LIKES = ("scout", "maverick")
FORMS = ("compressed-tensors-experts", "compressed-tensors", "redhat", "modelopt", "block")
E4M3_HALF_ULP = 2**-4
E4M3_SMALLEST_STEP = 2**-9


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """make(...) and dequantised(...) in a folder of the module, once for each set of arguments."""
    folders = {}

    def make(like="scout", dequantised=False, **arguments):
        if arguments.get("vision"):
            pytest.importorskip("torchvision", reason="torchvision, which transformers' image processor needs, is not installed")
        key = (like, *sorted(arguments.items()))
        if key not in folders:
            folders[key] = checkpoint.make(tmp_path_factory.mktemp("checkpoint"), like, **arguments)
        if not dequantised:
            return folders[key]
        if (key, True) not in folders:
            folders[key, True] = checkpoint_files.dequantised(folders[key], tmp_path_factory.mktemp("dequantised"))
        return folders[key, True]

    return make


def load(path):
    import transformers

    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, architecture)
    return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)


@pytest.mark.parametrize("like", LIKES)
def test_logits_are_lively_and_routing_is_spread(made, like):
    model, _ = load(made(like))
    chosen = []
    for layer in model.language_model.model.layers:
        if layer.is_moe_layer:
            layer.feed_forward.router.register_forward_hook(lambda module, arguments, outputs: chosen.append(outputs[1]))
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    uniform = torch.tensor(float(checkpoint.VOCABULARY)).log()
    assert torch.isfinite(logprobs).all()
    assert 1 < entropy.mean() < uniform - 1
    assert len(logprobs.argmax(-1).unique()) > 50

    assert len(chosen) == {"scout": 4, "maverick": 2}[like]
    for logits in chosen:
        counts = logits.argmax(-1).bincount(minlength=logits.shape[1])
        assert (counts > 0).sum() >= min(logits.shape[1], len(PROMPT)) // 3
        assert counts.max() < len(PROMPT) / 2
        best, second = logits.topk(2).values.unbind(-1)
        assert (best - second).min() > 1e-5


@pytest.mark.parametrize(
    "arguments, missing",
    [({}, {"vision_model", "multi_modal_projector"}), ({"vision": True}, set()), ({"text_only": True}, set())],
    ids=["language", "vision", "text_only"],
)
def test_transformers_finds_every_tensor_it_expects(made, arguments, missing):
    _, info = load(made(**arguments))
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {key.removeprefix("model.").split(".")[0] for key in info["missing_keys"]} == missing


def test_vision_checkpoint_is_sharded_with_an_index(made):
    path = made(vision=True)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(checkpoint_files.load_weights(path))
    assert len(set(index.values())) == 3 and any(name.startswith("vision_model.") for name in index)


def test_chat_template_and_tokenizer_round_trip(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made())
    text = "Café?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids[0]) == "<|begin_of_text|>"
    assert len(ids) == 1 + 2 * len("<>") + len("userassistant\n\n\n\n") + len(text.encode()) + 1


def test_same_seed_same_bytes(tmp_path):
    def digest(name, seed):
        path = checkpoint.make(tmp_path / name, seed=seed, num_hidden_layers=1)
        return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()

    assert digest("a", 0) == digest("b", 0) != digest("c", 1)


def test_text_config_overrides_reach_the_config(tmp_path):
    path = checkpoint.make(tmp_path, no_rope_layers=[1, 0], num_hidden_layers=2, attention_chunk_size=None, dtype="bfloat16")
    config = json.loads((path / "config.json").read_text())
    assert config["text_config"]["no_rope_layers"] == [1, 0] and config["text_config"]["attention_chunk_size"] is None
    assert {tensor.dtype for tensor in checkpoint_files.load_weights(path).values()} == {torch.bfloat16}


def test_text_only_with_vision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text_only and vision"):
        checkpoint.make(tmp_path, text_only=True, vision=True)


def test_a_folder_in_use_is_refused(made, tmp_path):
    with pytest.raises(FileExistsError, match="is not empty"):
        checkpoint.make(made())
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        checkpoint_files.dequantised(made(fp8="redhat"), tmp_path)


def test_layout_of_metas_fp8_checkpoint(made):
    stored = checkpoint_files.load_weights(made("maverick", fp8="compressed-tensors-experts"))
    prefix = "language_model.model.layers.1.feed_forward"
    for projection, shape in (("gate_proj", (128, 256)), ("up_proj", (128, 256)), ("down_proj", (256, 128))):
        weight, scale = stored[f"{prefix}.experts.127.{projection}.weight"], stored[f"{prefix}.experts.127.{projection}.weight_scale"]
        assert (weight.dtype, weight.shape) == (torch.float8_e4m3fn, shape)
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (shape[0], 1))
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn and ".experts." not in name} == set()


def test_layout_of_nvidias_fp8_checkpoint(made):
    path = made(fp8="modelopt")
    stored = checkpoint_files.load_weights(path)
    prefix = "model.layers.0.feed_forward"
    assert stored[f"{prefix}.experts.gate_up_proj"].shape == (16, 256, 512)
    for name in ("experts.gate_up_proj_weight_scale", "experts.down_proj_input_scale", "shared_expert.up_proj.input_scale"):
        assert (stored[f"{prefix}.{name}"].dtype, stored[f"{prefix}.{name}"].shape) == (torch.float32, ())
    assert torch.equal(stored[f"{prefix}.shared_expert.up_proj.weight_scale"], stored[f"{prefix}.shared_expert.gate_proj.weight_scale"])
    quantization = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "FP8" and "model.layers.0.self_attn*" in quantization["exclude_modules"]


@pytest.mark.parametrize("like", LIKES)
@pytest.mark.parametrize("form", FORMS)
def test_dequantised_is_codes_times_scale_and_near_the_original(made, like, form):
    original = checkpoint_files.load_weights(made(like))
    stored = checkpoint_files.load_weights(made(like, fp8=form))
    full = checkpoint_files.load_weights(made(like, fp8=form, dequantised=True))
    assert {name: tensor.shape for name, tensor in full.items()} == {name: tensor.shape for name, tensor in original.items()}

    name = "language_model.model.layers.1.feed_forward.experts"
    if form == "modelopt":
        base = name.removeprefix("language_model.")
        gate_up = stored[f"{base}.gate_up_proj"].float()[3] * stored[f"{base}.gate_up_proj_weight_scale"]
    elif form == "block":
        parts = [(stored[f"{name}.3.{p}.weight"].float(), stored[f"{name}.3.{p}.weight_scale_inv"]) for p in ("gate_proj", "up_proj")]
        parts = [(codes, scale[torch.arange(len(codes))[:, None] // 128, torch.arange(codes.shape[1]) // 128]) for codes, scale in parts]
        gate_up = torch.cat([codes * scale for codes, scale in parts]).T
    else:
        parts = [(stored[f"{name}.3.{p}.weight"].float(), stored[f"{name}.3.{p}.weight_scale"].float()) for p in ("gate_proj", "up_proj")]
        gate_up = torch.cat([codes * scale for codes, scale in parts]).T
    assert torch.equal(full[f"{name}.gate_up_proj"][3], gate_up)

    changed = {name for name in full if not torch.equal(full[name], original[name])}
    assert all(".feed_forward." in name and ".router." not in name for name in changed)
    assert any(".shared_expert." in name for name in changed) == (form != "compressed-tensors-experts")
    for name in changed:
        scale = original[name].abs().max() / checkpoint_files.E4M3_MAX
        error = (full[name] - original[name]).abs()
        # a bfloat16 scale may be up to 2^-8 too small, so that the largest weight of a channel saturates
        assert (error <= original[name].abs() * (E4M3_HALF_ULP + 2**-8) + scale * E4M3_SMALLEST_STEP).all(), name


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(384, 256), (300, 200)], ids=["whole blocks", "blocks cut off"])
def test_dequantised_by_blocks(suffix, shape, tmp_path):
    """As compressed-tensors and as DeepSeek name the scales."""
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    save_file({"model.layers.0.mlp.weight": codes, f"model.layers.0.mlp.{suffix}": scale}, tmp_path / "model.safetensors")
    (found,) = checkpoint_files.load_weights(checkpoint_files.dequantised(tmp_path, tmp_path / "full")).values()
    assert torch.equal(found, codes.float() * scale[torch.arange(shape[0])[:, None] // 128, torch.arange(shape[1]) // 128])


@pytest.mark.parametrize(
    "scale, says",
    [
        (None, "a.weight is FP8, but the checkpoint holds no scale of it"),
        ((4, 4), r"a.weight_scale has shape \[4, 4\] for a weight of \[256, 256\]"),
    ],
    ids=["none", "blocks of 64"],
)
def test_a_scale_that_the_oracle_does_not_know_is_named(scale, says, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    tensors = {"a.weight": torch.zeros(256, 256, dtype=torch.float8_e4m3fn)} | (
        {} if scale is None else {"a.weight_scale": torch.ones(scale)}
    )
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=says):
        checkpoint_files.dequantised(tmp_path, tmp_path / "full")


def test_headers_are_those_of_the_weights(made):
    path = made(fp8="block")
    stored, headers = checkpoint_files.load_weights(path), checkpoint_files.headers(path)
    assert {name: header.shape for name, header in headers.items()} == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert all(header.is_fp8 == (stored[name].dtype == torch.float8_e4m3fn) for name, header in headers.items())
    assert set(checkpoint_files.load_weights(path, "_scale_inv")) == {name for name in stored if name.endswith("_scale_inv")} != set()


def test_oracle_rounds_inputs_of_blocks_by_128_columns(made, monkeypatch):
    """Of every FP8 layer, experts too; with scales per channel only what the second weight of the MoE layer is multiplied with."""
    rounded = {}
    exact = oracle._round
    for form in ("compressed-tensors", "block"):
        seen = rounded[form] = []
        monkeypatch.setattr(oracle, "_round", lambda x, scale, per_block=False, parts=1: seen.append(per_block) or exact(x, scale))
        Oracle(made("maverick", fp8=form, dequantised=True), quantise_activations=made("maverick", fp8=form)).logprobs(PROMPT[:3])
    assert all(rounded["block"]) and len(rounded["block"]) == len(rounded["compressed-tensors"]) == 16
    assert sum(rounded["compressed-tensors"]) == 4


def test_oracle_greedy_follows_its_logprobs(made):
    reference = Oracle(made())
    answer = reference.greedy(PROMPT[:5], 6)
    logprobs, best = reference.logprobs(PROMPT[:5] + answer)
    assert best[-len(answer) :].tolist() == answer
    assert logprobs.shape == (len(PROMPT[:5]) + len(answer) - 1,) and (logprobs < 0).all()


def test_oracle_sees_tokens_of_its_own_chunk_only():
    """The oracle is transformers, but a reference that does not mask chunks would hide a model that does not either."""
    from transformers import Llama4TextConfig
    from transformers.masking_utils import create_chunked_causal_mask

    config = Llama4TextConfig(**checkpoint.TEXT["scout"], attn_implementation="eager")
    embeds = torch.zeros(1, len(PROMPT), 1)
    mask = create_chunked_causal_mask(config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None)[0, 0]
    q, k = torch.arange(len(PROMPT))[:, None], torch.arange(len(PROMPT))[None]
    assert torch.equal(mask == 0, (k <= q) & (k // checkpoint.CHUNK == q // checkpoint.CHUNK))


def test_rounding_bound_tells_float32_noise_from_another_rounding(made, monkeypatch):
    path, full = made(fp8="compressed-tensors-experts"), made(fp8="compressed-tensors-experts", dequantised=True)
    rounding = Oracle(full, quantise_activations=path)
    want, _ = rounding.logprobs(PROMPT)
    whole = (Oracle(full).logprobs(PROMPT)[0] - want).abs().mean()
    bound = rounding_bound(float(whole), rounding.rounding_sites())
    assert rounding.rounding_sites() == 8 and rounding_bound(1.0, 8) == 0.25

    exact = oracle._round
    monkeypatch.setattr(oracle, "_round", lambda x, scale, per_block=False, parts=1: exact(x, scale))
    per_token, _ = rounding.logprobs(PROMPT)
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in rounding.model.parameters():
            parameter.mul_(1 + 2**-24 * torch.randn(parameter.shape, generator=generator))
    noisy, _ = rounding.logprobs(PROMPT)
    assert (noisy - want).abs().mean() < bound < (per_token - want).abs().mean()
