"""Asking a real SGLang server, and comparing it with transformers."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import preloaded
import requests
import torch

from llama4_kernels.cli.checkpoint import BYTES, CHUNK
from llama4_kernels.cli.oracle import Oracle
from llama4_kernels.cli.server import Server, serve
from llama4_kernels.ops.backend import OPS

TOLERANCE = 1e-4
NEW_TOKENS = 16
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)


@dataclass(frozen=True)
class Answer:
    """Generated tokens, the logprob of each of them, and where asked for that of every token after the first of the prompt before them."""

    prompt: list[int]
    generated: list[int]
    logprobs: torch.Tensor
    meta_info: dict  # what SGLang says of the request

    @property
    def cached_tokens(self) -> int:
        return self.meta_info["cached_tokens"]


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, BYTES, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


@contextlib.contextmanager
def llama4_server(
    path: Path,
    *flags: str,
    log: Path,
    tp: int = 1,
    dtype: str = "float32",
    environment: dict[str, str] | None = None,
    popen: Callable[..., subprocess.Popen] = preloaded.popen,
) -> Iterator[Server]:
    """A server with the plugin. Fails where SGLang's own model was built, which it is without a word when the plugin is blocked.

    popen: what starts it: subprocess.Popen as for users, and faster preloaded.import_once and, where no variable has to be set before SGLang is
    imported, preloaded.popen.
    """
    flags = ("--max-total-tokens=4096", "--context-length=1024", "--max-running-requests=8", "--sleep-on-idle", *flags)
    with serve(
        path, "--model-impl=llama4_kernels", f"--dtype={dtype}", *flags, log=log, tp=tp, environment=environment, popen=popen
    ) as server:
        assert server.serving() in ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")
        assert set(server.backends()) == set(OPS)
        yield server


def ask(server: Server, ids: list[int], new_tokens: int = NEW_TOKENS, whole: bool = True) -> Answer:
    return ask_at_once(server, [ids], new_tokens, whole)[0]


def ask_at_once(
    server: Server, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, whole: bool = True, rids: list[str] | None = None
) -> list[Answer]:
    """Greedy continuations. One body for all, which the scheduler gets in one piece: what runs together does not hang on the clock.

    whole: with the prompts' logprobs, which makes SGLang compute all of a prompt, cached or not.
    """
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        **({"logprob_start_len": 0} if whole else {}),
        **({"rid": rids} if rids else {}),
    }
    answers = []
    for ids, answer in zip(prompts, server.post("/generate", body), strict=True):
        meta = answer["meta_info"]
        entries = (meta["input_token_logprobs"][1:] if whole else []) + meta["output_token_logprobs"]
        answers.append(Answer(ids, answer["output_ids"], torch.tensor([entry[0] for entry in entries]), meta))
    return answers


def begin(server: Server, body: dict) -> Iterator[dict]:
    """The rest of a stream of /generate, whose request runs already."""
    answer = requests.post(f"{server.url}/generate", json=body | {"stream": True}, stream=True, timeout=120)
    parts = (json.loads(line.removeprefix(b"data: ")) for line in answer.iter_lines() if line.startswith(b"data: {"))
    next(parts)
    return parts


def difference(answer: Answer, oracle: Oracle) -> torch.Tensor:
    """|Δlogprob| of each token that the answer has a logprob for."""
    want, _ = oracle.logprobs(answer.prompt + answer.generated)
    return (answer.logprobs - want[len(want) - len(answer.logprobs) :]).abs()


def differences(answers: list[Answer], oracle: Oracle, rounded: Oracle) -> tuple[torch.Tensor, torch.Tensor]:
    """|Δlogprob| to `oracle` of each token: of the answers, and of `rounded`, the same in another dtype."""
    texts = [answer.prompt + answer.generated for answer in answers]
    theirs = [(rounded.logprobs(ids)[0] - oracle.logprobs(ids)[0]).abs() for ids in texts]
    return torch.cat([difference(answer, oracle) for answer in answers]), torch.cat(theirs)


def assert_agrees(answer: Answer, oracle: Oracle) -> None:
    """Every logprob within TOLERANCE of transformers', and every generated token its most likely one."""
    _, best = oracle.logprobs(answer.prompt + answer.generated)
    assert difference(answer, oracle).max() <= TOLERANCE
    assert answer.generated == best[len(best) - len(answer.generated) :].tolist()
