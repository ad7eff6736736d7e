"""Logprob parity with transformers, over logprobs that a test has moved. tests/sglang has the real server."""

from __future__ import annotations

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from evaluations import has_matplotlib, has_transformers, only_line, run_eval

from llama4_kernels.cli import checkpoint, checkpoint_files
from llama4_kernels.cli.eval import parity


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A checkpoint, and transformers' logprobs of its first 200 tokens of the essay."""
    from llama4_kernels.cli.oracle import Oracle

    path = checkpoint.make(tmp_path_factory.mktemp("parity") / "tiny", "scout", num_hidden_layers=2)
    ids = parity._tokenise(path, None, 200)
    return path, Oracle(path).logprobs(ids)[0]


@pytest.fixture(scope="module")
def in_bfloat16(compared):
    """transformers' logprobs of the same in bfloat16."""
    from llama4_kernels.cli.oracle import Oracle

    return Oracle(compared[0], dtype=torch.bfloat16).logprobs(parity._tokenise(compared[0], None, 200))[0]


def judge(monkeypatch, tmp_path, compared, logprobs, dtype="float32", *more):
    path, _ = compared
    monkeypatch.setattr(parity, "_logprobs", lambda *arguments, **options: (logprobs, {}))
    return run_eval(path, "--parity", "--tokens", 200, "--dtype", dtype, "--out", tmp_path / "out", *more)


@has_transformers
@has_matplotlib
def test_parity_holds_where_the_logprobs_are_the_same(compared, monkeypatch, tmp_path):
    result = judge(monkeypatch, tmp_path, compared, compared[1] + 5e-5)
    assert result.exit_code == 0 and "agrees with transformers" in result.stdout
    record = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert record["chunk"] == 64 and len(record["against"]["transformers"]["difference"]) == 199
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")


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
@pytest.mark.parametrize("times, code", [(0.9, 0), (1.1, 1), (math.nan, 1)])
def test_parity_in_bfloat16_is_held_to_transformers_in_bfloat16(times, code, compared, in_bfloat16, monkeypatch, tmp_path):
    """To the median and to the error that one in ten exceeds: a near tie of two experts may go either way."""
    logprobs = compared[1] + times * (in_bfloat16 - compared[1])
    logprobs[70] += 0.5
    result = judge(monkeypatch, tmp_path, compared, logprobs, "bfloat16")
    assert result.exit_code == code and ("agrees with transformers" in result.stdout) == (code == 0)
    assert [f"FAIL: {name} |Δlogprob| from transformers" in result.stdout for name in ("median", "90th percentile")] == [code == 1] * 2
    bounds = json.loads((tmp_path / "out" / "parity.json").read_text())["against"]["transformers"]["bounds"]
    assert bounds["median"] == pytest.approx(float((in_bfloat16 - compared[1]).abs().median())) and set(bounds) == {
        "median",
        "90th percentile",
    }


@has_transformers
@has_matplotlib
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_of_fp8_is_of_activations_rounded(dtype, monkeypatch, tmp_path):
    """The other oracle's logprobs, of activations that are not rounded, are over the bound."""
    from llama4_kernels.cli.oracle import Oracle

    path = checkpoint.make(tmp_path / "tiny", "maverick", fp8="block", num_hidden_layers=2, intermediate_size=256)
    ids, full = parity._tokenise(path, None, 200), checkpoint_files.dequantised(path, tmp_path / "full")
    for code, rounding in ((0, path), (1, None)):
        logprobs = Oracle(full, rounding).logprobs(ids)[0]
        result = judge(monkeypatch, tmp_path, (path, None), logprobs + (0.5 if rounding is None else 0), dtype)
        assert result.exit_code == code and "from transformers, activations rounded" in result.stdout, result.output


@has_transformers
@has_matplotlib
@pytest.mark.parametrize(
    "flag, says",
    [
        ("--quantization=fp8", "give a checkpoint that is so"),
        ("--quantization", "give a checkpoint that is so"),
        ("--kv-cache-dt=fp8_e4m3", "give a checkpoint that is so"),
        ("--dtype=bfloat16", "--dtype of this command says it"),
        ("--tp=2", "--tp of this command says it"),
        ("--load-format dummy", "give a checkpoint that is so"),
    ],
)
def test_a_flag_that_changes_what_is_computed_is_refused(flag, says, compared, monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "_logprobs", lambda *arguments, **options: pytest.fail("a server was started"))
    line = only_line(run_eval(compared[0], "--parity", f"--server-flag={flag}", "--out", tmp_path))
    assert f"--server-flag={flag} has the server compute what transformers does not" in line and says in line


@has_transformers
@has_matplotlib
def test_other_flags_are_the_servers(compared, monkeypatch, tmp_path):
    result = judge(
        monkeypatch, tmp_path, compared, compared[1], "float32", "--server-flag=--page-size=16", "--server-flag=--log-level=info"
    )
    assert result.exit_code == 0


@has_matplotlib
@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_model_that_is_too_large_for_this_machine_is_refused_by_its_headers(what, monkeypatch, tmp_path):
    """Of a file of holes, as large as its header says."""
    (tmp_path / "config.json").write_text('{"architectures": ["Llama4ForConditionalGeneration"]}')
    header = json.dumps({"a.weight": {"dtype": "F8_E4M3", "shape": [1 << 20, 1 << 10], "data_offsets": [0, 1 << 30]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    if what == "memory":
        monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 10**3}[name])
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    line = only_line(run_eval(tmp_path, "--parity", "--out", tmp_path / "out"))
    assert f"takes at least 4 GB of {what} for the weights of {tmp_path}" in line and "has 1: run it where there is as much" in line


@has_matplotlib
def test_a_checkpoint_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Llama4ForConditionalGeneration"]}')
    assert f"{tmp_path} holds no *.safetensors" in only_line(run_eval(tmp_path, "--parity", "--out", tmp_path / "out"))


@has_transformers
@has_matplotlib
def test_a_scale_that_is_not_known_is_named(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    path = checkpoint.make(tmp_path / "tiny", "scout", fp8="block", num_hidden_layers=1)
    stored = checkpoint_files.load_weights(path)
    name = next(name for name in stored if name.endswith("_scale_inv"))
    save_file(stored | {name: torch.ones(4, 4)}, path / "model.safetensors")
    line = only_line(judge(monkeypatch, tmp_path, (path, None), torch.zeros(199)))
    assert f"{path}: {name} has shape [4, 4]" in line and "one per block of 128x128" in line


@has_transformers
@has_matplotlib
def test_a_name_in_the_hugging_face_cache_is_its_folder(compared, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"{compared[0]}/{file}")
    result = judge(monkeypatch, tmp_path, ("meta-llama/Llama-4-Tiny", None), compared[1])
    assert result.exit_code == 0 and "agrees with transformers" in result.stdout


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
