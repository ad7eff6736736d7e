"""What SGLang's layers hold after loading, with its own layers and quantisation schemes."""

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.model_executor.model_runner_components.weight_updater import _unsupported_derived_weight_cache_error
from torch import nn

from llama4_kernels.sglang.weights import REPACKED, REQUANTISED, adapt_quant_config, adapt_text_only, adopt

N, K = 256, 384
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
BLOCK = CHANNEL | {"strategy": "block", "block_structure": [128, 128]}
PER_TOKEN = CHANNEL | {"strategy": "token", "dynamic": True}
PER_GROUP = CHANNEL | {"strategy": "group", "group_size": 128, "dynamic": True}


def config(**targets):
    groups = {
        name: {"targets": [target], "weights": weights, "input_activations": inputs} for name, (target, weights, inputs) in targets.items()
    }
    found = CompressedTensorsConfig.from_config({"format": "float-quantized", "config_groups": groups})
    adapt_quant_config(found)
    return found


def linear(quant_config, name):
    """A model whose only layer is `name`, adopted."""
    model = nn.ModuleDict({name: ReplicatedLinear(K, N, bias=False, params_dtype=torch.float32, quant_config=quant_config, prefix=name)})
    adopt(model)
    return model, model[name]


def load(layer, seed):
    """A checkpoint's weight and scale, through SGLang's loaders, and what SGLang does after loading."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        parameter.weight_loader(parameter, torch.rand(parameter.shape, generator=generator).to(parameter.dtype))
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    "spelt", ["model.layers.0.q_proj", "language_model.model.layers.0.q_proj", r"re:^language_model\.model\..*q_proj", "re:.*q_proj"]
)
def test_a_text_only_model_leaves_alone_what_its_list_names_with_or_without_a_prefix(spelt):
    found = config(one=("Linear", CHANNEL, PER_TOKEN))
    found.ignore = [spelt]
    adapt_text_only(found)
    for name, dtype in (("model.layers.0.q_proj", torch.float32), ("model.layers.0.k_proj", torch.float8_e4m3fn)):
        layer = ReplicatedLinear(K, N, bias=False, params_dtype=torch.float32, quant_config=found, prefix=name)
        assert layer.weight.dtype == dtype


@pytest.mark.parametrize("name, scale", [("q_proj", (N,)), ("down_proj", (2, 3))])
def test_scales_per_channel_beside_scales_per_block(name, scale):
    mixed = config(one=("re:.*q_proj", CHANNEL, PER_TOKEN), other=("Linear", BLOCK, PER_GROUP))
    _, layer = linear(mixed, name)
    load(layer, 0)
    assert layer.ops_weight.scale.shape == scale


def test_layers_that_sglang_repacks_are_not_updated(monkeypatch):
    """As on a GPU, where attention and dense MLPs run SGLang's kernels: what these are served from stays, and updates are refused."""
    quant_config = config(one=("Linear", CHANNEL, PER_TOKEN))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, layer = linear(quant_config, "q_proj")
    load(layer, 0)
    served = layer.weight
    assert served.shape == (K, N) and not hasattr(served, "weight_loader")
    assert _unsupported_derived_weight_cache_error(model) == REPACKED
    layer.quant_method.process_weights_after_loading(layer)  # /begin_weight_update and /end_weight_update
    assert layer.weight is served


def test_layers_that_sglang_quantises_are_not_updated(monkeypatch):
    def quantise(method, layer):
        layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn).t(), requires_grad=False)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Fp8LinearMethod, "process_weights_after_loading", quantise)
    model, layer = linear(Fp8Config(), "q_proj")
    load(layer, 0)
    assert _unsupported_derived_weight_cache_error(model) == REQUANTISED


def test_layers_that_sglang_leaves_as_they_are_loaded_are_updated(monkeypatch):
    quant_config = config(one=("Linear", BLOCK, PER_GROUP))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, layer = linear(quant_config, "q_proj")
    load(layer, 0)
    address, before = layer.weight.data_ptr(), layer.weight.float().clone()
    assert _unsupported_derived_weight_cache_error(model) is None
    load(layer, 1)
    assert layer.weight.data_ptr() == address and not torch.equal(layer.weight.float(), before)
