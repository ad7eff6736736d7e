"""Weights loaded into a model that serves, through SGLang's own endpoints."""

import engine_standins
import requests
import torch
from engine import ask, assert_agrees, llama4_server, prompt
from recorded_graph import REPLAYED
from sglang.srt.utils import MultiprocessingSerializer

from llama4_kernels.cli import checkpoint
from llama4_kernels.cli.server import Server

LENGTHS = (5, 70, 130)


def post(server: Server, endpoint: str, **body) -> tuple[int, str]:
    answer = requests.post(f"{server.url}/{endpoint}", json=body, timeout=120)
    return answer.status_code, answer.json()["message"]


def update(server: Server, path) -> tuple[int, str]:
    return post(server, "update_weights_from_disk", model_path=str(path))


def answers(server: Server) -> list[tuple[list[int], torch.Tensor]]:
    return [(answer.generated, answer.logprobs) for answer in (ask(server, prompt(length)) for length in LENGTHS)]


def assert_same(got, wanted) -> None:
    for (tokens, logprobs), (wanted_tokens, wanted_logprobs) in zip(got, wanted, strict=True):
        assert tokens == wanted_tokens and torch.equal(logprobs, wanted_logprobs)


def test_weights_from_a_disk(make, oracle, tmp_path):
    """Those of another checkpoint are served; where they do not fit, the answer says so and those before them are served on."""
    path, other, unlike = make("scout"), make("scout", seed=1), make("scout", intermediate_size=128)
    with llama4_server(path, log=tmp_path / "log") as server:
        assert update(server, other)[0] == 200
        for length in LENGTHS:
            assert_agrees(ask(server, prompt(length)), oracle(other))
        for bad, named in ((tmp_path / "nothing", "nothing"), (unlike, "config.json implies")):
            status, message = update(server, bad)
            assert status == 400 and named in message
            for length in LENGTHS:
                assert_agrees(ask(server, prompt(length)), oracle(other))


def test_fp8_weights_from_a_disk_under_graphs(make, tmp_path):
    """A graph reads weights and scales where they were when it was captured."""
    path, other = (make("scout", fp8="modelopt", seed=seed) for seed in (0, 1))
    with llama4_server(other, log=tmp_path / "log") as server:
        wanted = answers(server)
    flags = ("--attention-backend=triton", "--cuda-graph-backend-decode=full", "--cuda-graph-bs-decode", "1")
    environment = engine_standins.environment(tmp_path / "standins")
    with llama4_server(path, *flags, log=tmp_path / "log", environment=environment) as server:
        assert update(server, other)[0] == 200
        assert_same(answers(server), wanted)
        assert REPLAYED.format(mode="DECODE", requests=1, size=1) in server.log.read_text()


def test_weights_as_tensors(make, tmp_path):
    path, other = (make("scout", fp8="modelopt", seed=seed) for seed in (0, 1))
    with llama4_server(other, log=tmp_path / "log") as server:
        wanted = answers(server)
    with llama4_server(path, log=tmp_path / "log") as server:
        tensors = MultiprocessingSerializer.serialize(list(checkpoint.load_weights(other).items()), output_str=True)
        assert post(server, "begin_weight_update")[0] == 200
        assert post(server, "update_weights_from_tensor", serialized_named_tensors=[tensors])[0] == 200
        assert post(server, "end_weight_update")[0] == 200
        assert_same(answers(server), wanted)


def test_weights_quantised_at_load_are_not_updated(make, tmp_path):
    path, other = make("scout"), make("scout", seed=1)
    with llama4_server(path, "--quantization=fp8", log=tmp_path / "log") as server:
        before = answers(server)
        status, message = update(server, other)
        assert status == 400 and "quantised the weights at load" in message
        assert post(server, "begin_weight_update")[0] == post(server, "end_weight_update")[0] == 200
        assert_same(answers(server), before)
