"""Launch configurations: a tuned table is preferred where it covers the call, and every heuristic answer is a valid one."""

import json

import pytest
import torch

from llama4_kernels.triton import config

SHAPE = {"experts": 16, "n": 1024, "k": 5120, "form": 2, "shared_kib": 227}
CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "TABLES", tmp_path)
    config.clear()
    yield lambda op, shape, entries: config.table_path("cpu").write_text(json.dumps({op: {shape: entries}}))
    config.clear()


def test_the_tightest_tuned_entry_is_taken(table):
    key = config.shape_key(torch.float8_e4m3fn, SHAPE)
    table("moe_down", key, {"1": {"BLOCK_T": 1}, "64": {"BLOCK_T": 64}, "8192": {"BLOCK_T": 128}})
    taken = [config.choose("moe_down", CPU, torch.float8_e4m3fn, tokens=tokens, **SHAPE)["BLOCK_T"] for tokens in (0, 1, 2, 64, 65, 8192)]
    assert taken == [1, 1, 64, 64, 128, 128]


@pytest.mark.parametrize(
    "tokens, dtype, n", [(10000, torch.float8_e4m3fn, 1024), (64, torch.bfloat16, 1024), (64, torch.float8_e4m3fn, 2048)]
)
def test_an_uncovered_call_takes_the_heuristic(table, tokens, dtype, n):
    table("moe_down", config.shape_key(torch.float8_e4m3fn, SHAPE), {"8192": {"BLOCK_T": 1}})
    assert config.choose("moe_down", CPU, dtype, tokens=tokens, **(SHAPE | {"n": n}))["BLOCK_T"] > 1


def test_device_names_become_file_names():
    assert config.table_path("NVIDIA H200 (1/2)").name == "NVIDIA_H200_1_2_.json"


@pytest.mark.parametrize("shared_kib, stages", [(227, 4), (163, 3), (99, 2)])
def test_fewer_stages_where_shared_memory_is_small(shared_kib, stages):
    shape = SHAPE | {"n": 8192, "shared_kib": shared_kib}
    chosen = config.choose("moe_gate_up", torch.device("meta"), torch.bfloat16, tokens=4096, **shape)
    assert chosen["num_stages"] == stages
    assert stages * 128 * (256 + chosen["BLOCK_R"]) <= shared_kib * 1024
