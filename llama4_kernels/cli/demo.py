"""`llama4-kernels demo`: a tiny random Llama 4 through the installed SGLang with this plugin, every logprob compared with transformers.

In float32 every |Δlogprob| must be at most TOLERANCE and every greedy token equal. With --fp8 the reference rounds activations to e4m3 as
the ops define it, and the mean |Δlogprob| over all tokens must be at most `oracle.rounding_bound`: see there why, and why a mean.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from llama4_kernels.cli import checkpoint, checkpoint_files
from llama4_kernels.cli.checkpoint import CHUNK
from llama4_kernels.cli.server import Server, ServerError, serve
from llama4_kernels.tables import new_console, new_table

if TYPE_CHECKING:
    from llama4_kernels.cli.oracle import Oracle

TOLERANCE = 1e-4
PROMPT_LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
NEW_TOKENS = 24
QUESTION = "What do you know about llamas?"
IMAGE_QUESTION = "What is in this picture?"
FLAGS = ("--model-impl=llama4_kernels", "--dtype=float32", "--max-total-tokens=4096", "--context-length=1024", "--max-running-requests=8")
# Without the first SGLang serves Llama 4 as text only. The second has the vision tower attend in PyTorch: on a GPU SGLang's other kinds take
# no float32.
VISION_FLAGS = ("--enable-multimodal", "--mm-attention-backend=sdpa")


@dataclass(frozen=True)
class Comparison:
    """One request against the reference.

    prompt: what was asked.
    length: tokens of the prompt.
    difference: |Δlogprob| of each token compared.
    whole_error: for FP8, what rounding the activations does to each of these logprobs; else None.
    greedy: how many of the generated tokens are the reference's most likely ones.
    generated: how many tokens were generated.
    """

    prompt: str
    length: int
    difference: Tensor
    whole_error: Tensor | None
    greedy: int
    generated: int


@dataclass(frozen=True)
class Reference:
    """The oracle, and for FP8 also the one that leaves activations alone."""

    oracle: Oracle
    unrounded: Oracle | None

    def compare(self, prompt: str, ids: list[int], generated: list[int], logprobs: list[float], **image: Tensor) -> Comparison:
        """logprobs: the server's, of the generated tokens, or of all tokens of ids + generated but the first; else ServerError."""
        if len(logprobs) not in (len(generated), len(ids) + len(generated) - 1) or not logprobs:
            raise ServerError(f"{len(logprobs)} logprobs came back for {len(ids)} tokens of prompt and {len(generated)} of answer")
        want, best = self.oracle.logprobs(ids + generated, **image)
        got = torch.tensor(logprobs)
        want, best = want[len(want) - len(got) :], best[len(best) - len(generated) :]
        whole_error = None
        if self.unrounded is not None:
            whole_error = (self.unrounded.logprobs(ids + generated, **image)[0][-len(got) :] - want).abs()
        matches = int((best == torch.tensor(generated)).sum())
        return Comparison(prompt, len(ids), (got - want).abs(), whole_error, matches, len(generated))


def run(like: str, *, fp8: bool, vision: bool, tp: int, keep: Path | None, port: int | None) -> int:
    """Run the demo; 0 where all agrees, else 1."""
    if importlib.util.find_spec("sglang") is None:
        print('sglang is not installed: pip install "llama4_kernels[sglang]", then `llama4-kernels doctor`', file=sys.stderr)
        return 1
    started = time.monotonic()
    console = new_console()
    try:
        with _folder(keep) as folder:
            problems = _demo(console, folder, like, fp8, vision, tp, port)
    except (ServerError, OSError) as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"FAIL: {problem}", file=sys.stderr)
    if keep:
        console.print(f"kept in {keep}", soft_wrap=True)
    if not problems:
        console.print(f"OK: SGLang with --model-impl llama4_kernels agrees with transformers ({time.monotonic() - started:.0f} s)")
    return 1 if problems else 0


def _demo(console: Console, folder: Path, like: str, fp8: bool, vision: bool, tp: int, port: int | None) -> list[str]:
    """The demo in `folder`; what went wrong, if anything."""
    console.print(f"writing a tiny random checkpoint like Llama 4 {like.capitalize()}{' in FP8' if fp8 else ''}")
    path = checkpoint.make(folder / "checkpoint", like, fp8="compressed-tensors-experts" if fp8 else None, vision=vision)
    reference = reference_for(path, folder, fp8, tp)
    flags = [*FLAGS, *(VISION_FLAGS if vision else ())]
    with start_progress(console) as progress, serve(path, *flags, log=folder / "server.log", tp=tp, port=port, progress=progress) as server:
        progress(server.seconds_to_start, "")
        console.print(f"the server is up after {server.seconds_to_start:.0f} s")
        if server.serving() is None:
            return [
                "the server runs SGLang's own model: its log has no start-up table of llama4_kernels. Run `llama4-kernels doctor`, "
                f"or with --keep read {server.log.name}"
            ]
        console.print(f"comparing prompts of {', '.join(map(str, PROMPT_LENGTHS))} tokens with transformers, a chunk being {CHUNK}")
        comparisons = [_chat(console, server, reference, path)]
        comparisons += [_generate(server, reference, length) for length in PROMPT_LENGTHS]
        if vision:
            comparisons.append(ask_about_image(server, reference, path))
    print_backends(console, server)
    return _judge(console, comparisons, reference)


def reference_for(path: Path, folder: Path, fp8: bool, tp: int) -> Reference:
    from llama4_kernels.cli.oracle import Oracle

    if not fp8:
        return Reference(Oracle(path), None)
    full = checkpoint_files.dequantised(path, folder / "dequantised")
    return Reference(Oracle(full, quantise_activations=path, ranks=tp), Oracle(full))


def _chat(console: Console, server: Server, reference: Reference, path: Path) -> Comparison:
    """One question through /v1/chat/completions; the answer is shown beside transformers' own greedy answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "tiny", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": True, "return_token_ids": True}
    choice = server.post("/v1/chat/completions", body)["choices"][0]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = reference.oracle.greedy(ids, NEW_TOKENS)
    console.print(f"question       {QUESTION}")
    console.print(f"SGLang         {choice['message']['content']!r}")
    console.print(f"transformers   {tokenizer.decode(expected, skip_special_tokens=True)!r}")
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return reference.compare("chat", ids, choice["response_token_ids"], logprobs)


def _generate(server: Server, reference: Reference, length: int) -> Comparison:
    ids = torch.randint(0, checkpoint.BYTES, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    answer = _ask(server, input_ids=ids, logprob_start_len=0)
    logprobs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]] + _output_logprobs(answer)
    return reference.compare("tokens", ids, answer["output_ids"], logprobs)


def ask_about_image(server: Server, reference: Reference, path: Path) -> Comparison:
    """A question about an image. Tokens of the prompt are not compared: SGLang replaces the image's by a hash."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    pixels = torch.randint(0, 256, (checkpoint.IMAGE_SIZE, checkpoint.IMAGE_SIZE, 3), generator=torch.Generator().manual_seed(0)).byte()
    image = Image.fromarray(pixels.numpy())
    content = [{"type": "image"}, {"type": "text", "text": IMAGE_QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    answer = _ask(server, text=text, image_data=[url])
    inputs = processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
    ids = inputs["input_ids"][0].tolist()
    return reference.compare("image", ids, answer["output_ids"], _output_logprobs(answer), pixel_values=inputs["pixel_values"].float())


def _ask(server: Server, **body: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return server.post("/generate", {"sampling_params": sampling, "return_logprob": True, **body})


def _output_logprobs(answer: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def _judge(console: Console, comparisons: list[Comparison], reference: Reference) -> list[str]:
    """Print the comparisons; what exceeds its bound."""
    table = new_table("prompt", "length", "tokens compared", "max |Δlogprob|", "mean |Δlogprob|", "greedy match")
    for c in comparisons:
        numbers = (str(len(c.difference)), f"{c.difference.max():.1e}", f"{c.difference.mean():.1e}", f"{c.greedy}/{c.generated}")
        table.add_row(c.prompt, str(c.length), *numbers)
    console.print(table)
    if reference.unrounded is None:
        console.print(f"bound: max |Δlogprob| {TOLERANCE:.0e}, every greedy token equal")
        return [problem for c in comparisons for problem in _problems(c)]
    from llama4_kernels.cli.oracle import rounding_bound

    mean = float(torch.cat([c.difference for c in comparisons]).mean())
    whole = float(torch.cat([c.whole_error for c in comparisons if c.whole_error is not None]).mean())
    bound = rounding_bound(whole, reference.oracle.rounding_sites())
    console.print(f"mean |Δlogprob| of all tokens {mean:.1e}, bound {bound:.1e} (rounding the activations costs {whole:.1e})")
    return [] if mean <= bound else [f"mean |Δlogprob| {mean:.1e} is over {bound:.1e}"]


def _problems(c: Comparison) -> list[str]:
    request = f"{c.prompt} of {c.length} tokens"
    problems = [] if c.greedy == c.generated else [f"{request}: {c.greedy} of {c.generated} greedy tokens agree"]
    if not c.difference.max() <= TOLERANCE:
        problems.append(f"{request}: max |Δlogprob| {c.difference.max():.1e} is over {TOLERANCE:.0e}")
    return problems


def print_backends(console: Console, server: Server) -> None:
    """What computed: the server's start-up table, ops of one backend and reason together, and what went elsewhere since."""
    backends = server.backends()
    for backend, why in dict.fromkeys(backends.values()):
        ops = [op for op, taken in backends.items() if taken == (backend, why)]
        console.print(f"{', '.join(ops)} -> {backend} ({why})", soft_wrap=True)
    for refusal in server.refusals():
        console.print(refusal, soft_wrap=True)


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="llama4_kernels-demo-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def start_progress(console: Console) -> Iterator[Callable[[float, str], None]]:
    """A reporter of the server's start: one live line on a terminal, else a line every ten seconds. An empty line of log ends it."""
    if not console.is_terminal:
        printed = 0.0

        def report(seconds: float, line: str) -> None:
            nonlocal printed
            if line and seconds >= printed + 10:
                printed = seconds
                print(f"starting sglang.launch_server, {seconds:.0f} s: {line}", flush=True)

        yield report
        return
    with console.status("starting sglang.launch_server") as status:

        def show(seconds: float, line: str) -> None:
            if line:
                status.update(f"starting sglang.launch_server, {seconds:.0f} s: {escape(line[:100])}")
            else:
                status.stop()

        yield show
