"""What SGLang and the model are told of the layers of a config.json."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import layernorm
from transformers import Llama4TextConfig

from llama4_kernels.sglang.checkpoint import CheckpointError
from llama4_kernels.sglang.config import layer_config
from llama4_kernels.sglang.model import Llama4ForConditionalGeneration, Llama4Norm
from llama4_kernels.sglang.plugin import MODEL_IMPL, _derive_layers


def derived(config, context_len=100_000, overrides=None, **fields):
    """SGLang's model config of `config` with `overrides`, once it has been told."""
    config.update(overrides or {})
    known = dict(
        model_impl=MODEL_IMPL, is_draft_model=False, hf_config=SimpleNamespace(architectures=["Llama4ForConditionalGeneration"]),
        hf_text_config=config, model_override_args={"text_config": overrides or {}}, context_len=context_len,
        disable_hybrid_swa_memory=False, sliding_window_size=None, is_hybrid_swa=True,
    )  # fmt: skip
    model_config = SimpleNamespace(**known | fields)
    _derive_layers(None, model_config)
    return model_config


def layers(config):
    """Of each layer whether it has chunks, RoPE and experts."""
    found = [layer_config(config, i) for i in range(config.num_hidden_layers)]
    return "".join("l"[: layer.chunk_size is not None] + "r"[: layer.use_rope] + "m"[: layer.is_moe] + "." for layer in found)


@pytest.mark.parametrize("fields, context_len, two_pools", [
    ({}, 8193, True),
    ({}, 8192, False),
    ({"attention_chunk_size": 64}, 65, True),
    ({"attention_chunk_size": None}, 100_000, False),
    ({"layer_types": ["chunked_attention"] * 4}, 100_000, False),
    ({"layer_types": ["full_attention"] * 4}, 100_000, False),
], ids=str)  # fmt: skip
def test_local_layers_have_a_pool_of_their_own_where_they_free_slots(fields, context_len, two_pools):
    found = derived(Llama4TextConfig(num_hidden_layers=4, **fields), context_len)
    assert found.is_hybrid_swa == two_pools
    assert (found.swa_attention_layer_ids, found.full_attention_layer_ids) == (([0, 1, 2], [3]) if two_pools else (None, None))


def test_slots_are_freed_by_chunks_alone():
    found = derived(Llama4TextConfig(num_hidden_layers=4, sliding_window=8), sliding_window_size=8)
    assert found.is_hybrid_swa and found.sliding_window_size is None


@pytest.mark.parametrize("overrides, expected", [
    ({}, "lrm.lrm.lrm.m."),
    ({"interleave_moe_layer_step": 2}, "lr.lrm.lr.m."),
    ({"moe_layers": [0], "interleave_moe_layer_step": 2}, "lrm.lr.lr.."),
    ({"no_rope_layer_interval": 2}, "lrm.m.lrm.m."),
    ({"no_rope_layers": [0, 1, 1, 0]}, "m.lrm.lrm.m."),
    ({"no_rope_layers": [0, 1, 1, 0], "layer_types": ["full_attention"] * 4}, "m.rm.rm.m."),
    ({"num_hidden_layers": 2}, "lrm.lrm."),
], ids=str)  # fmt: skip
def test_overrides_are_followed_by_what_was_derived_from_what_they_change(overrides, expected):
    config = Llama4TextConfig(num_hidden_layers=4)
    derived(config, overrides=overrides)
    assert layers(config) == expected


def test_overrides_of_a_text_only_checkpoint():
    config = Llama4TextConfig(num_hidden_layers=4, architectures=["Llama4ForCausalLM"])
    overrides = {"interleave_moe_layer_step": 4}
    derived(config, hf_config=config, overrides=overrides, model_override_args=overrides)
    assert layers(config) == "lr.lr.lr.m."


def test_a_model_without_experts_needs_no_rule_for_them():
    """An interleave_moe_layer_step of 0, from which no layer can be derived, is left as it is."""
    config = Llama4TextConfig(num_hidden_layers=4, moe_layers=[], interleave_moe_layer_step=0, num_local_experts=0, num_experts_per_tok=0)
    derived(config, overrides={"no_rope_layer_interval": 2})
    assert layers(config) == "lr..lr..", layers(config)


def test_overrides_that_leave_too_little():
    with pytest.raises(ValueError, match=r"interleave_moe_layer_step is 0, needs at least 1; a model without experts has moe_layers \[\]"):
        derived(Llama4TextConfig(num_hidden_layers=4), overrides={"interleave_moe_layer_step": 0})
    with pytest.raises(ValueError, match=r"rope_parameters is .*, needs a rope_type"):
        derived(Llama4TextConfig(num_hidden_layers=4), overrides={"rope_scaling": {"factor": 2.0}})
    with pytest.raises(ValueError, match="no_rope_layers has 4 entries for 8 layers"):
        derived(Llama4TextConfig(num_hidden_layers=4), overrides={"num_hidden_layers": 8})
    longer = {"num_hidden_layers": 8, "no_rope_layers": [1] * 8, "layer_types": ["full_attention"] * 4}
    with pytest.raises(ValueError, match="layer_types has 4 entries for 8 layers"):
        derived(Llama4TextConfig(num_hidden_layers=4), overrides=longer)


@pytest.mark.parametrize(
    "head_dim, heads, blocks, fits", [(64, 4, 2, True), (128, 2, 2, True), (96, 1, 1, True), (256, 1, 2, False), (96, 4, 3, False)]
)
@pytest.mark.parametrize("name", ["q_proj.weight_scale_inv", "k_proj.weight_scale"])
def test_rows_of_a_head_stay_in_the_block_of_their_scale(name, head_dim, heads, blocks, fits):
    model = Llama4ForConditionalGeneration.__new__(Llama4ForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.language_model = torch.nn.Module()
    model.language_model.config = Llama4TextConfig(head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=heads)
    scale = torch.rand(blocks, 2)
    with (
        nullcontext() if fits else pytest.raises(CheckpointError, match=f"head_dim is {head_dim}, {name} needs a head_dim that divides 128")
    ):
        assert model.permute_qk_weight_for_rotary(name, scale)[1] is scale


def test_norms_in_float32_do_without_a_kernel_that_has_16_bits_only(monkeypatch):
    """As on a GPU, where a norm with a residual has a kernel of float32, and one without has none."""

    def rmsnorm(x, weight, eps):
        assert x.dtype == torch.bfloat16, "failed to dispatch data type Float"
        return "of the kernel"

    monkeypatch.setattr(layernorm, "rmsnorm", rmsnorm, raising=False)
    norm, x = Llama4Norm(64), torch.randn(2, 64)
    torch.testing.assert_close(norm.forward_cuda(x), torch.nn.functional.rms_norm(x, (64,), eps=norm.variance_epsilon))
    normed, residual = norm.forward_cuda(x, x)
    torch.testing.assert_close((normed, residual), (norm.forward_cuda(2 * x), 2 * x))
    assert norm.forward_cuda(x.bfloat16()) == "of the kernel"
