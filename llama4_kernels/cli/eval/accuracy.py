"""`llama4-kernels eval`: lm_eval's MMLU-Pro over a server, as SGLang's guide for Llama 4 runs it, beside the guide's scores.

In the folder `out`: answers.jsonl, which a broken run goes on from; samples.jsonl, every question with what was made of its answer;
results.json; results.md, the table; results.png, the scores as bars; lm_eval.log and server.log.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llama4_kernels.cli.eval import guide
from llama4_kernels.cli.eval.answers import AnswerLog, answered_by
from llama4_kernels.cli.eval.target import EvalError, Target
from llama4_kernels.tables import new_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama4_kernels.cli.eval.harness import Score

GUIDE_MAX_GEN_TOKS = 2048
GUIDE_CONCURRENCY = 128
GUIDE_SERVER = ("--mem-fraction-static=0.8", "--context-length=65536")
TIMEOUT = 3600  # seconds for one answer, which may wait for its turn on the server


@dataclass(frozen=True)
class Protocol:
    """What is asked, and how.

    concurrency: at least 2, since lm_eval asks one by one, and keeps nothing, at 1.
    limit: questions of each subject, None for all.
    model: "scout", "maverick" or None, to compare with.
    """

    task: str
    max_gen_toks: int
    concurrency: int
    limit: int | None
    model: str | None

    def not_comparable(self) -> str:
        """Why the guide's scores say nothing about this run's, or ""."""
        from llama4_kernels.cli.eval.harness import GUIDE_TASK

        if self.task != GUIDE_TASK:
            return f"the guide's scores are over {GUIDE_TASK}, not {self.task}"
        if self.limit is not None:
            return f"the guide's scores are over all questions, not the first {self.limit} of each subject"
        if self.max_gen_toks != GUIDE_MAX_GEN_TOKS:
            return f"the guide lets the model write {GUIDE_MAX_GEN_TOKS} tokens, not {self.max_gen_toks}"
        if self.model is None:
            return "the server's model name is neither Scout's nor Maverick's: --guide says which it is"
        return ""


def run(console: Console, served: dict[str, Any], server: AbstractContextManager[Target], protocol: Protocol, out: Path) -> int:
    """Ask, score, compare and write; 1 where the score lies below the guide's by more than chance, else 0. EvalError where it breaks off.

    served: "model", the name of what is served, and how, as far as the command knows: the answers in `out` belong to it.
    server: entered when there is nothing left to go wrong before it.
    """
    from llama4_kernels.cli.eval import harness

    out.mkdir(parents=True, exist_ok=True)
    harness.log_to(out / "lm_eval.log")
    tasks = harness.load(protocol.task)
    asked = served | {"task": protocol.task, "max_gen_toks": protocol.max_gen_toks, "limit": protocol.limit}
    with answered_by(console, server, out / "answers.jsonl", asked) as (target, log):
        results = _evaluate(tasks, target, protocol, log, out)
    scores = harness.scores(results, protocol.task)
    comparisons = _compare(scores[0], protocol)
    record = {
        "url": target.url,
        "model": served["model"],
        "implementation": log.run.get("model_impl", "unknown"),
        "run": log.run,
        "reused": len(log.earlier),
        "protocol": asdict(protocol),
        "scores": [asdict(score) for score in scores],
        "guide": {name: asdict(comparison) | {"verdict": comparison.verdict} for name, comparison in comparisons.items()},
        "not_comparable": protocol.not_comparable(),
        "versions": {name: importlib.metadata.version(name) for name in ("llama4_kernels", "lm_eval", "datasets")},
    }
    _write(out, record, harness.samples(results), scores)
    draw(scores, f"{served['model']}, {protocol.task}").savefig(out / "results.png", dpi=120)
    return _report(console, scores, comparisons, protocol, out)


def _evaluate(tasks: list[Any], target: Target, protocol: Protocol, log: AnswerLog, out: Path) -> dict[str, Any]:
    import aiohttp

    from llama4_kernels.cli.eval import harness

    chat = harness.RecordedChat(
        log,
        model=target.model,
        base_url=f"{target.url}/v1/chat/completions",
        num_concurrent=protocol.concurrency,
        timeout=TIMEOUT,
        max_gen_toks=protocol.max_gen_toks,
    )
    try:
        return harness.evaluate(tasks, chat, max_gen_toks=protocol.max_gen_toks, limit=protocol.limit)
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        print(file=sys.stderr)  # ends the line of the progress bar
        kept = f"{len(log.answers)} of {chat.wanted} answers are kept in {log.path}, the same command goes on from there"
        if isinstance(error, aiohttp.ClientResponseError):
            raise EvalError(f"{target.url} answered {error.status} {error.message}, see {out / 'lm_eval.log'}: {kept}") from error
        raise EvalError(f"{target.url} stopped answering ({type(error).__name__}): {kept}") from error
    except KeyboardInterrupt as error:
        print(file=sys.stderr)
        raise EvalError(f"interrupted: {len(log.answers)} answers are kept in {log.path}, the same command goes on from there") from error


def _compare(total: Score, protocol: Protocol) -> dict[str, guide.Comparison]:
    if protocol.not_comparable() or total.stderr is None:
        return {}
    figures = asdict(guide.GUIDE[protocol.model])
    return {name: guide.compare(total.accuracy, total.stderr, theirs) for name, theirs in figures.items()}


def _write(out: Path, record: dict[str, Any], samples: list[dict[str, Any]], scores: list[Score]) -> None:
    (out / "samples.jsonl").write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = ["| subject | questions | accuracy, % | standard error, % |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(_row(score))} |" for score in scores]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def draw(scores: list[Score], title: str) -> Figure:
    """A bar for each score, the whole first, with its standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.3 * len(scores)), layout="constrained")
    axes = figure.subplots()
    errors = [score.stderr or 0.0 for score in scores]
    axes.barh([score.name for score in scores], [score.accuracy for score in scores], xerr=errors, color="C0", capsize=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy and its standard error, %", title=title)
    return figure


def _row(score: Score) -> tuple[str, ...]:
    return score.name, str(score.questions), f"{score.accuracy:.1f}", "–" if score.stderr is None else f"{score.stderr:.2f}"


def _report(console: Console, scores: list[Score], comparisons: dict[str, guide.Comparison], protocol: Protocol, out: Path) -> int:
    figures = ("questions", "accuracy, %", "standard error, %")
    table = new_table("subject", *figures, right=figures)
    for score in scores:
        table.add_row(*_row(score))
    console.print(table)
    for name, c in comparisons.items():
        console.print(
            f"{protocol.model}, {name}: {c.theirs:.1f} %; difference {c.difference:+.1f} ± {c.stderr:.1f}, "
            f"95 % interval {c.low:+.1f} … {c.high:+.1f}: {c.verdict}",
            soft_wrap=True,
        )
    console.print(f"written to {out}", soft_wrap=True)
    if not comparisons:
        console.print(
            f"OK: all questions are answered; no verdict, because {protocol.not_comparable() or 'one question has no spread'}",
            soft_wrap=True,
        )
        return 0
    ours = comparisons["sglang"]
    if ours.verdict == "lower":
        console.print(
            f"FAIL: the score is lower than what the guide measured with SGLang, {ours.theirs:.1f} %, by more than chance", soft_wrap=True
        )
        return 1
    how = "agrees with" if ours.verdict == "agrees" else "is higher than"
    console.print(
        f"OK: the score {how} what the guide measured with SGLang; a drop of {ours.detectable:.1f} points would most likely show",
        soft_wrap=True,
    )
    return 0
