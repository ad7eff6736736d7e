"""The guide's lines and the judgement of their answers. That the real server keeps the promises: tests/sglang/test_guide_engine.py."""

import contextlib
import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from llama4_kernels.cli import guide
from llama4_kernels.cli.main import app
from llama4_kernels.cli.server import ServerError

pytest.importorskip("openai")


def invoke(*arguments):
    return CliRunner().invoke(app, ["guide", *arguments])


def test_the_lines_of_the_guide():
    lines = dict(line.split(": ", 1) for line in invoke("--list").output.splitlines())
    scout = "python3 -m sglang.launch_server --model-path meta-llama/Llama-4-Scout-17B-16E-Instruct --tp 8 --context-length=1000000"
    assert lines["scout-1m"].startswith(scout) and "--context-length=2500000" in lines["scout-2.5m"]
    assert "--context-length" not in lines["maverick"]
    for name in ("scout-accuracy", "maverick-accuracy"):
        assert "--mem-fraction-static=0.8 --context-length=65536" in lines[name]
    assert lines["scout-2.5m"].endswith(" --model-impl llama4_kernels  # SGLang 0.5.23 needs --max-running-requests too: docs/serving.md")
    others = [line for name, line in lines.items() if name != "scout-2.5m"]
    assert all(line.endswith("--model-impl llama4_kernels") for line in others)
    assert {name for name, line in lines.items() if "--chat-template=llama-4" in line} == {"scout-1m", "scout-2.5m", "maverick"}
    assert not any("--tool-call-parser" in line for line in lines.values()), "the guide gives none"


@pytest.mark.parametrize(
    "arguments, says",
    [(["--line", "behemoth"], "--line"), (["--keep", __file__], "--keep"), (["--list", "--line", "maverick"], "has no effect with --list")],
)
def test_a_wrong_option_is_named(arguments, says):
    result = invoke(*arguments)
    assert result.exit_code == 2 and says in result.output


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").touch()
    result = invoke("--keep", str(tmp_path))
    assert result.exit_code == 2 and "is not empty" in " ".join(result.output.replace("│", " ").split())


def test_a_line_is_started_with_its_own_flags_and_those_that_are_added(monkeypatch, tmp_path):
    started = []

    @contextlib.contextmanager
    def serve(path, *flags, log, tp, progress):
        started.extend(flags)
        raise ServerError("not today")
        yield

    monkeypatch.setattr(guide, "serve", serve)
    monkeypatch.setattr(guide.checkpoint, "make", lambda folder, like, **config: folder)
    guide._run_line(Console(), "scout-accuracy", guide.LINES["scout-accuracy"], tmp_path)
    own = ["--model-impl=llama4_kernels", "--mem-fraction-static=0.8", "--context-length=65536"]
    assert started == [*own, *guide.ADDED_FLAGS] and "--tool-call-parser=pythonic" in guide.ADDED_FLAGS


def test_how_far_a_server_has_come_is_shown(monkeypatch, tmp_path, capsys):
    @contextlib.contextmanager
    def serve(path, *flags, log, tp, progress):
        progress(12.0, "loading weights")
        raise ServerError("out of luck")
        yield

    monkeypatch.setattr(guide, "serve", serve)
    monkeypatch.setattr(guide.checkpoint, "make", lambda folder, like, **config: folder)
    (broken,) = guide._run_line(Console(), "maverick", guide.LINES["maverick"], tmp_path)
    assert "starting sglang.launch_server, 12 s: loading weights" in capsys.readouterr().out and broken == "maverick: out of luck"


class Client:
    """An openai client that answers what it is told: text, the same in a stream unless told otherwise, and tool calls."""

    def __init__(
        self, text="abcd", streamed=None, arguments='{"city": "Lima", "days": 2}', reason="tool_calls", calls=1, image_logprob=None
    ):
        self.text, self.streamed = text, text if streamed is None else streamed
        self.arguments, self.reason, self.calls, self.image_logprob = arguments, reason, calls, image_logprob or (lambda url: len(url) % 7)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, *, messages, stream=False, tools=None, max_tokens=1, logprobs=False, **more):
        if tools:
            call = SimpleNamespace(function=SimpleNamespace(name="get_weather", arguments=self.arguments))
            if not stream:
                message = SimpleNamespace(content=None, tool_calls=[call] * self.calls)
                return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason=self.reason)])
            parts = [("get_weather", ""), (None, self.arguments[:9]), (None, self.arguments[9:])]
            deltas = [[SimpleNamespace(function=SimpleNamespace(name=name, arguments=text))] for name, text in parts] + [None]
            reasons = [None, None, None, self.reason]
            return [
                SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(tool_calls=d), finish_reason=r)])
                for d, r in zip(deltas, reasons)
            ]
        if stream:
            parts = [(letter, None) for letter in self.streamed] + [(None, "length")]
            return [SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=c), finish_reason=r)]) for c, r in parts]
        scores = None
        if logprobs:
            scores = SimpleNamespace(content=[SimpleNamespace(logprob=self.image_logprob(json.dumps(messages)))])
        choice = SimpleNamespace(message=SimpleNamespace(content=self.text), finish_reason="length", logprobs=scores)
        return SimpleNamespace(choices=[choice], usage=SimpleNamespace(completion_tokens=max_tokens, prompt_tokens=5))


@pytest.mark.parametrize(
    "promise", [guide.chat, guide.streaming, guide.required_tool_call, guide.pythonic_tool_call, guide.streamed_tool_call]
)
def test_a_promise_that_is_kept(promise):
    assert promise(Client())


@pytest.mark.parametrize(
    "promise, broken",
    [
        (guide.streaming, {"streamed": "abce"}),
        (guide.required_tool_call, {"calls": 0}),
        (guide.required_tool_call, {"arguments": '{"city": "Rome", "days": 2}'}),
        (guide.required_tool_call, {"arguments": '{"city": "Lima", "days": 8}'}),
        (guide.required_tool_call, {"arguments": '{"city": "Lima"}'}),
        (guide.required_tool_call, {"arguments": '{"city": "Lima", "days": true}'}),
        (guide.required_tool_call, {"reason": "length"}),
        (guide.pythonic_tool_call, {"reason": "stop"}),
        (guide.pythonic_tool_call, {"calls": 2}),
        (guide.streamed_tool_call, {"reason": "stop"}),
        (guide.streamed_tool_call, {"arguments": '{"city": "Lima", "days": "2"}'}),
        (guide.image, {"image_logprob": lambda url: 1.0}),
        (guide.bad_requests, {}),
    ],
)
def test_a_promise_that_is_broken(promise, broken):
    with pytest.raises(guide.Broken):
        promise(Client(**broken))


def test_an_answer_that_does_not_parse_is_a_broken_promise():
    found = guide.check(Client(arguments='{"city": '), images=False)
    assert found["tool call, required"][0] == found["tool call, streamed"][0] == "BROKEN"
    assert found["chat"][0] == found["streaming"][0] == "kept"
