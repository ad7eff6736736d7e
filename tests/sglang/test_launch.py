"""That the plugin is in each process of a server."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import preloaded
import pytest
import requests
from engine import ask, assert_agrees, llama4_server, prompt
from sglang.srt.environ import envs

from llama4_kernels.cli.checkpoint import VOCABULARY
from llama4_kernels.sglang.launch import WORKER_APP, prepare_launch


def arguments(**changes):
    return SimpleNamespace(**{"use_ray": False, "tokenizer_worker_num": 1, "api_key": None, "admin_api_key": None} | changes)


@pytest.fixture
def app_path(monkeypatch):
    """The variable that names the app, as it was after the test."""
    name = envs.SGLANG_HTTP_SERVER_APP_PATH.name
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    return envs.SGLANG_HTTP_SERVER_APP_PATH


def test_http_processes_with_plugins(make, oracle, tmp_path):
    path = make("scout")
    patient = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "120"}  # of seconds, of which importing may take more than the 10 by default
    with llama4_server(path, "--tokenizer-worker-num=2", log=tmp_path / "log", environment=patient, popen=preloaded.import_once) as server:
        for _ in range(4):  # each a connection of its own, which either process may take
            for route, body in (
                ("generate", {"input_ids": [5, VOCABULARY]}),
                ("generate", {"input_ids": prompt(4), "sampling_params": {"n": 0}}),
                ("api/chat", {"model": "tiny", "messages": [], "stream": False}),
            ):
                assert requests.post(f"{server.url}/{route}", json=body, timeout=60).status_code == 400, (route, body)
        assert_agrees(ask(server, prompt(70)), oracle(path))

        body = {"input_ids": prompt(70), "rid": "a", "sampling_params": {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}}
        text = server.post("/generate", body)["text"]
        with ThreadPoolExecutor(16) as clients:  # of one rid, which each process takes once at a time
            for _ in range(4):
                answers = list(clients.map(lambda _: requests.post(f"{server.url}/generate", json=body, timeout=60), range(16)))
                assert {answer.status_code for answer in answers} <= {200, 400}
                assert {answer.json()["text"] for answer in answers if answer.ok} == {text}


def test_one_http_process_has_sglangs_app(app_path):
    prepare_launch(arguments())
    assert not app_path.is_set()


def test_several_http_processes_have_an_app_that_loads_plugins(app_path):
    prepare_launch(arguments(tokenizer_worker_num=2))
    prepare_launch(arguments(tokenizer_worker_num=2))
    assert app_path.get() == WORKER_APP


def test_an_http_app_without_plugins(app_path):
    app_path.set("mine:app")
    with pytest.raises(ValueError, match=f"SGLANG_HTTP_SERVER_APP_PATH is mine:app, .* --tokenizer-worker-num 2 needs {WORKER_APP}"):
        prepare_launch(arguments(tokenizer_worker_num=2))


@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key"])
def test_keys_that_several_http_processes_would_not_check(app_path, flag):
    key = {flag.removeprefix("--").replace("-", "_"): "secret"}
    prepare_launch(arguments(**key))
    with pytest.raises(ValueError, match=f"{flag} is given with --tokenizer-worker-num 2, whose processes check no keys"):
        prepare_launch(arguments(tokenizer_worker_num=2, **key))


def test_ray():
    with pytest.raises(ValueError, match="with --use-ray, whose processes load no plugins"):
        prepare_launch(arguments(use_ray=True))
