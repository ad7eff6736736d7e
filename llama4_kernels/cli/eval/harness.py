"""lm_eval's evaluator and its client of chat servers, with every answer kept as it comes. The only module that imports lm_eval."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.openai_completions import LocalChatCompletion

from llama4_kernels.cli.eval.answers import AnswerLog
from llama4_kernels.cli.eval.target import EvalError

GUIDE_TASK = "mmlu_pro"
OWN_TASK = "own_questions"
OWN_QUESTIONS = Path(__file__).with_name("questions.jsonl")
MMLU_PRO = Path(lm_eval.tasks.__file__).parent / "mmlu_pro"

# Our questions take the place of one subject's, so that everything but the data is MMLU-Pro's.
OWN_GROUP = {
    "group": OWN_TASK,
    "task": [
        {
            "task": "mmlu_pro_other",
            "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(own_questions())},
            "fewshot_split": None,
        }
    ],
}


@dataclass(frozen=True)
class Score:
    """Accuracy of a task and its standard error in percent; None for one question, which has no spread."""

    name: str
    accuracy: float
    stderr: float | None
    questions: int


def own_questions() -> list[dict[str, Any]]:
    """question, options, answer (a letter) and category of each, as in MMLU-Pro."""
    return [json.loads(line) for line in OWN_QUESTIONS.read_text().splitlines()]


def load(task: str) -> list[Task | Group]:
    """The task or group of that name, with its data; EvalError where lm_eval does not have it, or the data cannot be had."""
    own = task in (GUIDE_TASK, OWN_TASK)
    manager = lm_eval.tasks.TaskManager(**({"include_defaults": False, "include_path": MMLU_PRO} if own else {}))
    if not own and task not in manager.all_tasks:
        near = difflib.get_close_matches(task, [GUIDE_TASK, OWN_TASK, *manager.all_tasks], n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"{GUIDE_TASK} is the guide's, {OWN_TASK} needs no network"
        raise EvalError(f"lm_eval has no task {task}: {advice}")
    try:
        loaded = manager.load([OWN_GROUP if task == OWN_TASK else task])
    except Exception as error:  # whatever the hub, the cache and the data's own script raise
        reason = " ".join(str(error).split())[:200]
        advice = f"allow the network once, or take --task {OWN_TASK}, which needs none"
        raise EvalError(f"the data of {task} cannot be loaded ({type(error).__name__}: {reason}): {advice}") from error
    return [loaded["groups"][task]] if task in loaded["groups"] else list(loaded["tasks"].values())


def evaluate(tasks: list[Task | Group], chat: RecordedChat, *, max_gen_toks: int, limit: int | None) -> dict[str, Any]:
    """lm_eval's results and samples: chat template, no examples, greedy, at most `limit` questions of each subject."""
    return evaluator.simple_evaluate(
        model=chat,
        tasks=tasks,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        num_fewshot=0,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": max_gen_toks},
        limit=limit,
    )


class RecordedChat(LocalChatCompletion):
    """lm_eval's local-chat-completions, which asks only what `log` has no answer to yet, and writes every answer there at once.

    options: of LocalChatCompletion.
    wanted: how many questions the evaluation has, once it has begun to ask.
    """

    def __init__(self, log: AnswerLog, **options: Any):
        super().__init__(**options)
        self.log = log
        self.wanted = 0
        self.cache_hook = self  # lm_eval calls add_partial of it for each answer
        self._questions: dict[str, Instance] = {}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._questions = {_key(*request.args): request for request in requests}
        self.wanted = len(requests)
        missing = [request for key, request in self._questions.items() if key not in self.log.answers]
        if missing:
            super().generate_until(missing, disable_tqdm)
        return [self.log.answers[_key(*request.args)] for request in requests]

    def add_partial(self, method: str, arguments: tuple[Any, dict], answer: str) -> None:
        key = _key(*arguments)
        question = self._questions[key]
        self.log.add(key, answer, task=question.task_name, doc=question.doc_id)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm_eval's own cache is not used."""


def log_to(file: Path) -> None:
    """Send what lm_eval logs, and asyncio of its requests that fail, to `file` instead of the terminal, from now on."""
    datasets.disable_progress_bars()
    handler = logging.FileHandler(file, mode="w")
    for name, level in (("lm_eval", logging.INFO), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def scores(results: dict[str, Any], task: str) -> list[Score]:
    """That of `task` as a whole, then those of its parts, if it has any."""
    parts = [_score(results["results"][name], count["effective"]) for name, count in results["n-samples"].items()]
    if len(parts) == 1:
        return [replace(parts[0], name=task)]
    return [_score(results["groups"][task], sum(part.questions for part in parts)), *parts]


def _score(values: dict[str, Any], questions: int) -> Score:
    names = [name for name in values if "," in name and "_stderr" not in name]
    if not names:
        raise EvalError(f"lm_eval gives no score for {values['name']}: choose a task that generates text")
    name = next((name for name in names if name.startswith("exact_match")), names[0])
    stderr = values.get(name.replace(",", "_stderr,", 1))
    return Score(
        str(values["alias"]).strip(" -"), 100 * float(values[name]), 100 * float(stderr) if isinstance(stderr, float) else None, questions
    )


def samples(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per question: its task and number, what was answered, extracted and right, and its metrics."""
    return [
        {
            "task": task,
            "doc": sample["doc_id"],
            "answer": sample["resps"][0][0],
            "extracted": sample["filtered_resps"][0],
            "target": sample["target"],
            "metrics": {name: float(sample[name]) for name in sample["metrics"]},
        }
        for task, of_task in results["samples"].items()
        for sample in of_task
    ]


def _key(context: Any, generation: dict) -> str:
    text = json.dumps([getattr(context, "prompt", context), generation], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
