"""The served model with every op in Triton, in the interpreter where there is no GPU, and its server started as users start it."""

import subprocess

import torch
from engine import ask, assert_agrees, llama4_server, prompt

CHUNK = 64


def test_scout_through_triton(make, oracle, tmp_path):
    path = make("scout")
    environment = {"LLAMA4_KERNELS_BACKEND": "triton"} | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    with llama4_server(path, "--chunked-prefill-size=48", log=tmp_path / "log", environment=environment, popen=subprocess.Popen) as server:
        assert {backend for backend, _ in server.backends().values()} == {"triton"}
        assert_agrees(ask(server, prompt(CHUNK + 6), new_tokens=3), oracle(path))
