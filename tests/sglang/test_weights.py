"""What SGLang's layers hold after loading, with its own layers and quantisation schemes."""

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.model_executor.model_runner_components.weight_updater import _unsupported_derived_weight_cache_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama4_kernels.sglang.weights import (
    REPACKED,
    REQUANTISED,
    _keep_experts,
    _keep_linear,
    adapt_quant_config,
    adapt_text_only,
    adopt,
    moe_is_fp8,
)

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


def linear(quant_config, name, dtype=torch.float32):
    """A model whose only layer is `name`, for activations of `dtype`, adopted."""
    model = nn.ModuleDict({name: ReplicatedLinear(K, N, bias=False, params_dtype=dtype, quant_config=quant_config, prefix=name)})
    adopt(model)
    return model, model[name]


def load(layer, seed):
    """A checkpoint's weight and scale, through SGLang's loaders, and what SGLang does after loading."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        parameter.weight_loader(parameter, torch.rand(parameter.shape, generator=generator).to(parameter.dtype))
    layer.quant_method.process_weights_after_loading(layer)


def test_a_bias_is_added_to_what_an_fp8_layer_computes():
    _, layer = linear(config(one=("Linear", CHANNEL, PER_TOKEN)), "q_proj")
    load(layer, 0)
    x, bias = torch.rand(2, 3, K), torch.rand(N)
    without = layer.quant_method.apply(layer, x)
    assert without.shape == (2, 3, N) and torch.equal(layer.quant_method.apply(layer, x, bias), without + bias)


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


def layer_of(**parameters):
    """A layer as SGLang leaves it when it has loaded a checkpoint; each parameter by its values, weights by their shape."""
    layer = nn.Module()
    layer.quant_method = None
    for name, value in parameters.items():
        value = torch.zeros(value, dtype=torch.float8_e4m3fn) if name.endswith("weight") else torch.tensor(value)
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return layer


def test_scales_per_tensor_stay_with_what_was_fused():
    """q, k and v of unlike widths; the activations' scale is the largest, as SGLang takes it."""
    layer = layer_of(weight=(6, 4), weight_scale=[1.0, 2.0, 3.0], input_scale=[0.5, 2.0, 1.0])
    layer.logical_widths = [3, 2, 1]
    _keep_linear(layer)
    assert layer.ops_weight.scale.tolist() == [1, 1, 1, 2, 2, 3] and layer.ops_weight.input_scale.item() == 2


def test_scales_per_tensor_stay_with_gate_and_up_and_are_loaded_again_in_place():
    layer = layer_of(
        w13_weight=(2, 4, 4), w13_weight_scale=[[1.0, 2.0], [3.0, 4.0]], w13_input_scale=[1.0, 3.0],
        w2_weight=(2, 4, 2), w2_weight_scale=[5.0, 6.0], w2_input_scale=[7.0, 5.0],
    )  # fmt: skip
    _keep_experts(layer)
    assert layer.ops_w13.scale.tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]] and layer.ops_w13.input_scale.item() == 3
    assert layer.ops_w2.scale.tolist() == [5, 6] and layer.ops_w2.input_scale.item() == 7
    kept = [scale.data_ptr() for linear in (layer.ops_w13, layer.ops_w2) for scale in (linear.scale, linear.input_scale)]
    for name, parameter in layer.named_parameters():
        if name.endswith("scale"):
            parameter.data.mul_(2)
    _keep_experts(layer)
    assert layer.ops_w13.scale.tolist() == [[2, 2, 4, 4], [6, 6, 8, 8]] and layer.ops_w13.input_scale.item() == 6
    assert layer.ops_w2.scale.tolist() == [10, 12] and layer.ops_w2.input_scale.item() == 14
    assert kept == [scale.data_ptr() for linear in (layer.ops_w13, layer.ops_w2) for scale in (linear.scale, linear.input_scale)]


def test_scales_of_blocks_as_wide_as_the_weight_stay_one_for_each_block():
    scale = [[1.0], [2.0]]
    layer = layer_of(weight=(256, 128), weight_scale_inv=scale)
    layer.logical_widths = [256]
    _keep_linear(layer)
    assert layer.ops_weight.scale.tolist() == scale
    layer = layer_of(w13_weight=(1, 256, 128), w13_weight_scale_inv=[scale], w2_weight=(1, 256, 128), w2_weight_scale_inv=[scale])
    _keep_experts(layer)
    assert layer.ops_w13.scale.tolist() == layer.ops_w2.scale.tolist() == [scale]


@pytest.mark.parametrize(
    "name, is_quantised, expected", [("shared_expert", True, True), ("shared_expert", False, False), ("q_proj", True, False)]
)
def test_whether_the_moe_layers_are_fp8(name, is_quantised, expected):
    model, _ = linear(config(one=("Linear", CHANNEL, PER_TOKEN)) if is_quantised else None, name)
    assert moe_is_fp8(model) == expected


@pytest.mark.parametrize("method, expected", [(Fp8MoEMethod.__new__(Fp8MoEMethod), True), (UnquantizedFusedMoEMethod(), False)])
def test_whether_the_routed_experts_are_fp8(method, expected):
    experts = FusedMoE.__new__(FusedMoE)
    nn.Module.__init__(experts)
    experts.quant_method = method
    assert moe_is_fp8(nn.ModuleDict({"experts": experts})) == expected


class Ops(TorchDispatchMode):
    """The names of the PyTorch ops that run within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def test_layers_in_float32_run_ours_on_a_gpu_too(monkeypatch):
    """SGLang's kernels give 16 bits. A step makes no tensor of numbers on the host, which a CUDA graph does not capture."""
    quant_config = config(one=("Linear", CHANNEL, PER_TOKEN))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, layer = linear(quant_config, "q_proj", torch.float32)
    load(layer, 0)
    with Ops() as ops:
        out, _ = layer(torch.ones(3, K))
    weight = layer.weight.float() * layer.weight_scale
    torch.testing.assert_close(out, weight.sum(1).expand(3, N))
    assert "aten::lift_fresh" not in ops.names and "aten::arange" in ops.names
    assert _unsupported_derived_weight_cache_error(model) is None


def test_layers_that_sglang_repacks_are_not_updated(monkeypatch):
    """As on a GPU, where attention and dense MLPs run SGLang's kernels: what these are served from stays, and updates are refused."""
    quant_config = config(one=("Linear", CHANNEL, PER_TOKEN))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, layer = linear(quant_config, "q_proj", torch.bfloat16)
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
    model, layer = linear(Fp8Config(), "q_proj", torch.bfloat16)
    load(layer, 0)
    assert _unsupported_derived_weight_cache_error(model) == REQUANTISED


def test_layers_that_sglang_leaves_as_they_are_loaded_are_updated(monkeypatch):
    quant_config = config(one=("Linear", BLOCK, PER_GROUP))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, layer = linear(quant_config, "q_proj", torch.bfloat16)
    load(layer, 0)
    address, before = layer.weight.data_ptr(), layer.weight.float().clone()
    assert _unsupported_derived_weight_cache_error(model) is None
    load(layer, 1)
    assert layer.weight.data_ptr() == address and not torch.equal(layer.weight.float(), before)
