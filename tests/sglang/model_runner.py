"""What SGLang makes of a checkpoint, and of a machine of known memory, without a server around it.

The memory is a pretended one: FREE bytes, of which a process has taken what its live tensors hold, as a GPU that nobody shares.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import preloaded

FREE = 384 << 20
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_NCCL_SO_PATH": "/none"}


def reports(flags: Sequence[str], ranks: int) -> list[dict]:
    """The model runner's weights and pools, of each rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = "|".join(str(rank % os.cpu_count()) for rank in range(ranks))
    with preloaded.processes(ranks, ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": threads}) as pool:
        jobs = [pool.submit(_report, [*flags, f"--tp-size={ranks}"], rank, port) for rank in range(ranks)]
        return [job.result(timeout=120) for job in jobs]


def settings(flags: Sequence[str], gpu_mib: float) -> dict:
    """What SGLang chooses for CUDA devices of `gpu_mib`."""
    with preloaded.processes(1, ENVIRONMENT) as pool:
        return pool.submit(_settings, list(flags), gpu_mib).result(timeout=120)


def classes(path: Path, environment: Mapping[str, str]) -> tuple[dict[str, str], float]:
    """The module of the class that is built, by --model-impl, and the seconds of start-up that the plugin takes for its own."""
    with preloaded.processes(1, environment) as pool:
        return pool.submit(_classes, str(path)).result(timeout=120)


def _classes(path: str) -> tuple[dict[str, str], float]:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import utils
    from sglang.srt.plugins import load_plugins

    def module(implementation: str) -> str:
        return utils.get_model_architecture(ModelConfig(path, model_impl=implementation))[0].__module__

    assert "llama4_kernels" not in sys.modules
    started = time.process_time()
    load_plugins()
    ours = module("llama4_kernels")
    seconds = time.process_time() - started
    return {"llama4_kernels": ours, "auto": module("auto")}, seconds


def _report(flags: list[str], rank: int, port: int) -> dict:
    """Load the model and make its pools as rank `rank`, through the code that the server runs."""
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs, prepare_server_args
    from sglang.srt.utils import common

    load_plugins()
    common.get_free_cpu_memory = lambda: FREE - _live_tensor_bytes()
    args = prepare_server_args(flags)
    world_rank = one_batch.spawn_world_rank(args, tp_rank=rank, pp_rank=0)
    one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=world_rank, gpu_id=rank))
    ports = PortArgs.init_new(args)
    ports.nccl_port = port
    runner = one_batch.load_model(args, ports, rank, rank)[0].torch_runner
    tables = {name.split(".")[-1]: buffer for name, buffer in runner.model.named_buffers()}
    return {
        "weight_bytes": round(runner.weight_load_mem_usage * (1 << 30)),
        "tokens": runner.max_total_num_tokens,
        "swa_tokens": runner.swa_max_total_num_tokens if runner.is_hybrid_swa else None,
        "kv_bytes": int(sum(runner.token_to_kv_pool.get_kv_size_bytes())),
        "requests": runner.max_running_requests,
        "rope_table_bytes": tables["cos_sin_cache"].nbytes,
        "tables_that_survive": [name for name, table in sorted(tables.items()) if _survives(runner.model, table)],
        "request_table_bytes": runner.req_to_token_pool.req_to_token.nbytes,
    }


def _live_tensor_bytes() -> int:
    import torch

    with warnings.catch_warnings(action="ignore"):
        tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device.type == "cpu"}
    return sum(storages.values())


def _survives(model, tensor) -> bool:
    """Whether `tensor` of the model comes back when SGLang has given its memory up and taken it again: only what it has exported does."""
    from sglang.srt.managers.scheduler_components import weight_updater

    kept, before = weight_updater._export_static_state(model), tensor.clone()
    tensor.zero_()
    weight_updater._import_static_state(model, kept)
    return tensor.equal(before)


def _settings(flags: list[str], gpu_mib: float) -> dict:
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    memory_hook.get_device_memory_capacity = lambda device=None: gpu_mib
    args = prepare_server_args(flags)
    args.resolve_once()
    chosen = resolved_view(args)
    return {
        "mem_fraction_static": chosen.mem_fraction_static,
        "chunked_prefill_size": chosen.chunked_prefill_size,
        "cuda_graph_max_bs": chosen.cuda_graph_config.decode.max_bs,
        "prefill_graphs": len(chosen.cuda_graph_config.prefill.bs),
    }
