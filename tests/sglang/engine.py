"""Asking a real SGLang server, and comparing it with transformers."""

import contextlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import preloaded
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
    """Generated tokens, and the logprob of every token after the first of the prompt."""

    prompt: list[int]
    generated: list[int]
    logprobs: torch.Tensor
    cached_tokens: int


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
    fresh: bool = False,
) -> Iterator[Server]:
    """A server with the plugin. Fails where SGLang's own model was built, which it is without a word when the plugin is blocked.

    fresh: each of its processes imports SGLang for itself, as variables need that are read on import; else it starts preloaded where it can.
    """
    popen = subprocess.Popen if fresh else preloaded.popen
    flags = ("--max-total-tokens=4096", "--context-length=1024", "--max-running-requests=8", *flags)
    with serve(path, "--model-impl=llama4_kernels", f"--dtype={dtype}", *flags, log=log, tp=tp, environment=environment, popen=popen) as server:
        assert server.serving() in ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")
        assert set(server.backends()) == set(OPS)
        yield server


def ask(server: Server, ids: list[int], new_tokens: int = NEW_TOKENS, whole: bool = True) -> Answer:
    """Greedy continuation of `ids`. whole: with the prompt's logprobs, which makes SGLang compute all of the prompt, cached or not."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, **({"logprob_start_len": 0} if whole else {})}
    answer = server.post("/generate", body)
    meta = answer["meta_info"]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    if whole:
        logprobs = [entry[0] for entry in meta["input_token_logprobs"][1:]] + logprobs
    return Answer(ids, answer["output_ids"], torch.tensor(logprobs), meta["cached_tokens"])


def ask_at_once(server: Server, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Answer]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda ids: ask(server, ids, new_tokens), prompts))


def difference(answer: Answer, oracle: Oracle) -> torch.Tensor:
    """|Δlogprob| of each token that the answer has a logprob for."""
    want, _ = oracle.logprobs(answer.prompt + answer.generated)
    return (answer.logprobs - want[len(want) - len(answer.logprobs) :]).abs()


def assert_agrees(answer: Answer, oracle: Oracle) -> None:
    """Every logprob within TOLERANCE of transformers', and every generated token its most likely one."""
    _, best = oracle.logprobs(answer.prompt + answer.generated)
    assert difference(answer, oracle).max() <= TOLERANCE
    assert answer.generated == best[len(best) - len(answer.generated) :].tolist()
