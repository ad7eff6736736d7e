"""Control requests that would end the server, or have it wait for good; it lives on."""

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import pytest
import requests
import torch
from engine import ask, assert_agrees, begin, llama4_server, prompt
from sglang.srt.environ import envs

from llama4_kernels.sglang import request_hooks
from llama4_kernels.sglang.control_checks import CHECKS, check_memory
from llama4_kernels.sglang.plugin import MODEL_IMPL


def test_control_requests_that_cannot_be_done(make, oracle, tmp_path):
    path = make("scout")
    with llama4_server(path, log=tmp_path / "log") as server:

        def refused(message, route, **body):
            answer = requests.post(f"{server.url}/{route}", json=body, timeout=60)
            assert answer.status_code == 400 and message in answer.text, (route, body, answer.text)

        for action in ("start", "dump", "stop"):
            refused("not recorded", f"{action}_expert_distribution_record")
        group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 0, "world_size": 1, "backend": "gloo"}
        refused("group_name is empty", "init_weights_update_group", group_name="", **group)
        refused("not sent", "init_weights_send_group_for_remote_instance", master_address="a", ports="1", group_rank=0, world_size=2)
        refused("not sent", "send_weights_to_remote_instance", master_address="a", ports="1")

        refused("needs at most 150 seconds", "slow_down", forward_sleep_time=1e12)
        refused("nothing yet", "resume_memory_occupation")
        refused("nothing yet", "resume_memory_occupation", tags=["unknown"])
        if not torch.cuda.is_available():
            refused("not released on the CPU", "release_memory_occupation")

        (tmp_path / "a file").touch()
        for message, profile in (
            ("num_steps is None, needs at least 1", {"profile_by_stage": True}),
            ("activities is ['RPD'], needs", {"activities": ["RPD"]}),
            ("activities is [], needs", {"activities": []}),
            ("activities is ['CUDA'], needs", {"activities": ["CUDA"]}),
            ("activities is ['CPU', 'MEM'], needs", {"activities": ["CPU", "MEM"]}),
            *(("needs a folder and the name of a file", profile) for profile in (
                {"output_dir": "/proc/a"}, {"output_dir": f"{tmp_path}/a file"}, {"output_dir": "~nobody at all"}, {"output_dir": "\0"},
                {"profile_id": "a/b"}, {"profile_prefix": "a/b"}, {"profile_id": "a" * 250})),
        ):  # fmt: skip
            refused(message, "start_profile", **{"output_dir": str(tmp_path), **profile})
        refused("not in progress", "stop_profile")

        check_pauses(server, path)
        assert_agrees(ask(server, prompt(70)), oracle(path))


def check_pauses(server, path):
    """Updates at once while generation is paused, and a pause by aborts of what is paused already."""
    for mode in ("in_place", "retract"):
        asked = {"input_ids": prompt(4), "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}
        aborted = begin(server, asked)
        server.post("/pause_generation", {"mode": mode})
        for updated in ended(in_background(server, *[("update_weights_from_disk", {"model_path": str(path), "flush_cache": False})] * 3)):
            assert updated.json()["success"], updated.text
        server.post("/pause_generation", {"mode": "abort"}, timeout=30)
        assert list(aborted)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
        (waiting,) = in_background(server, ("generate", asked | {"sampling_params": {"max_new_tokens": 4}}))
        server.post("/continue_generation", {}, timeout=30)
        assert ended([waiting])[0].status_code == 200


def in_background(server, *asked):
    """Of each (route, body): the thread that asks, and where it puts the answer."""
    started = []
    for route, body in asked:
        answers = []

        def ask(route=route, body=body, answers=answers):
            answers.append(requests.post(f"{server.url}/{route}", json=body, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        started.append((thread, answers))
    return started


def ended(started):
    for thread, _ in started:
        thread.join()
    return [answers[0] for _, answers in started]


@pytest.mark.parametrize("modes, paused, sent", [
    (["in_place", "abort"], True, 2), (["retract", "abort"], True, 2), (["in_place", "abort", "abort"], True, 2), (["abort", "abort"], True, 0),
    (["in_place", "abort"], False, 0), (["abort"], False, 0), (["abort", "in_place"], True, 0), (["retract"], False, 0),
], ids=str)  # fmt: skip
def test_what_is_paused_goes_on_to_be_aborted(modes, paused, sent):
    messages = []
    manager = SimpleNamespace(
        is_pause=False, rid_to_state={}, _dispatch_to_scheduler=messages.append, abort_request=lambda abort_all: messages.append("abort")
    )
    for mode in modes:
        CHECKS["pause_generation"](manager, SimpleNamespace(mode=mode))
        manager.is_pause = paused
    assert len(messages) == sent and messages[:1] in ([], ["abort"])


def test_updates_wait_for_each_other():
    running = []

    async def original(manager, request):
        running.append(request)
        await asyncio.sleep(0)
        assert running == [request]
        running.remove(request)
        return request

    async def update_all():
        manager = SimpleNamespace(model_config=SimpleNamespace(model_impl=MODEL_IMPL, is_draft_model=False))
        return await asyncio.gather(*(request_hooks._update_in_turn(original, manager, i) for i in range(3)))

    assert asyncio.run(update_all()) == [0, 1, 2]


def test_a_group_with_a_name_is_left_to_sglang():
    CHECKS["init_weights_update_group"](None, SimpleNamespace(group_name="a"))


@pytest.mark.parametrize("seconds, taken", [(None, True), (-1.0, True), (30.0, True), (31.0, False), (float("nan"), False)])
def test_steps_do_not_sleep_until_the_watchdog_ends_them(seconds, taken, monkeypatch):
    monkeypatch.setattr("sglang.srt.runtime_context.get_device", lambda: SimpleNamespace(watchdog_timeout=60))
    refusal = pytest.raises(ValueError, match="needs at most 30 seconds, half of --watchdog-timeout")
    with contextlib.nullcontext() if taken else refusal:
        CHECKS["slow_down"](None, SimpleNamespace(forward_sleep_time=seconds))


@pytest.fixture
def ask_memory(monkeypatch):
    """Asks a manager on a GPU, with or without requests, to release or resume memory."""
    monkeypatch.setattr("sglang.srt.runtime_context.get_device", lambda: SimpleNamespace(device="cuda"))
    serving = SimpleNamespace(tokenizer_worker_num=1)
    monkeypatch.setattr("sglang.srt.runtime_context.get_serving", lambda: serving)
    manager = SimpleNamespace(rid_to_state={}, is_pause=False)

    def check(name, tags=None, workers=1, **fields):
        serving.tokenizer_worker_num = workers
        manager.__dict__.update(fields)
        CHECKS[f"{name}_memory_occupation"](manager, SimpleNamespace(tags=tags))
        return manager

    return check


def test_only_what_was_released_is_resumed(ask_memory):
    ask_memory("release", ["kv_cache", "weights"])
    for tags in (None, ["cuda_graph"], ["kv_cache", "kv_cache"]):
        with pytest.raises(ValueError, match=r"needs each once of what has been released, \['kv_cache', 'weights'\]"):
            ask_memory("resume", tags)
    ask_memory("resume", ["weights"])
    ask_memory("resume", ["kv_cache"])
    with pytest.raises(ValueError, match="nothing yet"):
        ask_memory("resume", ["kv_cache"])
    ask_memory("release")
    ask_memory("resume", [])


def test_memory_is_not_released_under_requests(ask_memory):
    with pytest.raises(ValueError, match="the server has 1 requests, needs to have none, or to be paused"):
        ask_memory("release", rid_to_state={"a": object()})
    with pytest.raises(ValueError, match="nothing yet"):
        ask_memory("resume")
    ask_memory("release", is_pause=True)


def test_nothing_is_computed_while_memory_is_released(ask_memory, monkeypatch):
    features = SimpleNamespace(enable_memory_saver=True)
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: SimpleNamespace(features=features))
    manager = ask_memory("release", ["weights", "kv_cache"], is_pause=True)
    CHECKS["continue_generation"](manager, None)
    manager.rid_to_state["a"] = object()
    for ask in (check_memory, lambda manager: CHECKS["continue_generation"](manager, None)):
        with pytest.raises(ValueError, match="the memory of kv_cache, weights is released, needs /resume_memory_occupation first"):
            ask(manager)
    features.enable_memory_saver = False  # nothing is released then
    check_memory(manager)
    features.enable_memory_saver = True
    ask_memory("resume", ["weights", "kv_cache"])
    check_memory(manager)
    ask_memory("release", ["cuda_graph"], is_pause=True)
    check_memory(manager)  # of graphs nothing is released,
    with envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH.override(True), pytest.raises(ValueError, match="the memory of cuda_graph is released"):
        check_memory(manager)  # unless they are asked to be in such memory


def test_memory_is_not_released_by_one_of_several_processes(ask_memory):
    with pytest.raises(ValueError, match="--tokenizer-worker-num is 2, needs 1 to release memory"):
        ask_memory("release", workers=2)
    with pytest.raises(ValueError, match="nothing yet"):
        ask_memory("resume", workers=2)
