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


@pytest.fixture(scope="module")
def checkpoint(make):
    return make("maverick", fp8="compressed-tensors-experts", intermediate_size=256, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with llama4_server(checkpoint, f"--context-length={CONTEXT}", f"--max-total-tokens={CONTEXT + 1024}", log=log) as server:
        yield server


def run_eval(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})


def test_every_question_is_answered_and_scored(server, tmp_path):
    arguments = ("--task", "own_questions", "--limit", 8, "--max-gen-toks", 16)
    result = run_eval("--url", server.url, "--out", tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["implementation"] == "llama4_kernels"
    assert (record["scores"][0]["accuracy"], record["scores"][0]["questions"]) == (0, 8)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()[1:]]
    assert len({answer["answer"] for answer in answers}) > 1


def test_a_random_model_finds_no_number_past_the_chunk(server, tmp_path):
    result = run_eval("--url", server.url, "--needle", "--length", LENGTH, "--depth", 0.5, "--out", tmp_path)
    assert result.exit_code == 1
    assert "FAIL: found 0 of 1; 0 of 1 in prompts of more than 8192 tokens" in result.stdout


def test_logprobs_of_a_text_agree_past_the_chunk_in_fp8(server, checkpoint, tmp_path, monkeypatch):
    ours = contextlib.nullcontext(Target(server.url, reach(server.url).model, server))
    monkeypatch.setattr(parity, "started", lambda *arguments, **options: ours)
    result = run_eval(checkpoint, "--parity", "--tokens", 300, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "parity.json").read_text())
    of_tokens = record["against"]["transformers, activations rounded"]
    assert record["chunk"] == 64 and len(of_tokens["difference"]) == 299 and of_tokens["mean"] <= of_tokens["bound"]
