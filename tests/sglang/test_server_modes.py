"""Flags of SGLang that this model refuses; tests/sglang/test_errors.py starts servers."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config

from llama4_kernels.ops.backend import OPS, Choice
from llama4_kernels.sglang import server_modes
from llama4_kernels.sglang.weights import adapt_quant_config

PLAIN = SimpleNamespace(
    parallel=SimpleNamespace(
        tp_size=2, moe_ep_size=1, pp_size=1, attn_cp_size=1, attn_dcp_size=1, moe_dp_size=1, dwdp_size=1, moe_dense_tp_size=None,
        dp_size=1, load_balance_method="round_robin",
    ),
    model=SimpleNamespace(is_embedding=False, kv_cache_dtype="auto", load_format="auto", weight_cache_mode="off"),
    spec=SimpleNamespace(speculative_algorithm=None, speculative_eagle_topk=None),
    disagg=SimpleNamespace(enable_pdmux=False, disaggregation_mode="null", disaggregation_transfer_backend="mooncake"),
    schedule=SimpleNamespace(max_queued_requests=None, enable_priority_scheduling=False),
    device=SimpleNamespace(device="cuda"),
    lora=SimpleNamespace(enable_lora=None),
    memory=SimpleNamespace(enable_unified_memory=False, enable_hierarchical_cache=False),
    deterministic=SimpleNamespace(enable_deterministic_inference=False),
    moe=SimpleNamespace(moe_runner_backend="auto", moe_a2a_backend="none", kt_weight_path=None, enable_paged_experts=False),
    overlap=SimpleNamespace(enable_two_batch_overlap=False, enable_single_batch_overlap=False),
    offload=SimpleNamespace(cpu_offload_gb=0, offload_group_size=-1),
    features=SimpleNamespace(enable_return_routed_experts=False, enable_mis=False),
)


def check(monkeypatch, **changes):
    """check_server() with the plain flags, but for {field: value} of each group named."""
    flags = copy.deepcopy(PLAIN)
    for group, fields in changes.items():
        vars(getattr(flags, group)).update(fields)
    monkeypatch.setattr(server_modes, "get_parallel", lambda: flags.parallel)
    monkeypatch.setattr(server_modes, "get_model", lambda: flags.model)
    monkeypatch.setattr(server_modes, "get_spec", lambda: flags.spec)
    monkeypatch.setattr(server_modes, "get_disagg", lambda: flags.disagg)
    monkeypatch.setattr(server_modes, "get_lora", lambda: flags.lora)
    monkeypatch.setattr(server_modes, "get_memory", lambda: flags.memory)
    monkeypatch.setattr(server_modes, "get_schedule", lambda: flags.schedule)
    monkeypatch.setattr(server_modes, "get_device", lambda: flags.device)
    monkeypatch.setattr(server_modes, "get_exec", lambda: flags)
    server_modes.check_server()


@pytest.mark.parametrize("changes", [
    {},
    {"model": {"kv_cache_dtype": "fp8_e4m3"}},
    {"parallel": {"moe_dense_tp_size": 2}},
    {"moe": {"moe_runner_backend": "triton"}},
    {"spec": {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}},
    {"spec": {"speculative_algorithm": "STANDALONE", "speculative_eagle_topk": 1}},
    {"parallel": {"dp_size": 2}},
    {"parallel": {"load_balance_method": "follow_bootstrap_room"}},
    {"parallel": {"dp_size": 2, "load_balance_method": "follow_bootstrap_room"}, "disagg": {"disaggregation_mode": "prefill"}},
    {"parallel": {"dp_size": 2, "load_balance_method": "follow_bootstrap_room"}, "disagg": {"disaggregation_transfer_backend": "fake"}},
    {"schedule": {"max_queued_requests": 0}},
    {"schedule": {"max_queued_requests": 1, "enable_priority_scheduling": True}},
    {"memory": {"enable_hierarchical_cache": True}},
], ids=str)  # fmt: skip
def test_what_the_model_serves(monkeypatch, changes):
    check(monkeypatch, **changes)


@pytest.mark.parametrize("changes, message", [
    ({"parallel": {"moe_ep_size": 2}}, "--ep-size 2, needs 1"),
    ({"parallel": {"pp_size": 2}}, "--pp-size 2, needs 1"),
    ({"parallel": {"attn_cp_size": 2}}, "--attn-cp-size 2, needs 1: attention reads whole sequences"),
    ({"parallel": {"moe_dp_size": 2}}, "--moe-dp-size 2, needs 1"),
    ({"parallel": {"attn_dcp_size": 2}}, "--dcp-size 2, needs 1: attention reads whole sequences"),
    ({"parallel": {"dwdp_size": 2}}, "--dwdp-size 2, needs 1"),
    ({"parallel": {"moe_dense_tp_size": 1}}, "--moe-dense-tp-size 1, needs --tp-size, 2: every rank has a part"),
    ({"moe": {"moe_runner_backend": "flashinfer_cutlass"}}, "--moe-runner-backend flashinfer_cutlass, needs auto or triton: the MoE layer"),
    ({"moe": {"moe_a2a_backend": "deepep"}}, "--moe-a2a-backend deepep, needs none: every rank has a part"),
    ({"moe": {"kt_weight_path": "/experts"}}, "--kt-weight-path, needs every expert on the GPU"),
    ({"moe": {"enable_paged_experts": True}}, "--enable-paged-experts, needs every expert on the GPU"),
    ({"offload": {"cpu_offload_gb": 1}}, "--cpu-offload-gb 1, needs 0: the MoE layer"),
    ({"offload": {"offload_group_size": 2}}, "--offload-group-size 2, needs weights that stay"),
    ({"features": {"enable_return_routed_experts": True}}, "--enable-return-routed-experts, needs answers without"),
    ({"features": {"enable_mis": True}}, "--enable-mis, needs a sequence for each item"),
    ({"overlap": {"enable_two_batch_overlap": True}}, "--enable-two-batch-overlap, needs batches in one piece"),
    ({"overlap": {"enable_single_batch_overlap": True}}, "--enable-single-batch-overlap, needs the MoE layer in one piece"),
    ({"memory": {"enable_unified_memory": True}}, "--enable-unified-memory, needs K and V of a layer in one piece"),
    ({"disagg": {"enable_pdmux": True}}, "--enable-pdmux, needs prefills of all layers at once"),
    ({"lora": {"enable_lora": True}}, "--enable-lora, needs weights without adapters"),
    ({"model": {"load_format": "sharded_state"}}, "--load-format sharded_state, needs auto or safetensors or"),
    ({"model": {"weight_cache_mode": "client"}}, "--weight-cache-mode client, needs off: the MoE layer's weights"),
    ({"model": {"is_embedding": True}}, "--is-embedding, needs a model with a pooling layer"),
    ({"model": {"kv_cache_dtype": "fp8_e5m2"}}, "--kv-cache-dtype fp8_e5m2, needs auto or bf16 or bfloat16 or fp8_e4m3"),
    ({"model": {"kv_cache_dtype": "mxfp8"}}, "--kv-cache-dtype mxfp8, needs auto"),
    ({"deterministic": {"enable_deterministic_inference": True}}, "--enable-deterministic-inference, needs ops whose bits"),
    ({"spec": {"speculative_algorithm": "NGRAM", "speculative_eagle_topk": 1}}, "--speculative-algorithm NGRAM, needs EAGLE or EAGLE3 or"),
    ({"spec": {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 4}}, "--speculative-eagle-topk 4, needs 1: drafts of one"),
    ({"parallel": {"dp_size": 2, "load_balance_method": "follow_bootstrap_room"}}, "--load-balance-method follow_bootstrap_room, needs"),
    ({"schedule": {"max_queued_requests": 0, "enable_priority_scheduling": True}}, "--max-queued-requests 0, needs 1 or more with"),
    ({"device": {"device": "cpu"}, "memory": {"enable_hierarchical_cache": True}}, "--enable-hierarchical-cache on the CPU, needs a GPU"),
], ids=str)  # fmt: skip
def test_what_the_model_refuses(monkeypatch, changes, message):
    with pytest.raises(ValueError, match=f"does not serve Llama 4 with {message}"):
        check(monkeypatch, **changes)


@pytest.mark.parametrize("variable, value, needs", [
    ("SGLANG_USE_HND_KVCACHE", 1, "a cache in which the heads"),
    ("SGLANG_SIMULATE_UNIFORM_EXPERTS", 1, "tokens that go to the experts of their router"),
    ("SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS", 1, "tokens that go to the experts of their router"),
    ("SGLANG_USE_PICKLE_IPC", 0, "1: SGLang's scheduler ends at a nested field"),
])  # fmt: skip
def test_variables_that_the_model_refuses(monkeypatch, variable, value, needs):
    monkeypatch.setenv(variable, str(value))
    with pytest.raises(ValueError, match=f"with {variable}={value}, needs {needs}"):
        check(monkeypatch)


GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch):
    """A server on a GPU of the capability given, with graphs or without, whose model's ops run in Triton but for those in `reference`."""

    def make(capability, graphs=True, kv_cache_dtype="auto", reference=()):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
        monkeypatch.setattr(server_modes, "cuda_graph_fully_disabled", lambda: not graphs)
        monkeypatch.setattr(server_modes, "get_model", lambda: SimpleNamespace(kv_cache_dtype=kv_cache_dtype))
        taken = [Choice(op, "reference" if op in reference else "triton", "asked for") for op in OPS]
        monkeypatch.setattr(server_modes.backend, "choices", lambda device: taken)

    return make


@pytest.mark.parametrize("capability, is_fp8, given", [
    ((8, 0), False, {}),
    ((8, 0), True, {"graphs": False, "kv_cache_dtype": "fp8_e4m3", "reference": ["chunked_attention"]}),
    ((8, 9), True, {"kv_cache_dtype": "fp8_e4m3"}),
    ((9, 0), True, {"reference": ["grouped_gemm"]}),
], ids=str)  # fmt: skip
def test_what_graphs_capture(a_gpu, capability, is_fp8, given):
    a_gpu(capability, **given)
    server_modes.check_graphs(GPU, is_fp8=is_fp8, checkpoint_cache="none")


def test_a_flag_keeps_the_cache_that_the_checkpoint_asks_for_from_graphs(a_gpu):
    a_gpu((8, 0), kv_cache_dtype="bfloat16")
    server_modes.check_graphs(GPU, is_fp8=False, checkpoint_cache="fp8")
    a_gpu((8, 0))
    with pytest.raises(
        ValueError, match="with the FP8 KV cache that the checkpoint asks for in CUDA graphs .* needs --kv-cache-dtype bfloat16"
    ):
        server_modes.check_graphs(GPU, is_fp8=False, checkpoint_cache="fp8")


@pytest.mark.parametrize("is_fp8, given, message", [
    (True, {}, "with FP8 weights in CUDA graphs on NVIDIA A100: before compute capability 8.9 .* needs bf16 weights, or --cuda-graph"),
    (False, {"kv_cache_dtype": "fp8_e4m3"}, "with --kv-cache-dtype fp8_e4m3 in CUDA graphs on NVIDIA A100: .* needs bfloat16, or --cuda-graph"),
    *((False, {"reference": [op]}, rf"computes {op} on cuda:0 in plain PyTorch.* \(asked for\), needs --cuda-graph")
      for op in ("fused_moe", "rope_qk_norm", "chunked_attention")),
], ids=str)  # fmt: skip
def test_what_graphs_cannot_capture(a_gpu, is_fp8, given, message):
    a_gpu((8, 0), **given)
    with pytest.raises(ValueError, match=message):
        server_modes.check_graphs(GPU, is_fp8=is_fp8, checkpoint_cache="none")
    server_modes.check_graphs(torch.device("cpu"), is_fp8=is_fp8, checkpoint_cache="none")


def test_checks_of_values_are_not_captured(a_gpu, monkeypatch):
    monkeypatch.setenv("LLAMA4_KERNELS_CHECK_VALUES", "1")
    a_gpu((9, 0), graphs=False)
    server_modes.check_graphs(GPU, is_fp8=False, checkpoint_cache="none")
    a_gpu((9, 0))
    with pytest.raises(ValueError, match="LLAMA4_KERNELS_CHECK_VALUES=1 has ops read values on the host, .* needs --cuda-graph"):
        server_modes.check_graphs(GPU, is_fp8=False, checkpoint_cache="none")


@pytest.mark.parametrize("name", ["w8a8_fp8", "mxfp8", "awq"])
def test_quantisations_that_the_model_refuses(name):
    needs = "needs fp8 or compressed_tensors or modelopt_fp8"
    with pytest.raises(ValueError, match=f"does not serve Llama 4 quantised as {name}, {needs}"):
        adapt_quant_config(SimpleNamespace(get_name=lambda: name))


@pytest.mark.parametrize("size, refused", [([128, 128], False), ([64, 64], True), ([1, 128], True)])
@pytest.mark.parametrize("kind", ["fp8", "compressed-tensors"])
def test_blocks_that_share_a_scale(kind, size, refused):
    if kind == "fp8":
        quant_config, name = Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=size), "weight_block_size"
    else:
        block = FLOAT | {"strategy": "block", "block_structure": size}
        inputs = PER_TOKEN | {"strategy": "group", "group_size": 128}
        quant_config, name = (
            CompressedTensorsConfig.from_config(groups(("float-quantized", ["Linear"], block, inputs))),
            "block_structure of Linear",
        )
    with pytest.raises(ValueError, match=rf"with {name} \[{size[0]}, {size[1]}\], needs \[128, 128\]") if refused else nullcontext():
        adapt_quant_config(quant_config)


FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
PER_TOKEN = FLOAT | {"strategy": "token", "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}


def groups(*groups):
    """The quantization_config of compressed-tensors with a group for each (format, targets, weights, input activations)."""
    names = ("format", "targets", "weights", "input_activations")
    return {"format": groups[0][0], "config_groups": {f"group_{i}": dict(zip(names, group)) for i, group in enumerate(groups)}}


@pytest.mark.parametrize("config, refused", [
    (groups(("float-quantized", ["Linear"], FLOAT, PER_TOKEN)), None),
    (groups(("pack-quantized", ["Linear"], INT4, None)), "weights of Linear quantised as int of 4 bits"),
    (groups(("float-quantized", ["Linear"], FLOAT, None)), "input_activations of Linear quantised as none"),
    (groups(("int-quantized", ["Linear"], INT8, INT8 | {"strategy": "token", "dynamic": True})), "weights of Linear quantised as int of 8 bits"),
    (
        groups(("float-quantized", ["re:.*self_attn.*"], FLOAT, PER_TOKEN), ("pack-quantized", ["re:.*mlp.*"], INT4, None)),
        r"weights of re:\.\*mlp\.\* quantised as int of 4 bits",
    ),
], ids=["fp8", "w4a16", "w8a16", "int8", "mixed"])  # fmt: skip
def test_compressed_tensors_that_the_model_refuses(config, refused):
    quant_config = CompressedTensorsConfig.from_config(config)
    if refused is None:
        adapt_quant_config(quant_config)
        return
    with pytest.raises(ValueError, match=f"does not serve Llama 4 with {refused}, needs float of 8 bits"):
        adapt_quant_config(quant_config)
