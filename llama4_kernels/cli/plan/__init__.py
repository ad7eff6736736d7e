"""`llama4-kernels plan`: what fits on which GPUs, and the command that starts it. Needs neither a GPU nor SGLang."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llama4_kernels.cli.plan import report
from llama4_kernels.cli.plan.errors import PlanError
from llama4_kernels.cli.plan.planner import Question, plan
from llama4_kernels.tables import new_console


def run(question: Question, *, as_json: bool, picture: Path | None) -> int:
    """Print the plan; 0 where it fits, 1 where it does not, 2 where the question is wrong."""
    try:
        answer = plan(question)
        if picture is not None:
            report.plot(answer, picture)
    except PlanError as error:
        print(f"llama4-kernels plan: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(report.as_json(answer), indent=2))
    else:
        report.show(answer, new_console())
    return 0 if answer.fit.problem is None else 1
