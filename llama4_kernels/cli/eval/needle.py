"""`llama4-kernels eval --needle`: a number hidden at some depth of a long text, asked back.

Llama 4's local layers see one chunk of 8192 tokens, so whatever lies further back than that reaches the answer through its global layers
alone. The check asks any OpenAI-compatible server and counts tokens as that server reports them.

In the folder `out`: answers.jsonl, which a broken run goes on from; results.json; results.png, what was found by length and depth.
"""

from __future__ import annotations

import json
import os
import random
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from llama4_kernels.cli.eval.answers import AnswerLog, answered_by
from llama4_kernels.cli.eval.target import EvalError, Target
from llama4_kernels.tables import new_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 8192
TIMEOUT = 3600  # seconds for one answer
ANSWER_TOKENS = 32
ESSAY = Path(__file__).with_name("essay.txt")
QUESTION = "What is the number of the lighthouse keeper's locker? Answer with the number alone."


@dataclass(frozen=True)
class Probe:
    """One question. length: tokens wanted of the prompt. depth: where in the text the number stands, 0 the start, 1 the end."""

    length: int
    depth: float

    @property
    def number(self) -> str:
        """The five digits to find, another for each probe."""
        return str(random.Random(f"{self.length} {self.depth}").randint(10000, 99999))

    @property
    def key(self) -> str:
        return f"{self.length} tokens, depth {self.depth}"

    def prompt(self, characters: int) -> str:
        """A text of about `characters` with the number in it, and the question. Probes of one length share the text around it."""
        sentences = haystack(characters)
        at = round(self.depth * len(sentences))
        needle = f"The number of the lighthouse keeper's locker is {self.number}."
        return " ".join([*sentences[:at], needle, *sentences[at:]]) + f"\n\n{QUESTION}"


@dataclass(frozen=True)
class Outcome:
    """tokens: of the prompt, as the server counts. answer: its text, or None where it refused, and then why stands in `refused`."""

    length: int
    depth: float
    tokens: int
    answer: str | None
    found: bool
    refused: str = ""


def haystack(characters: int) -> list[str]:
    """Sentences of the essay in random order, again and again, at least `characters` long when joined. It holds no digits."""
    sentences = re.split(r"(?<=\.)\s+", ESSAY.read_text().strip())
    order, taken, size = random.Random(0), [], 0
    while size < characters:
        for sentence in order.sample(sentences, len(sentences)):
            taken.append(sentence)
            size += len(sentence) + 1
            if size >= characters:
                break
    return taken


def is_found(answer: str, number: str) -> bool:
    """Whether `number` is the first whole number in the answer."""
    numbers = re.findall(r"\d+", answer.replace(",", ""))
    return numbers[:1] == [number]


def run(
    console: Console, served: dict[str, Any], server: AbstractContextManager[Target], lengths: list[int], depths: list[float], out: Path
) -> int:
    """Ask every depth at every length; 0 where every number was found, else 1. EvalError where the server stops answering.

    served: "model", the name of what is served, and how, as far as the command knows: the answers in `out` belong to it.
    server: entered when there is nothing left to go wrong before it.
    """
    probes = [Probe(length, depth) for length in lengths for depth in depths]
    outcomes = []
    asked = served | {"task": "needle", "max_gen_toks": ANSWER_TOKENS}
    with answered_by(console, server, out / "answers.jsonl", asked) as (target, log):
        client = _Client(target, log)
        progress = Progress(TextColumn("{task.description}"), *Progress.get_default_columns()[1:3], TimeElapsedColumn(), console=console)
        with progress:
            task = progress.add_task("", total=len(probes))
            for probe in probes:
                progress.update(task, description=probe.key)
                outcomes.append(client.outcome(probe))
                progress.advance(task)
    record = {
        "url": target.url,
        "model": served["model"],
        "implementation": log.run.get("model_impl", "unknown"),
        "run": log.run,
        "reused": sum(probe.key in log.earlier for probe in probes),
        "probes": [asdict(o) for o in outcomes],
    }
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(outcomes, lengths, depths, served["model"]).savefig(out / "results.png", dpi=120)
    return _report(console, outcomes, lengths, depths, out)


class _Client:
    def __init__(self, target: Target, log: AnswerLog):
        import openai

        key = os.environ.get("OPENAI_API_KEY", "none")
        self.api = openai.OpenAI(base_url=f"{target.url}/v1", api_key=key, timeout=TIMEOUT, max_retries=0)
        self.target, self.log = target, log
        self._line: tuple[int, int, float] | None = None

    def outcome(self, probe: Probe) -> Outcome:
        """From the log, or asked."""
        if probe.key not in self.log.answers:
            try:
                tokens, text = self._ask(probe.prompt(self._characters(probe.length)), ANSWER_TOKENS)
                self.log.add(probe.key, {"tokens": tokens, "text": text}, number=probe.number)
            except _Refused as refused:
                return Outcome(probe.length, probe.depth, 0, None, False, str(refused))
        answer = self.log.answers[probe.key]
        return Outcome(probe.length, probe.depth, answer["tokens"], answer["text"], is_found(answer["text"], probe.number))

    def _characters(self, length: int) -> int:
        """How long the haystack must be for a prompt of `length` tokens: a line through two prompts, which are asked for once."""
        if self._line is None:
            (few, short), (many, long) = ((self._ask(Probe(0, 0.5).prompt(n), 1)[0], n) for n in (1000, 9000))
            if many <= few:
                raise EvalError(f"{self.target.url} reports no usage.prompt_tokens that grow with the prompt: they are needed")
            self._line = few, short, (long - short) / (many - few)
        few, short, per_token = self._line
        return max(0, round(short + (length - few) * per_token))

    def _ask(self, prompt: str, max_tokens: int) -> tuple[int, str]:
        """Tokens of the prompt, and the answer."""
        import openai

        messages = [{"role": "user", "content": prompt}]
        try:
            answer = self.api.chat.completions.create(model=self.target.model, messages=messages, max_tokens=max_tokens, temperature=0)
        except openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):
                raise _Refused(" ".join(str(error).split())[:300]) from error
            raise EvalError(f"{self.target.url} answered {error.status_code}: {self._kept()}") from error
        except openai.APIError as error:
            raise EvalError(f"{self.target.url} stopped answering ({type(error).__name__}): {self._kept()}") from error
        return answer.usage.prompt_tokens if answer.usage else 0, answer.choices[0].message.content or ""

    def _kept(self) -> str:
        return f"{len(self.log.answers)} answers are kept in {self.log.path}, the same command goes on from there"


class _Refused(Exception):
    """The server takes no prompt of this length."""


def _report(console: Console, outcomes: list[Outcome], lengths: list[int], depths: list[float], out: Path) -> int:
    table = new_table("tokens", *(f"{depth:.0%}" for depth in depths))
    for length in lengths:
        row = [o for o in outcomes if o.length == length]
        table.add_row(_tokens(row), *(_cell(o) for o in row))
    console.print("the number's place in the text, 0% the start; yes: found, no: another answer, –: the prompt was refused", soft_wrap=True)
    console.print(table)
    for refused in dict.fromkeys(o.refused for o in outcomes if o.refused):
        console.print(f"refused: {refused}", soft_wrap=True)
    past = [o for o in outcomes if o.tokens > CHUNK]
    found, found_past = (sum(o.found for o in some) for some in (outcomes, past))
    console.print(f"written to {out}", soft_wrap=True)
    verdict = "OK" if found == len(outcomes) else "FAIL"
    console.print(
        f"{verdict}: found {found} of {len(outcomes)}; {found_past} of {len(past)} in prompts of more than {CHUNK} tokens", soft_wrap=True
    )
    return 0 if found == len(outcomes) else 1


def draw(outcomes: list[Outcome], lengths: list[int], depths: list[float], title: str) -> Figure:
    """A field for each length and depth, by colour and word: found, another answer, or refused."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows = [[o for o in outcomes if o.length == length] for length in lengths]
    colors = {"yes": "skyblue", "no": "tab:orange", "–": "lightgrey"}
    kinds = [[list(colors).index(_cell(o)) for o in row] for row in rows]
    figure = Figure(figsize=(3 + 0.8 * len(depths), 1.5 + 0.4 * len(lengths)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(kinds, cmap=ListedColormap(list(colors.values())), vmin=0, vmax=len(colors) - 1, aspect="auto")
    for y, row in enumerate(rows):
        for x, outcome in enumerate(row):
            axes.text(x, y, _cell(outcome), ha="center", va="center")
    axes.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_yticks(range(len(lengths)), [_tokens(row) for row in rows])
    axes.set(xlabel="the number's place in the text, 0% the start", ylabel="tokens", title=title)
    return figure


def _tokens(row: list[Outcome]) -> str:
    """Of the prompts of one length."""
    counted = [o.tokens for o in row if o.tokens]
    return str(max(counted)) if counted else f"{row[0].length} asked"


def _cell(outcome: Outcome) -> str:
    return "–" if outcome.answer is None else "yes" if outcome.found else "no"
