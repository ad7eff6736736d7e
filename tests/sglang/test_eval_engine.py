"""The three evaluations over one real server of a tiny FP8 model: it knows nothing, and what it computes is transformers'."""

import contextlib
import json

import pytest
from engine import llama4_server
from typer.testing import CliRunner

from llama4_kernels.cli.eval import parity
from llama4_kernels.cli.eval.target import Target, reach
from llama4_kernels.cli.main import app

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install ".[eval]"')

LENGTH = 8300
CONTEXT = 9216


def run_eval(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_three_evaluations(make, tmp_path, monkeypatch):
    """In one test, because two processes that share the tests would start the server twice."""
    path = make("maverick", fp8="compressed-tensors-experts", intermediate_size=256, max_position_embeddings=CONTEXT)
    flags = (f"--context-length={CONTEXT}", f"--max-total-tokens={CONTEXT + 1024}")
    with llama4_server(path, *flags, log=tmp_path / "log") as server:
        answers_every_question(server, tmp_path / "accuracy")
        finds_no_number_past_the_chunk(server, tmp_path / "needle")
        agrees_with_transformers_past_the_chunk(server, path, tmp_path / "parity", monkeypatch)


def answers_every_question(server, out):
    arguments = ("--task", "own_questions", "--limit", 8, "--max-gen-toks", 16)
    result = run_eval("--url", server.url, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "results.json").read_text())
    assert record["implementation"] == "llama4_kernels" and record["run"]["dtype"] == "float32"
    assert (record["scores"][0]["accuracy"], record["scores"][0]["questions"]) == (0, 8)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()[1:]]
    assert len({answer["answer"] for answer in answers}) > 1


def finds_no_number_past_the_chunk(server, out):
    result = run_eval("--url", server.url, "--needle", "--length", LENGTH, "--depth", 0.5, "--out", out)
    assert result.exit_code == 1
    assert "FAIL: found 0 of 1; 0 of 1 in prompts of more than 8192 tokens" in result.stdout


def agrees_with_transformers_past_the_chunk(server, path, out, monkeypatch):
    ours = contextlib.nullcontext(Target(server.url, reach(server.url).model, server))
    monkeypatch.setattr(parity, "started", lambda *arguments, **options: ours)
    result = run_eval(path, "--parity", "--tokens", 300, "--out", out)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "parity.json").read_text())
    assert (record["run"]["model_impl"], record["run"]["backends"]["fused_moe"]) == ("llama4_kernels", "reference")
    of_tokens = record["against"]["transformers, activations rounded"]
    assert record["chunk"] == 64 and len(of_tokens["difference"]) == 299 and of_tokens["mean"] <= of_tokens["bounds"]["mean"]
