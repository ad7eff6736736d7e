"""How long a call takes: on a GPU by replaying a CUDA graph with a cold L2 cache, on a CPU by the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama4_kernels.bench.record import Timing

GPU_ROUNDS, CPU_ROUNDS = 50, 10
CPU_SECONDS = 1.0
REPLAY_US = 500.0
MAX_CALLS = 32
ESTIMATED_CALLS = 4
CACHE_READS = 4  # before each replay: they take longer than the host needs to launch it
Call = Callable[[], Any]


def time_calls(calls: Sequence[Call], device: torch.device, rounds: int | None = None, *, graph: bool = True) -> tuple[Timing, list[str]]:
    """The time of one of `calls`, which do the same on inputs in different memory, and what a reader must know about it.

    On a GPU the calls are captured into one CUDA graph. Before each replay a buffer larger than the L2 cache is read, untimed, so that
    no input of any call is in the cache when it starts, and nothing of the replay waits for the host; each call has its own inputs, so
    that none finds another's. Calls that cannot be captured run one after another between events, and the note says why.
    graph: whether to capture; False for what is something else in a graph, as torch's copy_ is, there a copy node and slower.
    """
    if device.type == "cuda":
        return _time_gpu(calls, device, rounds or GPU_ROUNDS, graph)
    return _time_cpu(calls[0], rounds or CPU_ROUNDS), []


def calls_per_replay(single_us: float, footprint: int, device: torch.device) -> int:
    """How many calls, each of `footprint` bytes of its own, one replay needs so that its launch does not count, while free memory lasts."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    wanted = -(-REPLAY_US // max(single_us, 1.0))
    return int(max(1, min(wanted, MAX_CALLS, free // 4 // max(footprint, 1))))


def estimate_us(call: Call, device: torch.device) -> float:
    """Roughly, of a call that is warm; on a GPU without what the host takes to launch it, where it can be captured."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    replay, _ = _capture_or_not([call] * ESTIMATED_CALLS, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e3 / ESTIMATED_CALLS


def summary(method: str, cold_l2: bool, samples_us: Sequence[float], calls: int = 1) -> Timing:
    """The statistics of samples, each the mean of `calls` calls; the tenth and ninetieth percentile interpolate between them."""
    tenths = statistics.quantiles(samples_us, n=10, method="inclusive") if len(samples_us) > 1 else [samples_us[0]] * 9
    samples = tuple(float(f"{sample:.6g}") for sample in samples_us)
    return Timing(method, cold_l2, statistics.median(samples_us), tenths[0], tenths[-1], len(samples), samples, calls)


def _time_gpu(calls: Sequence[Call], device: torch.device, rounds: int, graph: bool) -> tuple[Timing, list[str]]:
    if graph:
        replay, notes = _capture_or_not(calls, device)
    else:
        replay, notes = _all(calls), []
    cache = torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(rounds + 2):
        for _ in range(CACHE_READS):
            cache.sum()  # reads only, so that no dirty line is written back while the clock runs
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize(device)
        samples.append(start.elapsed_time(end) * 1e3 / len(calls))
    return summary("cuda_graph" if graph and not notes else "cuda_events", True, samples[2:], len(calls)), notes


def _all(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _capture_or_not(calls: Sequence[Call], device: torch.device) -> tuple[Call, list[str]]:
    """The calls as one graph's replay, or as they are with a note that says why they cannot be captured."""
    run = _all(calls)
    try:
        return captured(run, device), []
    except Exception as error:  # whatever capture does not allow
        torch.cuda.synchronize(device)
        return run, [f"timed without a CUDA graph, launches included, because it cannot be captured: {one_line(error)}"]


def captured(run: Call, device: torch.device) -> Call:
    """`run`, warm and captured: the replay of its CUDA graph. Raises what capture does not allow."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # On the stream that is warm: on another, ops would make their counters anew, with a fill in the graph before every launch of theirs.
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


def _time_cpu(call: Call, rounds: int) -> Timing:
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < rounds and (len(samples) < 3 or time.perf_counter() - started < CPU_SECONDS):
        before = time.perf_counter()
        call()
        samples.append((time.perf_counter() - before) * 1e6)
    return summary("wall_clock", False, samples)


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    on_gpu = (torch.autograd.DeviceType.CUDA,)
    return sum(event.device_type in on_gpu for event in profiled.events())


def peak_memory(call: Call, device: torch.device) -> int | None:
    """The most memory that one call has allocated beyond what was before it, in bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def one_line(error: BaseException) -> str:
    """An exception as a line of a report."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
