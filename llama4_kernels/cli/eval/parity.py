"""`llama4-kernels eval --parity`: the logprob of every token of a text, served with the plugin, against other implementations.

transformers   in float32, with the activations of an FP8 checkpoint rounded as the ops define it (see cli/oracle.py). A float32 server is
               judged as the demo is: by the largest |Δlogprob|, in FP8 by the mean. In bfloat16 rounding moves a token to another expert
               now and then, in transformers too: the server may be no further from float32 than transformers in bfloat16 is.
stock          SGLang's own model, where there is a GPU. Not judged: neither of the two is the oracle of the other.

In the folder `out`: parity.json, every token's logprobs; parity.png, |Δlogprob| over position.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from llama4_kernels.cli import checkpoint_files, demo
from llama4_kernels.cli.eval.needle import haystack
from llama4_kernels.cli.eval.target import EvalError, check_model, chunk_size, started
from llama4_kernels.tables import new_table

SHORTEST = 512  # tokens compared where none are asked for,
PAST_CHUNK = 5  # or so many quarters of a chunk
FLOOR = 1e-8  # what a difference of 0 is drawn as
MEDIAN, LARGEST_TENTH = "median", "90th percentile"
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": Tensor.max,
    "mean": Tensor.mean,
    MEDIAN: lambda difference: difference.quantile(0.5),
    LARGEST_TENTH: lambda difference: difference.quantile(0.9),
}
FP8_IN_BFLOAT16 = 1.25  # of transformers' median: bfloat16 moves codes of FP8, in the server other ones than in transformers
BYTES_OF_FLOAT32 = 4
# Flags after which the server computes something else than transformers, and which of them this command has an option for
OWN_OPTION = {"--dtype": "--dtype", "--tp-size": "--tp", "--tensor-parallel-size": "--tp"}
OTHER_MODEL = (
    *OWN_OPTION,
    *("--quantization", "--kv-cache-dtype", "--json-model-override-args", "--load-format", "--model-impl", "--model-path"),
)


@dataclass(frozen=True)
class Series:
    """The differences from one implementation.

    against: its name.
    difference: |Δlogprob| of each token after the first.
    bounds: what statistics of the differences, by their names in STATISTICS, must not exceed; empty where they are not judged.
    """

    against: str
    difference: Tensor
    bounds: dict[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What exceeds its bound."""
        values = {name: float(STATISTICS[name](self.difference)) for name in self.bounds}
        return [
            f"{name} |Δlogprob| from {self.against} is {value:.1e}, over {self.bounds[name]:.1e}"
            for name, value in values.items()
            if not value <= self.bounds[name]
        ]


def run(
    console: Console,
    model: str | Path,
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

    model: the folder of a checkpoint, or the name of one in the Hugging Face cache.
    text: a file of UTF-8; None for prose of the package's own. tokens: at most so many of them; None for the whole file, or of our prose
        enough to pass the first chunk.
    dtype: "float32" or "bfloat16", of everything that is not FP8.
    against: "transformers" and "stock".
    """
    if "stock" in against and not torch.cuda.is_available():
        raise EvalError("SGLang's own Llama 4 needs a GPU, and there is none: leave out --against stock")
    name, model = Path(model).name, check_model(model)
    if "transformers" in against:
        _check_flags(flags)
        _check_room(model)
    ids, chunk = _tokenise(model, text, tokens), chunk_size(model)
    if chunk and len(ids) <= chunk:
        console.print(f"the text ends within the first chunk of {chunk} tokens: nothing past it is compared")
    out.mkdir(parents=True, exist_ok=True)
    flags = (f"--dtype={dtype}", f"--context-length={len(ids) + 8}", f"--max-total-tokens={2 * len(ids) + 64}", *flags)
    ours, served = _logprobs(console, model, ids, *flags, log=out / "server.log", tp=tp)
    series = []
    if "transformers" in against:
        console.print(f"computing {len(ids)} tokens in transformers")
        series.append(_from_transformers(model, ids, ours, dtype, tp))
    if "stock" in against:
        stock, _ = _logprobs(console, model, ids, *flags, log=out / "stock.log", tp=tp, stock=True)
        series.append(Series("stock SGLang", (ours - stock).abs()))
    _write(out, model, dtype, served, chunk, ids, ours, series)
    draw(series, chunk, f"{name}, {dtype}", out / "parity.png")
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


def _logprobs(
    console: Console, model: Path, ids: list[int], *flags: str, log: Path, tp: int, stock: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """A server's logprob of every token of `ids` after the first, and what they depend on, as far as it says."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    with started(console, model, *flags, log=log, tp=tp, stock=stock) as target:
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer, facts = target.server.post("/generate", body, timeout=1800), target.facts()
    logprobs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    if len(logprobs) != len(ids) - 1:
        raise EvalError(f"the server gave {len(logprobs)} logprobs for {len(ids)} tokens, see {log}")
    return torch.tensor(logprobs), facts


def _from_transformers(model: Path, ids: list[int], ours: Tensor, dtype: str, tp: int) -> Series:
    """One model in memory at a time."""
    from llama4_kernels.cli.oracle import Oracle, rounding_bound

    fp8 = _is_fp8(model)
    with tempfile.TemporaryDirectory(prefix="llama4_kernels-parity-") as folder:
        full = _dequantised(model, Path(folder)) if fp8 else model
        oracle = Oracle(full)
        if fp8 and dtype == "float32":
            unrounded = oracle.logprobs(ids)[0]
        if fp8:
            oracle.round_activations(model, tp)
        exact, sites = oracle.logprobs(ids)[0], oracle.rounding_sites()
        del oracle
        if dtype == "bfloat16":
            oracle = Oracle(full, model if fp8 else None, torch.bfloat16, tp)
            theirs = (oracle.logprobs(ids)[0] - exact).abs()
    against = f"transformers{', activations rounded' if fp8 else ''}"
    if dtype == "bfloat16":
        bounds = {MEDIAN: FP8_IN_BFLOAT16} if fp8 else {MEDIAN: 1.0, LARGEST_TENTH: 1.0}
        bounds = {name: times * float(STATISTICS[name](theirs)) for name, times in bounds.items()}
    elif fp8:
        bounds = {"mean": rounding_bound(float((unrounded - exact).abs().mean()), sites)}
    else:
        bounds = {"max": demo.TOLERANCE}
    return Series(against, (ours - exact).abs(), bounds)


def _is_fp8(model: Path) -> bool:
    return any(header.is_fp8 for header in checkpoint_files.headers(model).values())


def _dequantised(model: Path, folder: Path) -> Path:
    try:
        return checkpoint_files.dequantised(model, folder / "dequantised")
    except ValueError as error:
        raise EvalError(f"{model}: {error}") from error


def _check_flags(flags: tuple[str, ...]) -> None:
    """EvalError for a flag, also abbreviated, that transformers knows nothing of."""
    for flag in flags:
        given = flag.partition("=")[0].split()[0] if flag.strip() else ""
        if given.startswith("--") and len(given) > 2 and (asked := [name for name in OTHER_MODEL if name.startswith(given)]):
            instead = OWN_OPTION.get(asked[0])
            instead = f"{instead} of this command says it" if instead else "give a checkpoint that is so, or --against stock alone"
            raise EvalError(f"--server-flag={flag} has the server compute what transformers does not: {instead}")


def _check_room(model: Path) -> None:
    """EvalError where this machine has less memory, or a smaller disk, than the weights in float32 take, which is the least that is needed."""
    found = checkpoint_files.headers(model)
    if not found:
        raise EvalError(f"{model} holds no *.safetensors: --parity reads the checkpoint's weights, download them")
    size = BYTES_OF_FLOAT32 * sum(math.prod(header.shape) for name, header in found.items() if not name.endswith(checkpoint_files.SCALES))
    needs = {"memory": (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine")}
    if _is_fp8(model):
        needs["disk"] = (shutil.disk_usage(tempfile.gettempdir()).free, f"{tempfile.gettempdir()}, which TMPDIR names,")
    for what, (there, where) in needs.items():
        if size > there:
            raise EvalError(
                f"transformers in float32 takes at least {size / 1e9:.0f} GB of {what} for the weights of {model}, and {where} has "
                f"{there / 1e9:.0f}: run it where there is as much, or compare with --against stock alone"
            )


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
        for (name, bound), style in zip(s.bounds.items(), ("--", ":")):
            axes.axhline(bound, color=f"C{i}", linestyle=style, linewidth=1, label=f"bound of the {name}, {bound:.1e}")
    borders = range(chunk, len(series[0].difference), chunk) if chunk else ()
    for i, border in enumerate(borders):
        axes.axvline(border, color="0.75", linewidth=0.8, zorder=0, label="chunk border" if i == 0 else None)
    axes.set(xlabel="position, tokens", ylabel="|Δlogprob|", title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(file, dpi=120)


def _write(
    out: Path, model: Path, dtype: str, served: dict[str, Any], chunk: int | None, ids: list[int], ours: Tensor, series: list[Series]
) -> None:
    record: dict[str, Any] = {"model": str(model), "dtype": dtype, "run": served, "chunk": chunk, "tokens": ids, "logprobs": ours.tolist()}
    record["against"] = {}
    for s in series:
        record["against"][s.against] = {
            "difference": s.difference.tolist(),
            **{name: float(statistic(s.difference)) for name, statistic in STATISTICS.items()},
            "bounds": s.bounds,
        }
    (out / "parity.json").write_text(json.dumps(record) + "\n")


def _report(console: Console, series: list[Series], chunk: int | None, out: Path) -> int:
    for s in series:
        table = new_table("positions", "max |Δlogprob|", "mean |Δlogprob|", title=f"from {s.against}")
        for first, part in [*per_chunk(s.difference, chunk), (0, s.difference)]:
            table.add_row(f"{first} … {first + len(part) - 1}", f"{part.max():.1e}", f"{part.mean():.1e}")
        console.print(table)
        bounds = ", ".join(f"{name} {STATISTICS[name](s.difference):.1e} of {bound:.1e}" for name, bound in s.bounds.items())
        console.print(f"judged: {bounds}" if bounds else "not judged")
    console.print(f"written to {out}", soft_wrap=True)
    problems = [problem for s in series for problem in s.problems()]
    for problem in problems:
        console.print(f"FAIL: {problem}", soft_wrap=True)
    if not problems:
        judged = [s.against for s in series if s.bounds]
        console.print(f"OK: every logprob is there; {f'agrees with {judged[0]}' if judged else 'nothing was judged'}", soft_wrap=True)
    return 1 if problems else 0
