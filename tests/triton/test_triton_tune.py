"""Tuning, with a stand-in for the clock: what is fastest is written, later launches take it, and a failing candidate is passed over."""

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from llama4_kernels import use_backend
from llama4_kernels.bench import inputs, tune
from llama4_kernels.triton import config

TINY = tune.Layer("tiny", 8, "fp8")


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "TABLES", tmp_path)
    config.clear()
    yield
    config.clear()


OPS = pytest.mark.parametrize(
    "op, block", [("grouped_gemm", "BLOCK_N"), ("route_top1", "BLOCK_K"), ("moe_gate_up", "SPLITS"), ("moe_down", "BLOCK_T")]
)


@pytest.mark.triton
@OPS
def test_the_fastest_is_written_and_taken(op, block, monkeypatch, device, capsys):
    slow, fast, broken = (tune.CANDIDATES[op][0] | {block: size} for size in (64, 32, 128))
    monkeypatch.setitem(tune.CANDIDATES, op, [slow, fast, broken])
    launched = []

    def timer(call):
        candidate = config._trials[op].config
        launched.append(candidate)
        if candidate == broken:
            raise OutOfResources(1, 0, "shared memory")
        return 2.0 if candidate == slow else 1.0

    path = config.table_path(config.device_name(device))
    table = tune.tune([op], [TINY], path, tokens=[3], device=device, timer=timer)
    assert {tuple(candidate.items()) for candidate in launched} == {tuple(candidate.items()) for candidate in (slow, fast, broken)}
    (entries,) = table[op].values()
    assert entries == {"4": fast} and json.loads(path.read_text()) == table
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{op}/fp8/tiny/tp8/t3 ")]
    assert row.split()[1] == "1" and f"{block}={fast[block]}" in row
    taken = []
    options = config.options
    monkeypatch.setattr(config, "options", lambda chosen: taken.append(chosen) or options(chosen))
    problem = inputs.make(TINY.workload(op, 4), device)
    with use_backend("triton"):
        problem.call(**problem.arguments)
    assert fast in taken


@pytest.mark.triton
@OPS
def test_a_configuration_that_computes_something_else_is_left_out_with_a_word(op, block, monkeypatch, device, capsys):
    """As where a compiler gets one of the tiles wrong."""
    slow, fast = (tune.CANDIDATES[op][0] | {block: size} for size in (64, 32))
    monkeypatch.setitem(tune.CANDIDATES, op, [slow, fast])
    error = inputs.Problem.error
    monkeypatch.setattr(inputs.Problem, "error", lambda *given: 0.5 if config._trials[op].config == fast else error(*given))
    table = tune.tune([op], [TINY], config.TABLES / "table.json", tokens=[3], device=device, timer=lambda call: 1.0)
    (entries,) = table[op].values()
    assert entries == {"4": slow}
    said = " ".join(capsys.readouterr().out.split())
    assert f"{op}/fp8/tiny/tp8/t3: BLOCK" in said and f"{block}=32" in said and "its error against the reference is 5.0e-01" in said


@pytest.mark.triton
def test_where_every_configuration_is_wrong_nothing_is_written(monkeypatch, device, capsys):
    monkeypatch.setitem(tune.CANDIDATES, "route_top1", tune.CANDIDATES["route_top1"][:1])
    monkeypatch.setattr(inputs.Problem, "error", lambda *given: float("nan"))
    path = config.TABLES / "table.json"
    assert tune.tune(["route_top1"], [TINY], path, tokens=[3], device=device, timer=lambda call: 1.0) == {}
    assert "no configuration is left, nothing is written" in capsys.readouterr().out and not path.exists()


def test_what_was_tuned_before_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"moe_down": {"other": {"1": {"BLOCK_T": 16}}}}))
    monkeypatch.setitem(tune.CANDIDATES, "moe_down", [])
    assert tune.tune(["moe_down"], [], path, device=torch.device("cpu"))["moe_down"]["other"] == {"1": {"BLOCK_T": 16}}


@pytest.mark.parametrize(
    "arguments, error",
    [
        ((["moe"], [], None, None), "op is 'moe', needs one of grouped_gemm"),
        ((None, ["scout"], None, None), "workload is 'scout', needs one of scout-tp1-fp8"),
    ],
)
def test_bad_arguments(arguments, error, capsys):
    assert tune.run(*arguments) == 2
    assert error in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert tune.run(None, ["scout-tp8-fp8"], None, None) == 1
    assert capsys.readouterr().err == "tune: needs an NVIDIA GPU, and torch finds none here\n"
