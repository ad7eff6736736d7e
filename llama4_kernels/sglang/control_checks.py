"""Control requests that end SGLang 0.5.23's server, or have it wait for good. They are refused before a scheduler gets them, with status 400."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ACTIVITIES = {"CPU", "GPU", "MEM", "CUDA_PROFILER"}  # that a profile on a GPU may have


def _check_group(manager, request) -> None:
    if not request.group_name:
        raise ValueError("group_name is empty, needs a name")


def _check_release(manager, request) -> None:
    from sglang.srt.runtime_context import get_device, get_serving

    if get_device().device == "cpu":
        raise ValueError("memory is not released on the CPU, needs a server on a GPU")
    workers = get_serving().tokenizer_worker_num
    if workers != 1:
        raise ValueError(
            f"--tokenizer-worker-num is {workers}, needs 1 to release memory: the processes do not know of each other's requests"
        )
    if manager.rid_to_state and not manager.is_pause:
        raise ValueError(f"the server has {len(manager.rid_to_state)} requests, needs to have none, or to be paused, to release its memory")
    _released(manager).update(_tags(request))


def _check_resume(manager, request) -> None:
    tags, released = _tags(request), _released(manager)
    if set(tags) - released or len(set(tags)) < len(tags):
        raise ValueError(f"tags is {tags}, needs each once of what has been released, {sorted(released) or 'nothing yet'}")
    released.difference_update(tags)


def _check_continue(manager, request) -> None:
    if manager.rid_to_state:
        check_memory(manager)


def _resume_to_abort(manager, request) -> None:
    """Before generation is paused by aborts, let a server go on that is paused already: an abort ends with the next step, for which SGLang
    would wait, and have /continue_generation wait too. After a pause by aborts there is nothing to let go on."""
    paused_by, manager.llama4_kernels_pause = getattr(manager, "llama4_kernels_pause", None), request.mode
    if request.mode != "abort" or not manager.is_pause or paused_by == "abort":
        return
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    _check_continue(manager, None)
    manager.abort_request(abort_all=True)
    manager._dispatch_to_scheduler(ContinueGenerationReqInput(torch_empty_cache=False))


def check_memory(manager) -> None:
    """ValueError while memory is released that generation needs."""
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_exec

    released = _released(manager) - (set() if envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH.get() else {"cuda_graph"})  # which else is not
    if released and get_exec().features.enable_memory_saver:  # without which nothing is released
        raise ValueError(f"the memory of {', '.join(sorted(released))} is released, needs /resume_memory_occupation first")


def _check_profile(manager, request) -> None:
    """A profile ends the scheduler where it cannot be started or written."""
    from sglang.srt.runtime_context import get_device

    if request is None:
        return
    # SGLang leaves out names that it does not know. RPD is AMD's.
    known, others = ({"CPU"}, {"RPD", "MEM", "CUDA_PROFILER"}) if get_device().device == "cpu" else (ACTIVITIES, {"RPD"})
    if request.activities is not None and (not known & set(request.activities) or others & set(request.activities)):
        raise ValueError(f"activities is {request.activities}, needs some of {sorted(known)}, and none of {sorted(others)}")
    if request.profile_by_stage and (request.num_steps or 0) < 1:
        raise ValueError(f"num_steps is {request.num_steps}, needs at least 1 with profile_by_stage")
    _check_trace(request)


def _check_trace(request) -> None:
    """That there can be a file of the name that SGLang gives a trace."""
    folder = request.output_dir or os.getenv("SGLANG_TORCH_PROFILER_DIR", "/tmp")
    name = "-".join(filter(None, (request.profile_prefix, request.profile_id or "0")))
    try:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=name, suffix="-TP-00-DP-00-EXTEND.trace.json.gz"):
            pass
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"output_dir is {request.output_dir!r}, profile_prefix {request.profile_prefix!r} and profile_id {request.profile_id!r}, "
            f"needs a folder and the name of a file that can be written: {error}"
        ) from error


def _check_sleep(manager, request) -> None:
    from sglang.srt.runtime_context import get_device

    # The watchdog, which ends a scheduler that has run nothing for so long, looks twice in that time.
    seconds, longest = request.forward_sleep_time, get_device().watchdog_timeout / 2
    if seconds is not None and not seconds <= longest:
        raise ValueError(f"forward_sleep_time is {seconds}, needs at most {longest:g} seconds, half of --watchdog-timeout")


def _refuse_experts(manager, request) -> None:
    raise ValueError("the distribution of experts is not recorded: the model does not keep which experts a token took")


def _refuse_sending(manager, request) -> None:
    raise ValueError("weights are not sent to other instances: those that the model serves are laid out for its own kernels")


# By the method of TokenizerManager that sends the request to the schedulers. Each takes the manager and the request, None for a method
# without, and raises ValueError, or sends what has to come first.
CHECKS: Mapping[str, Callable[..., None]] = {
    "init_weights_update_group": _check_group,
    "release_memory_occupation": _check_release,
    "resume_memory_occupation": _check_resume,
    "continue_generation": _check_continue,
    "pause_generation": _resume_to_abort,
    "start_profile": _check_profile,
    "slow_down": _check_sleep,
    "start_expert_distribution_record": _refuse_experts,
    "stop_expert_distribution_record": _refuse_experts,
    "dump_expert_distribution_record": _refuse_experts,
    "init_weights_send_group_for_remote_instance": _refuse_sending,
    "send_weights_to_remote_instance": _refuse_sending,
}


def _tags(request) -> list[str]:
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

    return list(request.tags or GPU_MEMORY_ALL_TYPES)


def _released(manager) -> set[str]:
    """The tags of memory that is released, which is kept with the manager."""
    return manager.__dict__.setdefault("llama4_kernels_released", set())
