"""Imports of other projects' packages; each function raises NotInstalled or ImportError with the reason where one cannot be used."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import PathFinder
from typing import Any

import torch

from llama4_kernels.bench.peers import NotInstalled


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotInstalled("needs an NVIDIA GPU, and torch finds none here")


def require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise NotInstalled(f"{name} is not installed")


def sgl_kernel() -> Any:
    return _imported("sgl_kernel")


def flash_attn_3() -> Any:
    return _imported("sgl_kernel.flash_attn")


def flashinfer() -> Any:
    return _imported("flashinfer")


def deep_gemm() -> Any:
    return _imported("deep_gemm")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile's, for as many shapes as a run has: past its limit of 8 torch would go on without compiling, with a warning."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def _imported(module: str) -> Any:
    require_package(module.partition(".")[0])
    require_gpu()
    return importlib.import_module(module)


@functools.cache
def flash_attn_4() -> Callable[..., Any]:
    require_package("flash_attn")
    require_gpu()
    for folder in list(sys.path):  # cutlass-dsl ships a .pth file, which a folder on PYTHONPATH does not run
        packages = pathlib.Path(folder) / "nvidia_cutlass_dsl" / "dsl_packages"
        if packages.is_dir() and str(packages) not in sys.path:
            sys.path.insert(0, str(packages))
    return importlib.import_module("flash_attn.cute").flash_attn_varlen_func


@functools.cache
def fbgemm() -> types.SimpleNamespace:
    require_package("fbgemm_gpu")
    require_gpu()
    import triton

    if isinstance(triton.next_power_of_2, types.FunctionType):  # as in Triton 3.6; FBGEMM's kernels call it, which no plain function may be
        triton.next_power_of_2 = triton.constexpr_function(triton.next_power_of_2)
    importlib.import_module("fbgemm_gpu.experimental.gen_ai")  # registers torch.ops.fbgemm
    triton_gemm = "fbgemm_gpu.experimental.gemm.triton_gemm"
    moe = "fbgemm_gpu.experimental.gen_ai.moe"
    gather = importlib.import_module(f"{moe}.gather_scatter")
    return types.SimpleNamespace(
        grouped_gemm_fp8_rowwise=importlib.import_module(f"{triton_gemm}.grouped_gemm").grouped_gemm_fp8_rowwise,
        quantize_fp8_row=importlib.import_module(f"{triton_gemm}.fp8_gemm").triton_quantize_fp8_row,
        gather_scale_quant=gather.gather_scale_quant_dense_tokens,
        scatter_add=gather.scatter_add_dense_tokens,
        silu_mul_quant=importlib.import_module(f"{moe}.activation").silu_mul_quant,
        ops=torch.ops.fbgemm,
    )


# What is used of SGLang: name here -> its name there, and the modules that have held it, the newest first
_TRITON_MOE = "srt.layers.moe.moe_runner.triton_utils"
_SGLANG = {
    "fused_experts": ("fused_experts", f"{_TRITON_MOE}.fused_moe"),
    "optimal_config": ("try_get_optimal_moe_config", f"{_TRITON_MOE}.fused_moe"),
    "align": ("moe_align_block_size", f"{_TRITON_MOE}.moe_align_block_size"),
    "MoeRunnerConfig": ("MoeRunnerConfig", "srt.layers.moe.moe_runner.base"),
    "fused_moe_kernel": ("fused_moe_kernel", "kernels.ops.moe.fused_moe_triton_kernels"),
    "should_enable_swap_ab": ("should_enable_swap_ab", "kernels.ops.moe.fused_moe_triton_kernels"),
    "scaled_fp8_quant": ("scaled_fp8_quant", "kernels.ops.quantization.fp8_kernel"),
    "silu_and_mul": ("silu_and_mul", "kernels.ops.activation.activation", "jit_kernel.activation"),
    "topk_sigmoid": ("topk_sigmoid", "kernels.ops.moe.moe_topk_sigmoid", "jit_kernel.moe_topk_sigmoid"),
    "fused_gate": ("moe_fused_gate", "kernels.ops.moe.moe_fused_gate", "jit_kernel.moe_fused_gate"),
    "fast_topk": ("fast_topk", "srt.utils"),
    "decode_attention": ("decode_attention_fwd", "kernels.ops.attention.decode_attention"),
    "extend_attention": ("extend_attention_fwd", "kernels.ops.attention.extend_attention"),
    "num_kv_splits": ("get_num_kv_splits_triton", "kernels.ops.attention.metadata"),
}


@functools.cache
def sglang() -> types.SimpleNamespace:
    """SGLang's kernels. Where SGLang is not wholly installed, packages whose __init__ pulls in the server are entered without it."""
    require_package("sglang")
    require_gpu()
    try:
        if importlib.util.find_spec("flashinfer") is None:
            _enter_sglang()
        # The only settings that the MoE kernels read, at SGLang's defaults
        settings = types.SimpleNamespace(enable_deterministic_inference=False, enable_fused_moe_sum_all_reduce=False)
        importlib.import_module("sglang.srt.runtime_context")._CONTEXT.set_server_args(settings)
        found = {name: _from_sglang(*where) for name, where in _SGLANG.items()}
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]  # so that the next peer says what is missing too
        raise
    return types.SimpleNamespace(**found, fp8_scaled_mm=sgl_kernel().fp8_scaled_mm)


@contextlib.contextmanager
def sglang_tiles(config: Mapping[str, int]) -> Iterator[None]:
    """Within it SGLang's MoE kernels are launched with these tiles instead of those that it would choose."""
    package = importlib.import_module(f"sglang.{_TRITON_MOE}")
    chosen = package.get_config
    package.get_config = lambda: dict(config)
    try:
        yield
    finally:
        package.get_config = chosen


def _from_sglang(name: str, *modules: str) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(f"sglang.{module}"), name)
        except ModuleNotFoundError as error:
            missing = error
    raise missing


def _enter_sglang() -> None:
    if "sglang" in sys.modules:
        raise NotInstalled("sglang was imported as a whole before, without flashinfer")
    if importlib.util.find_spec("IPython") is None:  # SGLang's frontend shows notebook output with it
        display = types.ModuleType("IPython.display")
        display.HTML = display.display = display.clear_output = None
        sys.modules["IPython"] = types.ModuleType("IPython")
        sys.modules["IPython"].display = sys.modules["IPython.display"] = display
    _bare_package("sglang").__version__ = importlib.import_module("importlib.metadata").version("sglang")
    importlib.import_module("sglang.srt")
    for name in ("layers", "layers.moe", "layers.moe.moe_runner", "layers.deep_gemm_wrapper"):
        _bare_package(f"sglang.srt.{name}")
    wrapper = sys.modules["sglang.srt.layers.deep_gemm_wrapper"]
    configurer = importlib.import_module("sglang.srt.layers.deep_gemm_wrapper.configurer")
    for name in ("ENABLE_JIT_DEEPGEMM", "DEEPGEMM_BLACKWELL", "DEEPGEMM_SCALE_UE8M0"):
        setattr(wrapper, name, getattr(configurer, name))
    base = importlib.import_module("sglang.srt.layers.moe.moe_runner.base")
    sys.modules["sglang.srt.layers.moe.moe_runner"].MoeRunnerConfig = base.MoeRunnerConfig


def _bare_package(name: str) -> types.ModuleType:
    """A package with its search path, but without running its __init__."""
    parent, _, child = name.rpartition(".")
    spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    module = types.ModuleType(name)
    module.__path__, module.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], child, module)
    return module
