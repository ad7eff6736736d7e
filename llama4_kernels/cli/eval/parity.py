"""`llama4-kernels eval --parity`: the logprob of every token of a text, served with the plugin, against other implementations.

transformers   in float32, with the activations of an FP8 checkpoint rounded as the ops define it (see cli/oracle.py). Judged as the demo
               is: in float32 by the largest |Δlogprob|, in FP8 by the mean. In bfloat16 rounding moves a token to another expert now and
               then, for which there is no bound: the differences are shown and not judged.
stock          SGLang's own model, where there is a GPU. Not judged: neither of the two is the oracle of the other.

In the folder `out`: parity.json, every token's logprobs; parity.png, |Δlogprob| over position.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from llama4_kernels.cli import checkpoint, demo
from llama4_kernels.cli.eval.needle import haystack
from llama4_kernels.cli.eval.target import EvalError, check_model, chunk_size, started
from llama4_kernels.cli.tables import new_table

SHORTEST = 512  # tokens compared where none are asked for,
PAST_CHUNK = 5  # or so many quarters of a chunk
FLOOR = 1e-8  # what a difference of 0 is drawn as


@dataclass(frozen=True)
class Series:
    """The differences from one implementation.

    against: its name.
    difference: |Δlogprob| of each token after the first.
    statistic, bound: "max" or "mean" of the differences, and what it must not exceed; None where they are not judged.
    """

    against: str
    difference: Tensor
    statistic: str | None = None
    bound: float | None = None

    def problem(self) -> str:
        """What exceeds the bound, or ""."""
        if self.bound is None:
            return ""
        value = float(getattr(self.difference, self.statistic)())
        return "" if value <= self.bound else f"{self.statistic} |Δlogprob| from {self.against} is {value:.1e}, over {self.bound:.1e}"


def run(
    console: Console,
    model: Path,
    out: Path,
    *,
    text: Path | None,
    tokens: int | None,
    dtype: str,
    tp: int,
    against: list[str],
    flags: tuple[str, ...] = (),
) -> int:
    """Serve, compare and draw; 1 where a judged difference is over its bound, else 0.

    text: a file of UTF-8; None for prose of the package's own. tokens: at most so many of them; None for the whole file, or of our prose
        enough to pass the first chunk.
    dtype: "float32" or "bfloat16", of everything that is not FP8.
    against: "transformers" and "stock".
    """
    if "stock" in against and not torch.cuda.is_available():
        raise EvalError("SGLang's own Llama 4 needs a GPU, and there is none: leave out --against stock")
    check_model(model)
    if not model.is_dir():
        raise EvalError(f"{model} is no folder: --parity reads the checkpoint's files, give the folder that holds them")
    ids, chunk = _tokenise(model, text, tokens), chunk_size(model)
    if chunk and len(ids) <= chunk:
        console.print(f"the text ends within the first chunk of {chunk} tokens: nothing past it is compared")
    out.mkdir(parents=True, exist_ok=True)
    flags = (f"--dtype={dtype}", f"--context-length={len(ids) + 8}", f"--max-total-tokens={2 * len(ids) + 64}", *flags)
    ours = _logprobs(console, model, ids, *flags, log=out / "server.log", tp=tp)
    series = []
    if "transformers" in against:
        console.print(f"computing {len(ids)} tokens in transformers")
        series.append(_from_transformers(model, ids, ours, dtype, tp))
    if "stock" in against:
        stock = _logprobs(console, model, ids, *flags, log=out / "stock.log", tp=tp, stock=True)
        series.append(Series("stock SGLang", (ours - stock).abs()))
    _write(out, model, dtype, chunk, ids, ours, series)
    draw(series, chunk, f"{model.name}, {dtype}", out / "parity.png")
    return _report(console, series, chunk, out)


def _tokenise(model: Path, text: Path | None, tokens: int | None) -> list[int]:
    from transformers import AutoTokenizer

    if text is None:
        tokens = tokens or max(SHORTEST, PAST_CHUNK * (chunk_size(model) or 0) // 4)
        words = " ".join(haystack(8 * tokens))
    else:
        try:
            words = text.read_text()
        except UnicodeDecodeError as error:
            raise EvalError(f"{text} is not UTF-8 ({error.reason} at byte {error.start}): --text needs a text file") from error
    ids = AutoTokenizer.from_pretrained(model)(words).input_ids[:tokens]
    if len(ids) < 2:
        raise EvalError(f"{text} holds {len(ids)} tokens: --text needs at least 2")
    return ids


def _logprobs(console: Console, model: Path, ids: list[int], *flags: str, log: Path, tp: int, stock: bool = False) -> Tensor:
    """A server's logprob of every token of `ids` after the first."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    with started(console, model, *flags, log=log, tp=tp, stock=stock) as target:
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer = target.server.post("/generate", body, timeout=1800)
    logprobs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    if len(logprobs) != len(ids) - 1:
        raise EvalError(f"the server gave {len(logprobs)} logprobs for {len(ids)} tokens, see {log}")
    return torch.tensor(logprobs)


def _from_transformers(model: Path, ids: list[int], ours: Tensor, dtype: str, tp: int) -> Series:
    fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in checkpoint.load_weights(model).values())
    with tempfile.TemporaryDirectory(prefix="llama4_kernels-parity-") as folder:
        reference = demo.reference_for(model, Path(folder), fp8, tp)
        compared = reference.compare("text", ids, [], ours.tolist())
    if dtype != "float32":
        return Series("transformers", compared.difference)
    if reference.unrounded is None:
        return Series("transformers", compared.difference, "max", demo.TOLERANCE)
    from llama4_kernels.cli.oracle import rounding_bound

    bound = rounding_bound(float(compared.whole_error.mean()), reference.oracle.rounding_sites())
    return Series("transformers, activations rounded", compared.difference, "mean", bound)


def per_chunk(difference: Tensor, chunk: int | None) -> list[tuple[int, Tensor]]:
    """First position, and differences, of each chunk. difference[i] belongs to the token at position i + 1, which position i predicts:
    so it counts to the chunk of position i."""
    return [
        (first, part)
        for first, part in zip(range(0, len(difference), chunk or len(difference)), difference.split(chunk or len(difference)))
    ]


def draw(series: list[Series], chunk: int | None, title: str, file: Path) -> None:
    """|Δlogprob| over position as a picture, chunk borders and bounds as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for i, s in enumerate(series):
        axes.semilogy(range(len(s.difference)), s.difference.clamp(min=FLOOR), ".", markersize=3, color=f"C{i}", label=s.against)
        if s.bound is not None:
            axes.axhline(s.bound, color=f"C{i}", linestyle="--", linewidth=1, label=f"bound of the {s.statistic}, {s.bound:.1e}")
    borders = range(chunk, len(series[0].difference), chunk) if chunk else ()
    for i, border in enumerate(borders):
        axes.axvline(border, color="0.75", linewidth=0.8, zorder=0, label="chunk border" if i == 0 else None)
    axes.set(xlabel="position, tokens", ylabel="|Δlogprob|", title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(file, dpi=120)


def _write(out: Path, model: Path, dtype: str, chunk: int | None, ids: list[int], ours: Tensor, series: list[Series]) -> None:
    record: dict[str, Any] = {"model": str(model), "dtype": dtype, "chunk": chunk, "tokens": ids, "logprobs": ours.tolist(), "against": {}}
    for s in series:
        record["against"][s.against] = {
            "difference": s.difference.tolist(),
            "max": float(s.difference.max()),
            "mean": float(s.difference.mean()),
            "judged_by": s.statistic,
            "bound": s.bound,
        }
    (out / "parity.json").write_text(json.dumps(record) + "\n")


def _report(console: Console, series: list[Series], chunk: int | None, out: Path) -> int:
    for s in series:
        table = new_table("positions", "max |Δlogprob|", "mean |Δlogprob|", title=f"from {s.against}")
        for first, part in [*per_chunk(s.difference, chunk), (0, s.difference)]:
            table.add_row(f"{first} … {first + len(part) - 1}", f"{part.max():.1e}", f"{part.mean():.1e}")
        console.print(table)
        how = "not judged" if s.bound is None else f"bound: {s.statistic} {s.bound:.1e}"
        console.print(how)
    console.print(f"written to {out}", soft_wrap=True)
    problems = [problem for s in series if (problem := s.problem())]
    for problem in problems:
        console.print(f"FAIL: {problem}", soft_wrap=True)
    if not problems:
        judged = [s.against for s in series if s.bound is not None]
        console.print(f"OK: every logprob is there; {f'agrees with {judged[0]}' if judged else 'nothing was judged'}", soft_wrap=True)
    return 1 if problems else 0
