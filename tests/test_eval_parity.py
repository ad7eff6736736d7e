"""Logprob parity with transformers, over logprobs that a test has moved. tests/sglang has the real server."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evaluations import has_matplotlib, has_transformers, only_line, run_eval

from llama4_kernels.cli import checkpoint
from llama4_kernels.cli.eval import parity


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A checkpoint, and transformers' logprobs of its first 200 tokens of the essay."""
    from llama4_kernels.cli.oracle import Oracle

    path = checkpoint.make(tmp_path_factory.mktemp("parity") / "tiny", "scout", num_hidden_layers=2)
    ids = parity._tokenise(path, None, 200)
    return path, Oracle(path).logprobs(ids)[0]


def judge(monkeypatch, tmp_path, compared, logprobs, dtype="float32"):
    path, _ = compared
    monkeypatch.setattr(parity, "_logprobs", lambda *arguments, **options: logprobs)
    return run_eval(path, "--parity", "--tokens", 200, "--dtype", dtype, "--out", tmp_path)


@has_transformers
@has_matplotlib
def test_parity_holds_where_the_logprobs_are_the_same(compared, monkeypatch, tmp_path):
    result = judge(monkeypatch, tmp_path, compared, compared[1] + 5e-5)
    assert result.exit_code == 0 and "agrees with transformers" in result.stdout
    record = json.loads((tmp_path / "parity.json").read_text())
    assert record["chunk"] == 64 and len(record["against"]["transformers"]["difference"]) == 199
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


@has_transformers
@has_matplotlib
@pytest.mark.parametrize("error", [2e-4, -0.5, math.nan])
def test_parity_fails_for_one_token_past_the_chunk(error, compared, monkeypatch, tmp_path):
    logprobs = compared[1].clone()
    logprobs[70] += error
    result = judge(monkeypatch, tmp_path, compared, logprobs)
    assert result.exit_code == 1 and "FAIL: max |Δlogprob| from transformers" in result.stdout


@has_transformers
@has_matplotlib
def test_parity_in_bfloat16_is_shown_and_not_judged(compared, monkeypatch, tmp_path):
    result = judge(monkeypatch, tmp_path, compared, compared[1] + 0.1, dtype="bfloat16")
    assert result.exit_code == 0 and "nothing was judged" in result.stdout


@has_matplotlib
def test_stock_sglang_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = only_line(run_eval("--tiny", "scout", "--parity", "--against", "stock", "--out", tmp_path))
    assert "needs a GPU" in line and "leave out --against stock" in line


@has_transformers
@has_matplotlib
@pytest.mark.parametrize("content, says", [(b"\xff\xfe", "is not UTF-8"), (b"", "needs at least 2")])
def test_a_text_that_is_none(content, says, compared, tmp_path):
    (tmp_path / "text").write_bytes(content)
    assert says in only_line(run_eval(compared[0], "--parity", "--text", tmp_path / "text", "--out", tmp_path / "out"))


@has_transformers
@has_matplotlib
def test_our_own_text_is_long_enough_to_pass_the_chunk(compared, monkeypatch, tmp_path):
    path, _ = compared
    assert len(parity._tokenise(path, None, None)) == 512
    monkeypatch.setattr(parity, "chunk_size", lambda model: 8192)
    assert len(parity._tokenise(path, None, None)) == 10240
    assert "ends within the first chunk of 8192" in judge(monkeypatch, tmp_path, compared, compared[1]).stdout


def test_differences_go_to_the_chunk_of_the_token_that_predicts():
    parts = parity.per_chunk(torch.arange(10.0), 4)
    assert [(first, part.tolist()) for first, part in parts] == [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (8, [8, 9])]
    assert len(parity.per_chunk(torch.arange(10.0), None)) == 1
