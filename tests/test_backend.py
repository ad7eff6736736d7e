"""The choice of backend: by use_backend, by environment variable, by what can run."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import llama4_kernels
from backends import forget_choices
from llama4_kernels import BackendError, available_backends, ops, use_backend
from llama4_kernels.ops import backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_request(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """A machine where Triton computes everything, with the reference's functions in its place."""
    import llama4_kernels.triton as triton

    monkeypatch.setattr(triton, "why_not", lambda device: "")
    find = backend._find
    monkeypatch.setattr(backend, "_find", lambda name, op: find("reference" if name == "triton" else name, op))


def chosen(op: str) -> str:
    return {choice.op: choice.backend for choice in backend.choices("cpu")}[op]


def test_the_reference_computes_on_a_cpu_and_the_others_say_why_they_do_not():
    for choice in backend.choices("cpu"):
        assert choice.backend == "reference"
        assert "cuda: " in choice.why and "triton: cpu is not an NVIDIA GPU" in choice.why
    assert [choice.op for choice in backend.choices("cpu")] == list(backend.OPS)


def test_the_first_backend_that_can_run_is_taken(triton_on_cpu):
    assert chosen("fused_moe") == "triton"


@pytest.fixture
def kernels_are_defined():
    """Whether a kernel is interpreted is decided when its module is imported, for all later tests of the process too."""
    for stem in set(backend.OPS.values()):
        importlib.import_module(f"llama4_kernels.triton.{stem}")


@pytest.mark.parametrize("interpret", ["1", "true"])
def test_the_interpreter_is_taken_only_where_it_is_asked_for(monkeypatch, kernels_are_defined, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert available_backends("fused_moe", "cpu")["triton"] == ""
    assert {choice.backend for choice in backend.choices("cpu")} == {"reference"}
    assert "triton: TRITON_INTERPRET is set, and the interpreter computes bfloat16 and float8 wrongly" in backend.choices("cpu")[0].why
    with use_backend("auto"):
        assert chosen("fused_moe") == "reference"
    with use_backend("triton"):
        assert chosen("fused_moe") == "triton"


def test_what_a_backend_refuses_does_not_go_to_the_interpreter(monkeypatch, kernels_are_defined):
    import llama4_kernels.cuda as cuda

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    monkeypatch.setattr(backend, "_refusal", lambda name, op: (lambda x: "no") if name == "cuda" else None)
    computed = []
    monkeypatch.setattr(backend, "_find", lambda name, op: lambda x: computed.append(name))
    backend.call("quantize_per_token", CPU, torch.ones(1, 2))
    assert computed == ["reference"]


@pytest.fixture
def triton_takes_no_float32(triton_on_cpu, monkeypatch):
    """In attention, before it sees any arguments."""

    def in_module(name, op, function):
        wanted = (name, op, function) == ("triton", "chunked_attention", "why_not_dtype")
        return (lambda dtype, what: "" if dtype == torch.bfloat16 else f"{what} is {dtype}") if wanted else None

    monkeypatch.setattr(backend, "_in_module", in_module)
    monkeypatch.setattr(backend, "_find", lambda name, op: "a kernel")


def test_a_backend_that_never_takes_the_dtype_is_not_chosen(triton_takes_no_float32):
    for dtype, expected in ((torch.float32, "reference"), (torch.bfloat16, "triton"), (None, "triton")):
        taken = {choice.op: choice for choice in backend.choices("cpu", dtype)}
        assert (taken["chunked_attention"].backend, taken["rope_qk_norm"].backend) == (expected, "triton")
        assert ("triton: the activations' dtype is torch.float32" in taken["chunked_attention"].why) == (dtype == torch.float32)


def test_a_request_for_a_backend_that_never_takes_the_dtype_is_an_error(triton_takes_no_float32):
    why = "use_backend asks for triton to compute chunked_attention on cpu, but the activations' dtype is torch.float32"
    with use_backend(attention="triton"), pytest.raises(BackendError, match=why):
        backend.choices("cpu", torch.float32)


def test_a_model_in_float32_has_its_moe_and_attention_in_triton_on_a_hopper(monkeypatch):
    pytest.importorskip("llama4_kernels.cuda._C", reason="the CUDA extension is not built")
    import llama4_kernels.cuda as cuda
    import llama4_kernels.triton as triton

    for module in (cuda, triton):
        monkeypatch.setattr(module, "why_not", lambda device: "")
    elsewhere = {"moe_gate_up", "moe_down", "fused_moe", "chunked_attention"}
    for dtype, in_triton in ((torch.float32, elsewhere), (torch.bfloat16, set())):
        assert {choice.op for choice in backend.choices("cpu", dtype) if choice.backend == "triton"} == in_triton
        assert {choice.op for choice in backend.choices("cpu", dtype) if choice.backend == "cuda"} == set(backend.OPS) - in_triton


def test_what_the_interpreter_is_asked_for_goes_to_no_other(monkeypatch, kernels_are_defined):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    computed = []
    monkeypatch.setattr(backend, "_find", lambda name, op: lambda x: computed.append(name))
    with use_backend("triton"):
        backend.call("quantize_per_token", CPU, torch.ones(1, 2))
    assert computed == ["triton"]


def test_backends_are_those_of_the_device_that_is_asked_about():
    assert available_backends("fused_moe", "meta")["triton"].startswith("meta is not an NVIDIA GPU")


def test_every_public_op_has_a_reference():
    assert set(backend.OPS) == {name for name in ops.__all__ if isinstance(getattr(ops, name), types.FunctionType)}
    for op in backend.OPS:
        assert available_backends(op, "cpu")["reference"] == ""
        assert list(available_backends(op, "cpu")) == ["cuda", "triton", "reference"]


@pytest.mark.parametrize("request_it", ["environment", "context"])
@pytest.mark.parametrize(
    ("spec", "routing", "attention", "fused_moe"),
    [
        ("reference", "reference", "reference", "reference"),
        ("reference,attention=triton", "reference", "triton", "reference"),
        ("attention=reference", "triton", "reference", "triton"),
        ("moe=reference,fused_moe=triton", "triton", "triton", "triton"),
        ("fused_moe = reference, moe= triton", "triton", "triton", "reference"),
    ],
)
def test_requests(triton_on_cpu, monkeypatch, request_it, spec, routing, attention, fused_moe):
    default, per_op = None, {}
    for part in spec.replace(" ", "").split(","):
        name, _, value = part.rpartition("=")
        per_op |= {name: value} if name else {}
        default = default if name else value
    if request_it == "environment":
        monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, spec)
        per_op, default = {}, None
    with use_backend(default, **per_op):
        assert (chosen("route_top1"), chosen("chunked_attention"), chosen("fused_moe")) == (routing, attention, fused_moe)


def test_the_context_beats_the_environment_and_the_inner_context_the_outer(triton_on_cpu, monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    with use_backend("reference"):
        assert chosen("route_top1") == "reference"
        with use_backend(routing="triton"):
            assert (chosen("route_top1"), chosen("fused_moe")) == ("triton", "reference")
        assert chosen("route_top1") == "reference"
    assert chosen("route_top1") == "triton"


def test_a_block_holds_for_the_thread_that_enters_it(triton_on_cpu):
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(chosen, "route_top1").result() == "triton"
        assert chosen("route_top1") == "reference"


def test_autocast_changes_no_bit():
    x, router = torch.randn(5, 64), torch.randn(4, 64)
    want, _ = ops.route_top1(x, router)
    with torch.autocast("cpu", torch.bfloat16):
        got, codes = ops.route_top1(x, router, quantize=True)
        assert torch.is_autocast_enabled("cpu")
    assert codes is not None and got.scores.dtype == torch.float32 and torch.equal(got.scores, want.scores)


@pytest.fixture
def imprecise():
    """A process that has products of float32 computed in less."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def precisions() -> tuple[str, ...]:
    return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("fails", [False, True])
def test_the_reference_multiplies_float32_in_float32(imprecise, monkeypatch, fails):
    seen, before = [], precisions()

    def compute():
        seen.append(precisions())
        if fails:
            raise ArithmeticError

    monkeypatch.setattr(backend, "_find", lambda *_: compute)
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        backend.call("route_top1", CPU)
    assert seen == [("highest", "ieee", "ieee")] and precisions() == before == ("medium", "tf32", "bf16")


def test_the_precision_comes_back_when_the_last_thread_has_computed(imprecise, monkeypatch):
    inside, first_has_left, seen = threading.Barrier(2), threading.Event(), []

    def compute(number: int):
        inside.wait(10)
        if number == 2:
            assert first_has_left.wait(10)
            seen.append(precisions()[0])

    monkeypatch.setattr(backend, "_find", lambda *_: compute)
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(backend.call, "route_top1", CPU, number) for number in (1, 2))
        first.result()
        first_has_left.set()
        second.result()
    assert seen == ["highest"] and precisions()[0] == "medium"


@pytest.mark.parametrize("index", [0, 1])
def test_kernels_run_on_the_device_of_their_tensors_whichever_is_current(index, monkeypatch):
    devices, seen = [0], []

    @contextlib.contextmanager
    def device(wanted):
        devices.append(wanted.index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(backend, "_choose", lambda op, *_: backend.Choice(op, "triton", ""))
    monkeypatch.setattr(backend, "_find", lambda *_: lambda: seen.append(devices[-1]))
    monkeypatch.setattr(backend, "_refusal", lambda *_: None)
    backend.call("route_top1", torch.device("cuda", index))
    assert seen == [index] and devices == [0]


def test_a_request_decides_which_function_runs(triton_on_cpu, monkeypatch):
    import llama4_kernels.reference.quantization as reference

    calls = []
    real = reference.quantize_per_token
    monkeypatch.setattr(reference, "quantize_per_token", lambda x: calls.append(x) or real(x))
    forget_choices()
    with use_backend(quantize_per_token="reference"):
        ops.quantize_per_token(torch.ones(1, 2))
    assert len(calls) == 1


@pytest.mark.parametrize("op", list(backend.OPS))
def test_a_forced_backend_that_cannot_run_is_an_error_with_the_reason(monkeypatch, op):
    why = "but cpu is not an NVIDIA GPU"
    with use_backend("triton"), pytest.raises(BackendError, match=f"^use_backend asks for triton to compute {op} on cpu, {why}"):
        backend.call(op, CPU)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, f"{op}=triton")
    with pytest.raises(BackendError, match=f"^LLAMA4_KERNELS_BACKEND asks for triton to compute {op} on cpu, {why}"):
        backend.call(op, CPU)


def test_auto_is_no_request(triton_on_cpu, monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference,routing=auto")
    assert (chosen("route_top1"), chosen("fused_moe")) == ("triton", "reference")
    with use_backend("auto"):
        assert chosen("fused_moe") == "triton"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "auto")
    assert not any(choice.asked_by for choice in backend.choices("cpu"))


def test_a_forced_backend_without_the_op_is_an_error(monkeypatch):
    import llama4_kernels.cuda as cuda

    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    find = backend._find
    monkeypatch.setattr(backend, "_find", lambda name, op: None if name == "cuda" else find(name, op))
    with use_backend("cuda"), pytest.raises(BackendError, match="but llama4_kernels has no cuda kernel for it yet"):
        ops.quantize_per_token(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cutlass", "names the backend 'cutlass', needs one of auto, cuda, triton, reference"),
        ("attention=", "names the backend '', needs one of auto, cuda, triton, reference"),
        ("softmax=triton", "names the op 'softmax', needs one of quantization, routing, .*, chunked_attention"),
    ],
)
def test_unknown_names(monkeypatch, spec, message):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, spec)
    with pytest.raises(ValueError, match=f"^LLAMA4_KERNELS_BACKEND {message}"):
        ops.quantize_per_token(torch.ones(1, 2))


def test_unknown_names_in_the_context_stop_before_the_block():
    with pytest.raises(ValueError, match="^use_backend names the backend 'cutlass'"):
        with use_backend("cutlass"):
            pytest.fail("the block ran")
    with pytest.raises(ValueError, match="^use_backend names the op 'softmax'"):
        with use_backend(softmax="triton"):
            pytest.fail("the block ran")
    for bad in (torch.device("cuda"), "", "triton,reference"):
        with pytest.raises(ValueError, match="^use_backend names the backend .*, needs one of auto, cuda, triton, reference$"):
            with use_backend(bad):
                pytest.fail("the block ran")
    with pytest.raises(ValueError, match="^use_backend names the backend None, needs one of auto, cuda, triton, reference$"):
        with use_backend(moe=None):
            pytest.fail("the block ran")
    with pytest.raises(ValueError, match="^op is 'softmax', needs one of quantize_per_token"):
        llama4_kernels.available_backends("softmax")


@pytest.fixture
def triton_refuses_long_rows(triton_on_cpu, monkeypatch):
    def why_not(x):
        return "x has more than 4 columns" if x.shape[1] > 4 else ""

    monkeypatch.setattr(backend, "_refusal", lambda name, op: why_not if name == "triton" else None)
    computed = []
    find = backend._find
    monkeypatch.setattr(backend, "_find", lambda name, op: lambda x: computed.append(name) or find(name, op)(x))
    return computed


def test_arguments_that_a_backend_refuses_go_to_the_next_and_the_log_says_so_once(triton_refuses_long_rows, caplog):
    for columns in (4, 5, 5):
        backend.call("quantize_per_token", CPU, torch.ones(1, columns))
    assert triton_refuses_long_rows == ["triton", "reference", "reference"]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["llama4_kernels: quantize_per_token is not computed by triton where x has more than 4 columns"]


def test_reasons_that_differ_in_numbers_alone_are_logged_once(triton_on_cpu, monkeypatch, caplog):
    monkeypatch.setattr(backend, "_refusal", lambda name, op: (lambda reason: reason) if name == "triton" else None)
    monkeypatch.setattr(backend, "_find", lambda name, op: lambda reason: None)
    reasons = ["there are 4097 requests, above 4096", "there are 5000 requests, above 4096", "scale is -0.5, not above 0",
               "scale is -1e-05, not above 0", "weights.w13 is float32", "weights.w2 is float32", "weights.w2 is float64"]  # fmt: skip
    for reason in reasons:
        backend.call("quantize_per_token", CPU, reason)
    logged = [record.getMessage().rpartition(" where ")[2] for record in caplog.records]
    assert logged == [reasons[0], reasons[2], *reasons[4:]]


def test_arguments_that_the_requested_backend_refuses_are_an_error(triton_refuses_long_rows):
    with use_backend("triton"):
        backend.call("quantize_per_token", CPU, torch.ones(1, 4))
        with pytest.raises(
            BackendError, match="use_backend asks for triton to compute quantize_per_token on cpu, but x has more than 4 columns"
        ):
            backend.call("quantize_per_token", CPU, torch.ones(1, 5))
    assert triton_refuses_long_rows == ["triton"]


def test_arguments_that_every_backend_refuses_are_an_error_with_each_reason(triton_on_cpu, monkeypatch):
    monkeypatch.setattr(backend, "_refusal", lambda name, op: lambda x: f"{name} is tired")
    with pytest.raises(BackendError, match="no backend computes quantize_per_token on cpu: triton: triton is tired; reference: reference is"):
        backend.call("quantize_per_token", CPU, torch.ones(1, 2))


def test_an_error_says_which_backend_refuses_which_op_and_survives_another_process():
    with use_backend("triton"), pytest.raises(RuntimeError) as raised:
        ops.quantize_per_token(torch.ones(1, 2))
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert isinstance(error, llama4_kernels.BackendError) and str(error).endswith(f"on cpu, but {error.reason}")
        assert (error.op, error.backend) == ("quantize_per_token", "triton") and error.reason.startswith("cpu is not an NVIDIA GPU")


@pytest.mark.parametrize("ask", [lambda device: available_backends("route_top1", device), backend.choices])
@pytest.mark.parametrize(("device", "error"), [("gpu", ValueError), ("cuda:x", ValueError), (0, TypeError)])
def test_a_device_that_torch_does_not_know_is_named(ask, device, error):
    with pytest.raises(error, match=f"^device is {device!r}, needs a torch.device or the name of one, such as cuda:0 or cpu$"):
        ask(device)


@pytest.fixture
def two_gpus(monkeypatch):
    """The second of which is the current one."""
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    asked = []
    monkeypatch.setattr(backend, "_why_not", lambda name, op, device, dtype=None: asked.append(device) or "")
    return asked


@pytest.mark.parametrize("ask", [lambda device: available_backends("route_top1", device), backend.choices])
def test_a_gpu_that_is_not_there_is_named(two_gpus, ask):
    for device in ("cuda:2", torch.device("cuda:7")):
        with pytest.raises(ValueError) as raised:
            ask(device)
        assert str(raised.value) == f"device is {device!r}, needs one of this process's 2 GPUs, which begin with cuda:0"
    assert not two_gpus


@pytest.mark.parametrize("ask", [lambda device: available_backends("route_top1", device), backend.choices])
def test_a_gpu_without_a_number_is_the_current_one(two_gpus, ask):
    """Also where another was current when this was asked before."""
    ask("cuda")
    ask(torch.device("cuda"))
    assert set(two_gpus) == {torch.device("cuda:1")}
