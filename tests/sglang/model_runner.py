"""What SGLang makes of a machine of known memory, without a server around it.

Run as a script: reads a JSON list of cases from standard input and prints one line of JSON for each rank of each.
{"flags": [...], "tp": n}: the model runner's weights and pools. The memory is a pretended one: FREE bytes, of which this process has taken
what its live tensors hold, as a GPU that nobody shares.
{"flags": [...], "gpu_mib": n}: the settings that SGLang chooses for GPUs of that size.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import traceback
import warnings

FREE = 384 << 20


def live_tensor_bytes() -> int:
    import torch

    with warnings.catch_warnings(action="ignore"):
        tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device.type == "cpu"}
    return sum(storages.values())


def report(flags: list[str], rank: int, port: int) -> dict:
    """Load the model and make its pools as rank `rank`, through the code that the server runs."""
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, prepare_server_args

    args = prepare_server_args(flags)
    ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(args, tp_rank=rank, pp_rank=0), gpu_id=rank)
    one_batch.publish(args, role="scheduler", ranks=ranks)
    ports = PortArgs.init_new(args)
    ports.nccl_port = port
    runner = one_batch.load_model(args, ports, rank, rank)[0].torch_runner
    table = next(buffer for name, buffer in runner.model.named_buffers() if name.endswith("cos_sin_cache"))
    return {
        "rank": rank,
        "weight_bytes": round(runner.weight_load_mem_usage * (1 << 30)),
        "tokens": runner.max_total_num_tokens,
        "swa_tokens": runner.swa_max_total_num_tokens if runner.is_hybrid_swa else None,
        "kv_bytes": int(sum(runner.token_to_kv_pool.get_kv_size_bytes())),
        "requests": runner.max_running_requests,
        "rope_table_bytes": table.nbytes,
        "rope_table_survives": survives(runner.model, table),
        "request_table_bytes": runner.req_to_token_pool.req_to_token.nbytes,
    }


def survives(model, tensor) -> bool:
    """Whether `tensor` of the model comes back when SGLang has given its memory up and taken it again: only what it has exported does."""
    from sglang.srt.managers.scheduler_components import weight_updater

    kept, before = weight_updater._export_static_state(model), tensor.clone()
    tensor.zero_()
    weight_updater._import_static_state(model, kept)
    return tensor.equal(before)


def settings(flags: list[str], gpu_mib: float) -> dict:
    """SGLang's defaults for CUDA devices of `gpu_mib`."""
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

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


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch  # noqa: F401  imported once, for all forks
    from sglang.srt.utils import common

    common.get_free_cpu_memory = lambda: FREE - live_tensor_bytes()
    for case in json.load(sys.stdin):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        ranks = case.get("tp", 1)
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % os.cpu_count()) for rank in range(ranks))
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                try:
                    if "gpu_mib" in case:
                        found = settings(case["flags"], case["gpu_mib"])
                    else:
                        found = report([*case["flags"], f"--tp-size={ranks}"], rank, port)
                    os.write(3, f"{json.dumps(found)}\n".encode())
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            children.append(child)
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            sys.exit(f"{case} failed")


if __name__ == "__main__":
    os.dup2(1, 3)  # the reports' way out; what SGLang prints goes to stderr
    os.dup2(2, 1)
    main()
