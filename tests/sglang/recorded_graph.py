"""A CUDA graph's stand-in on the CPU, for SGLang's own graph runner: at capture every PyTorch op is recorded with the arguments that it got,
at replay the same ops run again on them.

So, as in a CUDA graph, Python runs at capture only, numbers are those of the capture, and tensors are read and written where they were: what
the attention backend makes anew for a step, instead of refilling it or making it from static buffers by recorded ops, is not seen by a
replay. An op whose result depends on a tensor's values on the host is refused, as a stream that captures refuses it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from types import SimpleNamespace

import msgspec
import torch
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph as breakable
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

REPLAYED = "recorded_graph: {mode} of {requests} requests in a graph for {size}"
REPLAYED_SEGMENTS = "recorded_graph: prefill with {breaks} breaks"
NEEDS_THE_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if NEEDS_THE_HOST & set(op.tags):
            raise RuntimeError(f"{op} needs a tensor's values on the host, which a graph does not record")
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for op, args, kwargs, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(op(*args, **kwargs))):
                if hasattr(new, "wait"):  # a collective under way
                    new.wait()
                elif isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedGraphs(BaseCudaGraphBackend):
    def __init__(self, runner, **options):
        self.recorders, self.outputs = {}, {}

    @contextlib.contextmanager
    def capture_session(self, stream):
        yield

    def capture_one(self, shape_key, forward_fn, capture_inputs=None, post_warmup_hook=None):
        forward_fn()
        if post_warmup_hook is not None:
            post_warmup_hook()
        with Recorder() as recorder:
            self.outputs[shape_key] = forward_fn()
        self.recorders[shape_key] = recorder

    def can_run(self, forward_batch, shape_key):
        return shape_key in self.recorders

    @contextlib.contextmanager
    def replay_session(self):
        yield

    def replay(self, shape_key, static_forward_batch, **kwargs):
        mode = static_forward_batch.forward_mode.name
        print(REPLAYED.format(mode=mode, requests=static_forward_batch.batch_size, size=shape_key.size), flush=True)
        self.recorders[shape_key].replay()
        return self.outputs[shape_key]

    def cleanup(self):
        self.recorders.clear()


class RecordedSegments:
    """SGLang's BreakableCUDAGraph: recorded parts with calls between them that are made anew at each replay, those of attention."""

    def __init__(self, registry=None):
        self._segments, self._break_fns = [], []

    def replay(self) -> None:
        print(REPLAYED_SEGMENTS.format(breaks=len(self._break_fns)), flush=True)
        for segment, break_fn in itertools.zip_longest(self._segments, self._break_fns):
            segment.replay()
            if break_fn is not None:
                break_fn()


class SegmentCapture:
    """SGLang's BreakableCUDAGraphCapture, which its eager_on_graph tells where a break is."""

    _barrier_fn = None

    def __init__(self, cuda_graph: RecordedSegments, **_):
        self.cuda_graph = cuda_graph

    def _begin_new_segment(self) -> None:
        self.cuda_graph._segments.append(Recorder())
        self.cuda_graph._segments[-1].__enter__()

    def _end_current_segment(self) -> None:
        self.cuda_graph._segments[-1].__exit__(None, None, None)

    def __enter__(self):
        self._token = breakable._current_capture_var.set(self)
        self._begin_new_segment()
        return self

    def __exit__(self, *error):
        self._end_current_segment()
        breakable._current_capture_var.reset(self._token)


def install() -> list[tuple]:
    """Let SGLang's decode and prefill graph runners run on the CPU, for the target model; the hooks that are left to register."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner, prefill_cuda_graph_runner
    from sglang.srt.model_executor.runner_backend import breakable_cuda_graph_backend
    from sglang.srt.model_executor.runner_backend import utils as runner_backend_utils
    from sglang.srt.platforms import current_platform
    from sglang.srt.speculative import eagle_worker_v2

    decode_cuda_graph_runner.resolve_decode_backend = RecordedGraphs
    prefill_cuda_graph_runner.FullCudaGraphBackend = runner_backend_utils.FullCudaGraphBackend = RecordedGraphs
    for runner in (decode_cuda_graph_runner, prefill_cuda_graph_runner):
        runner.graph_capture = lambda stream: contextlib.nullcontext(SimpleNamespace(stream=None))
        runner.get_or_create_global_graph_capture_stream = lambda: None
    breakable_cuda_graph_backend.BreakableCUDAGraph = RecordedSegments
    breakable_cuda_graph_backend.BreakableCUDAGraphCapture = SegmentCapture
    breakable_cuda_graph_backend.get_or_create_global_graph_memory_pool = lambda device_module: None
    breakable_cuda_graph_backend.set_graph_pool_id = lambda pool: None
    breakable_cuda_graph_backend.GraphPoolPrecarve.measure = contextlib.nullcontext
    type(current_platform).capabilities = msgspec.structs.replace(current_platform.capabilities, graph_capture=True)
    torch.cpu.is_current_stream_capturing = lambda: False
    torch.distributed.Work.wait = functools.partialmethod(_wait_unrecorded, torch.distributed.Work.wait)
    ForwardMode.is_cpu_graph = ForwardMode.is_cuda_graph
    eagle_worker_v2._is_cpu = True  # no graphs of the draft model
    return [("sglang.srt.model_executor.model_runner_components.cuda_graph_setup.capture_decode_graph", _capture_decode_graph)]


def _wait_unrecorded(work, wait, *args):
    """gloo reduces and scatters by the sum of a copy, and copies a rank's part out of that when it is waited for. The collective does both
    again at replay; recorded by itself, this copy would bring back the sum of the capture."""
    with _disable_current_modes():
        return wait(work, *args)


def _capture_decode_graph(original, *, model_runner):
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
    from sglang.srt.model_executor.model_runner_components.cuda_graph_setup import GraphCapture
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

    if check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        return original(model_runner=model_runner)
    return GraphCapture(runner=DecodeCudaGraphRunner(model_runner), memory_phase="decode", memory_usage_gb=0, capture_time=0)
