"""`llama4-kernels guide`: the launch lines of SGLang's Llama 4 guide with this plugin, on tiny random checkpoints, and what they promise.

The lines are the guide's own for Scout, the two that it measures accuracy with, and those that its tips describe; its one with EAGLE3 is
not among them, for SGLang speculates on GPUs only. A line has the guide's flags, but for the model's path, RANKS in place of eight,
--model-impl, and ADDED_FLAGS. Each promise is asked for with the official openai client. A random model says nothing sensible, so what is
checked is what holds of any model: that a stream adds up to the answer given at once, that a forced tool call or schema comes back as one that
parses, that an image changes the answer.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console

from llama4_kernels.cli import checkpoint
from llama4_kernels.cli.demo import print_backends, start_progress
from llama4_kernels.cli.plan.model import PRESETS
from llama4_kernels.cli.server import ServerError, serve
from llama4_kernels.tables import new_console, new_table

if TYPE_CHECKING:
    from openai import OpenAI

RANKS = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
# A small KV cache; JSON without the spaces that a random model would go on with until its last token; the parser that tool calls need;
# attention of the vision tower in PyTorch, for on a GPU SGLang's other kinds take no float32
ADDED_FLAGS = (
    "--dtype=float32",
    "--mm-attention-backend=sdpa",
    "--max-total-tokens=8192",
    "--max-running-requests=8",
    "--constrained-json-disable-any-whitespace",
    "--tool-call-parser=pythonic",
)
CHAT_FLAGS = ("--chat-template=llama-4",)
IMAGE_FLAGS = ("--enable-multimodal",)

QUESTION = [{"role": "user", "content": "What do you know about llamas?"}]
CITIES = ("Paris", "Lima")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of the next days.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": list(CITIES)}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
PYTHONIC_CALL = rf'\[get_weather\(city="({"|".join(CITIES)})", days=[1-7]\)\]'


class Broken(Exception):
    """A promise that was not kept; the message says what came instead."""


@dataclass(frozen=True)
class Line:
    """One launch line of the guide: which model, its flags beside the path and --tp, whether it takes images, and what to know of it."""

    like: Literal["scout", "maverick"]
    flags: tuple[str, ...]
    images: bool = False
    note: str = ""

    def __str__(self) -> str:
        words = ["python3", "-m", "sglang.launch_server", "--model-path", PRESETS[self.like].repositories["bf16"], "--tp", "8", *self.flags]
        return shlex.join([*words, "--model-impl", "llama4_kernels"]) + (f"  # {self.note}" if self.note else "")


LINES = {
    "scout-1m": Line("scout", ("--context-length=1000000", *CHAT_FLAGS, *IMAGE_FLAGS), images=True),
    "scout-2.5m": Line(
        "scout", ("--context-length=2500000", *CHAT_FLAGS), note="SGLang 0.5.23 needs --max-running-requests too: docs/serving.md"
    ),
    "maverick": Line("maverick", CHAT_FLAGS),
    "scout-accuracy": Line("scout", ("--mem-fraction-static=0.8", "--context-length=65536")),
    "maverick-accuracy": Line("maverick", ("--mem-fraction-static=0.8", "--context-length=65536")),
}


def run(names: list[str] | None, keep: Path | None) -> int:
    """Start the lines of those names, or all, one after the other; 0 where every promise is kept, else 1."""
    try:
        import openai  # noqa: F401
        import sglang  # noqa: F401
    except ImportError as missing:
        print(f'{missing.name} is not installed: pip install "llama4_kernels[sglang]"', file=sys.stderr)
        return 1
    console = new_console()
    broken = []
    try:
        with tempfile.TemporaryDirectory(prefix="llama4_kernels-guide-") as folder:
            for name in names or LINES:
                broken += _run_line(console, name, LINES[name], keep or Path(folder))
    except OSError as error:
        broken.append(str(error))
    for what in broken:
        print(f"FAIL: {what}", file=sys.stderr)
    if not broken:
        console.print("OK: every line starts and keeps its promises")
    return 1 if broken else 0


def _run_line(console: Console, name: str, line: Line, folder: Path) -> list[str]:
    """Start one line and ask for its promises; what was broken."""
    console.print(f"{name}: {line}", soft_wrap=True)
    positions = PRESETS[line.like].text["max_position_embeddings"]
    path = checkpoint.make(folder / name, line.like, vision=line.images, max_position_embeddings=positions)
    table = new_table("promise", "", "seen")
    broken = []
    flags = ("--model-impl=llama4_kernels", *line.flags, *ADDED_FLAGS)
    try:
        with (
            start_progress(console) as progress,
            serve(path, *flags, log=folder / f"{name}.log", tp=RANKS, progress=progress) as server,
        ):
            progress(server.seconds_to_start, "")
            if server.serving() is None:
                return [f"{name}: the server runs SGLang's own model; run `llama4-kernels doctor`"]
            table.add_row("starts", "kept", f"healthy after {server.seconds_to_start:.0f} s")
            for promise, (verdict, seen) in check(_client(server.url), images=line.images).items():
                table.add_row(promise, verdict, seen)
                broken += [f"{name}: {promise}: {seen}"] if verdict == "BROKEN" else []
            print_backends(console, server)
    except ServerError as error:
        broken.append(f"{name}: {error}")
    console.print(table)
    return broken


def _client(url: str) -> OpenAI:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def check(client: OpenAI, *, images: bool) -> dict[str, tuple[str, str]]:
    """promise -> ("kept" or "BROKEN", what was seen), all asked of the server behind `client`."""
    promises: dict[str, Callable[[OpenAI], str]] = {
        "chat": chat,
        "streaming": streaming,
        "tool call, required": required_tool_call,
        "tool call, pythonic": pythonic_tool_call,
        "tool call, streamed": streamed_tool_call,
        "structured output": structured_output,
        **({"images": image} if images else {}),
        "bad requests": bad_requests,
    }
    found = {}
    for promise, ask in promises.items():
        try:
            found[promise] = ("kept", ask(client))
        except Exception as error:  # whatever the client raises is an answer that was not what was promised
            found[promise] = ("BROKEN", f"{type(error).__name__}: {error}"[:300])
    return found


def chat(client: OpenAI) -> str:
    """An answer of 16 tokens, the same when asked again."""
    answers = [_ask(client, max_tokens=16) for _ in range(2)]
    text, usage = answers[0].choices[0].message.content, answers[0].usage
    _promise(answers[1].choices[0].message.content == text, "the same question got another answer")
    _promise(usage.completion_tokens == 16 and answers[0].choices[0].finish_reason == "length", f"usage {usage}")
    return f"{usage.prompt_tokens} tokens of prompt, {text!r}"


def streaming(client: OpenAI) -> str:
    """The parts of a stream add up to the answer given at once."""
    whole = _ask(client, max_tokens=16).choices[0].message.content
    parts = [event.choices[0] for event in _ask(client, max_tokens=16, stream=True)]
    text = "".join(part.delta.content or "" for part in parts)
    _promise(text == whole, f"streamed {text!r}, at once {whole!r}")
    _promise(parts[-1].finish_reason == "length", f"the stream ended with {parts[-1].finish_reason}")
    return f"{len(parts)} parts"


def required_tool_call(client: OpenAI) -> str:
    """tool_choice="required", and one tool by name: one call that the tool's schema allows."""
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = _ask(client, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=200).choices[0]
        _promise(len(answer.message.tool_calls or ()) == 1, f"{choice} got {answer.message.content!r}")
        call = _checked_call(answer.message.tool_calls[0].function.name, answer.message.tool_calls[0].function.arguments)
        _promise(answer.finish_reason in ("tool_calls", "stop"), f"finish_reason {answer.finish_reason}")
    return call


def pythonic_tool_call(client: OpenAI) -> str:
    """A call written as Llama 4 writes it, forced by a regular expression, comes back parsed and not as text."""
    answer = _ask(client, tools=[WEATHER], max_tokens=200, extra_body={"regex": PYTHONIC_CALL}).choices[0]
    _promise(answer.finish_reason == "tool_calls", f"finish_reason {answer.finish_reason}, {answer.message.content!r}")
    _promise(len(answer.message.tool_calls) == 1 and not answer.message.content, f"{answer.message}")
    return _checked_call(answer.message.tool_calls[0].function.name, answer.message.tool_calls[0].function.arguments)


def streamed_tool_call(client: OpenAI) -> str:
    """The same, in parts that add up to one call."""
    name, arguments, reason = "", "", None
    for event in _ask(client, tools=[WEATHER], max_tokens=200, extra_body={"regex": PYTHONIC_CALL}, stream=True):
        for call in event.choices[0].delta.tool_calls or ():
            name, arguments = name + (call.function.name or ""), arguments + (call.function.arguments or "")
        reason = event.choices[0].finish_reason or reason
    _promise(reason == "tool_calls", f"the stream ended with {reason}")
    return _checked_call(name, arguments)


def structured_output(client: OpenAI) -> str:
    """A pydantic model as response format, checked by pydantic."""
    from pydantic import BaseModel, ConfigDict, Field

    class Animal(BaseModel):
        model_config = ConfigDict(extra="forbid")
        kind: Literal["llama", "alpaca"]
        legs: int = Field(ge=0, le=9)
        tame: bool

    answer = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Animal, max_tokens=200, temperature=0)
    _promise(isinstance(answer.choices[0].message.parsed, Animal), f"{answer.choices[0].message}")
    return answer.choices[0].message.content


def image(client: OpenAI) -> str:
    """Two images get two answers, one image twice the same."""
    answers = [_ask(client, messages=_about(seed), max_tokens=8, logprobs=True).choices[0] for seed in (0, 0, 1)]
    first, again, other = ([token.logprob for token in answer.logprobs.content] for answer in answers)
    _promise(max(abs(a - b) for a, b in zip(first, again)) < 1e-3, "the same image got another answer")
    _promise(max(abs(a - b) for a, b in zip(first, other)) > 1e-2, "another image got the same answer")
    return f"{answers[0].message.content!r}"


def bad_requests(client: OpenAI) -> str:
    """Each is refused as the client's fault, and the server answers on."""
    from openai import BadRequestError

    unknown = {"type": "function", "function": {"name": "no_such_tool"}}
    schema = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "frobnicate"}}}
    wrong: tuple[dict[str, Any], ...] = (
        {"messages": []},
        {"tools": [WEATHER], "tool_choice": unknown},
        {"response_format": schema},
        {"temperature": -1},
    )
    for body in wrong:
        try:
            _ask(client, **{"max_tokens": 4} | body)
        except BadRequestError:
            continue
        raise Broken(f"{body} was answered")
    _ask(client, max_tokens=1)
    return f"{len(wrong)} refused, the server answers on"


def _ask(client: OpenAI, **body: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "temperature": 0} | body)


def _checked_call(name: str, arguments: str) -> str:
    """`name(arguments)`; Broken where the schema of WEATHER does not allow it."""
    found = json.loads(arguments)
    right = name == "get_weather" and set(found) == {"city", "days"} and found["city"] in CITIES
    _promise(right and type(found["days"]) is int and 1 <= found["days"] <= 7, f"{name}({arguments})")
    return f"{name}({arguments})"


def _about(seed: int) -> list[dict[str, Any]]:
    from PIL import Image

    size = checkpoint.IMAGE_SIZE
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed)).byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in this picture?"}]
    return [{"role": "user", "content": content}]


def _promise(kept: bool, otherwise: str) -> None:
    if not kept:
        raise Broken(otherwise)
