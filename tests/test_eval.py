"""Accuracy, and what the evaluations share, over servers that answer as a test wants: right, wrong, half, or not at all.

tests/sglang has the real one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evaluations import after, has_lm_eval, has_matplotlib, has_transformers, only_line, run_eval
from standin import serving

from llama4_kernels.cli.eval import accuracy, command, guide, target
from llama4_kernels.cli.eval.answers import AnswerLog
from llama4_kernels.cli.eval.target import EvalError, Target

QUESTIONS = 20


def right(prompt: str) -> str:
    """A model that knows our questions."""
    from llama4_kernels.cli.eval.harness import own_questions

    question = next(q for q in own_questions() if q["question"] in prompt)
    return f"This takes one step. The answer is ({question['answer']})."


def wrong(prompt: str) -> str:
    return re.sub(r"\((\w)\)", lambda m: "(A)" if m[1] != "A" else "(B)", right(prompt))


def ask_own_questions(stand_in, out, *more):
    return run_eval("--url", stand_in.url, "--task", "own_questions", "--out", out, *more)


@has_lm_eval
@pytest.mark.parametrize(
    "answer, score", [(right, 100.0), (wrong, 0.0), (lambda prompt: "I do not know.", 0.0)], ids=["right", "wrong", "none"]
)
def test_the_score_is_what_was_right(answer, score, tmp_path):
    with serving(answer) as stand_in:
        result = ask_own_questions(stand_in, tmp_path)
    assert result.exit_code == 0
    total = json.loads((tmp_path / "results.json").read_text())["scores"][0]
    assert (total["accuracy"], total["questions"]) == (score, QUESTIONS)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["metrics"]["exact_match"] for sample in samples] == [score / 100] * QUESTIONS
    assert f"| own_questions | {QUESTIONS} | {score:.1f} |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@has_lm_eval
def test_the_picture_has_a_bar_for_each_score_with_its_standard_error():
    from llama4_kernels.cli.eval.harness import Score

    (axes,) = accuracy.draw([Score("all", 75.0, 1.5, 800), Score("law", 60.0, None, 1)], "a model").axes
    assert [bar.get_width() for bar in axes.patches] == [75.0, 60.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "law"] and axes.yaxis_inverted()
    (errors,) = [line for line in axes.collections]
    assert [segment[:, 0].tolist() for segment in errors.get_segments()] == [[73.5, 76.5], [60.0, 60.0]]


@has_lm_eval
def test_some_right_give_their_share_with_its_standard_error(tmp_path):
    with serving(after(15, right, wrong)) as stand_in:
        ask_own_questions(stand_in, tmp_path)
    total = json.loads((tmp_path / "results.json").read_text())["scores"][0]
    assert total["accuracy"] == pytest.approx(75)
    assert total["stderr"] == pytest.approx(100 * math.sqrt(0.75 * 0.25 / (QUESTIONS - 1)))


@has_lm_eval
def test_questions_are_put_as_the_guide_puts_them(tmp_path):
    with serving(right) as stand_in:
        ask_own_questions(stand_in, tmp_path)
    assert len(stand_in.requests) == QUESTIONS and stand_in.at_once > 1
    body = stand_in.requests[0]
    assert (body["max_tokens"], body["temperature"], body["model"]) == (2048, 0, "stand-in")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "Think step by step" in body["messages"][0]["content"]
    assert body["messages"][1]["content"].count("Question:") == 1  # no examples before it


@has_lm_eval
def test_a_broken_run_goes_on_where_it_was(tmp_path):
    with serving(after(7, right, lambda prompt: 500)) as broken:
        result = ask_own_questions(broken, tmp_path)
    line = only_line(result)
    assert "answered 500" in line and "7 of 20 answers are kept" in line
    with serving(right) as whole:
        result = ask_own_questions(whole, tmp_path)
    assert result.exit_code == 0 and len(whole.requests) == QUESTIONS - 7
    assert json.loads((tmp_path / "results.json").read_text())["scores"][0]["accuracy"] == 100


PLUGIN = {"model_impl": "llama4_kernels", "dtype": "bfloat16", "quantization": None, "kv_cache_dtype": "auto", "port": 30000}
EVALUATIONS = pytest.mark.parametrize(
    "evaluation",
    [pytest.param(("--task", "own_questions"), marks=has_lm_eval), pytest.param(("--needle", "--length", 100), marks=has_matplotlib)],
)


@EVALUATIONS
@pytest.mark.parametrize(
    "changed",
    [{"model_impl": "auto"}, {"dtype": "float32"}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8_e4m3"}],
    ids=lambda c: next(iter(c)),
)
def test_answers_of_another_server_are_no_answers_of_this_one(evaluation, changed, tmp_path):
    with serving(lambda prompt: "(A)", info=PLUGIN | changed) as other:
        run_eval("--url", other.url, "--out", tmp_path, *evaluation)
    before = (tmp_path / "answers.jsonl").read_bytes()
    with serving(lambda prompt: "(A)", info=PLUGIN) as stand_in:
        line = only_line(run_eval("--url", stand_in.url, "--out", tmp_path, *evaluation))
    ((name, value),) = changed.items()
    assert f"holds answers of another run ({name} {value!r}, not {PLUGIN[name]!r}): give another --out" in line
    assert other.requests and not stand_in.requests and (tmp_path / "answers.jsonl").read_bytes() == before


@EVALUATIONS
@pytest.mark.parametrize("info", [PLUGIN, None], ids=["SGLang", "a server that says nothing of itself"])
def test_answers_of_the_same_server_are_taken_and_that_is_said(evaluation, info, tmp_path):
    for port in (30000, 30001):
        with serving(lambda prompt: "(A)", info=info and info | {"port": port}) as stand_in:
            result = run_eval("--url", stand_in.url, "--out", tmp_path, *evaluation)
    record = json.loads((tmp_path / "results.json").read_text())
    assert not stand_in.requests and record["reused"] == (QUESTIONS if "--task" in evaluation else 5)
    assert f"{record['reused']} answers of an earlier run are taken from {tmp_path / 'answers.jsonl'}" in result.stdout
    assert ("the server says nothing of itself" in result.stdout) == (info is None)
    assert record["implementation"] == ("unknown" if info is None else "llama4_kernels")
    assert record["run"].get("dtype") == (None if info is None else "bfloat16") and "port" not in record["run"]


@EVALUATIONS
@pytest.mark.parametrize(
    "arguments, variable, backend, says",
    [
        (("--tp", 2), "", "cuda", "tp 1, not 2"),
        (("--server-flag=--quantization=fp8",), "", "cuda", "server_flags [], not ['--quantization=fp8']"),
        ((), "triton", "cuda", "LLAMA4_KERNELS_BACKEND '', not 'triton'"),
        ((), "", "triton", "backends {'fused_moe': 'cuda'}, not {'fused_moe': 'triton'}"),
    ],
    ids=["tp", "flag", "variable", "backend"],
)
def test_answers_of_a_server_started_otherwise(evaluation, arguments, variable, backend, says, tmp_path, monkeypatch):
    """What the command knows itself is told before a server is started."""
    starts = []

    @contextlib.contextmanager
    def start(console, path, *flags, log, tp):
        starts.append(backend)
        with serving(lambda prompt: "(A)", info=PLUGIN) as stand_in:
            yield Target(stand_in.url, "tiny", SimpleNamespace(backends=lambda: {"fused_moe": (table, "first choice on this device")}))

    monkeypatch.setattr(command, "started", start)
    monkeypatch.setattr(command, "_tiny", lambda *given, **named: tmp_path)
    monkeypatch.setenv("LLAMA4_KERNELS_BACKEND", "")
    table = "cuda"
    assert "another run" not in run_eval("--tiny", "scout", "--out", tmp_path, *evaluation).output
    monkeypatch.setenv("LLAMA4_KERNELS_BACKEND", variable)
    table = backend
    assert says in only_line(run_eval("--tiny", "scout", "--out", tmp_path, *evaluation, *arguments))
    assert len(starts) == (2 if backend == "triton" else 1)


def test_a_server_that_does_not_say_what_it_is_in_time(monkeypatch):
    """Its answers could belong to anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setattr(target, "INFO", 0.2)
        with pytest.raises(EvalError, match=r"does not answer /server_info \(ReadTimeout\)"):
            Target(f"http://127.0.0.1:{listener.getsockname()[1]}", "model").facts()


@has_lm_eval
def test_a_server_that_dies_leaves_what_it_answered(tmp_path):
    def die(prompt):
        raise ConnectionResetError

    with serving(after(5, right, die)) as stand_in:
        line = only_line(ask_own_questions(stand_in, tmp_path))
    assert "stopped answering" in line and "5 of 20 answers are kept" in line


@has_lm_eval
def test_a_half_written_file_loses_nothing(tmp_path):
    with serving(right) as stand_in:
        ask_own_questions(stand_in, tmp_path)
    answers = tmp_path / "answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    lines[5] = b"\x00\xff not a line of ours\n"
    before = b"".join(lines)[:-30]  # a damaged line, and the last one cut off
    answers.write_bytes(before)
    with serving(right) as stand_in:
        result = ask_own_questions(stand_in, tmp_path)
    assert result.exit_code == 0 and len(stand_in.requests) == 2
    assert "2 line(s) of" in result.stdout and (tmp_path / "answers.jsonl.damaged-1").read_bytes() == before
    with serving(right) as stand_in:
        assert ask_own_questions(stand_in, tmp_path).exit_code == 0 and stand_in.requests == []


@has_lm_eval
@pytest.mark.parametrize(
    "content, says",
    [
        (b"my diary\n", "does not begin as a file of answers"),
        (b'{"run": {"model": "another"}}\n{"key": "a", "answer": "b"}\n', "'another', not 'stand-in'"),
    ],
    ids=["something else", "another run's"],
)
def test_the_file_of_something_else_is_left_alone(content, says, tmp_path):
    (tmp_path / "answers.jsonl").write_bytes(content)
    with serving(right) as stand_in:
        line = only_line(ask_own_questions(stand_in, tmp_path))
    assert says in line and "give another --out" in line
    assert stand_in.requests == [] and (tmp_path / "answers.jsonl").read_bytes() == content


def test_a_run_that_got_no_answer_makes_way_for_another(tmp_path):
    for run in ({"model": "a"}, {"model": "b"}):
        with AnswerLog(tmp_path / "a", run):
            pass
    with AnswerLog(tmp_path / "a", {"model": "b"}) as log:
        log.add("key", "answer")
    with pytest.raises(EvalError, match="'b', not 'a'"), AnswerLog(tmp_path / "a", {"model": "a"}):
        pass


def test_two_runs_do_not_write_one_file(tmp_path):
    with AnswerLog(tmp_path / "a", {}), pytest.raises(EvalError, match="another run writes"), AnswerLog(tmp_path / "a", {}):
        pass


@has_lm_eval
def test_an_unknown_task_names_a_near_one(tmp_path):
    with serving(right) as stand_in:
        line = only_line(run_eval("--url", stand_in.url, "--task", "mmlu_prp", "--out", tmp_path))
    assert "no task mmlu_prp" in line and "mmlu_pro" in line.removeprefix("FAIL: lm_eval has no task mmlu_prp")
    assert stand_in.requests == []


@has_lm_eval
def test_data_that_cannot_be_had_name_the_task_that_needs_none(tmp_path):
    with serving(right) as stand_in:
        code = "from llama4_kernels.cli.main import app; app()"
        command = [sys.executable, "-c", code, "eval", "--url", stand_in.url, "--out", tmp_path / "out"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "the data of mmlu_pro cannot be loaded" in result.stderr and "--task own_questions" in result.stderr


@pytest.mark.parametrize("mode", [(), ("--needle",)])
def test_an_unreachable_server(mode, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        line = only_line(run_eval("--url", url, "--out", tmp_path, *mode))
    assert f"no server answers at {url}" in line and "correct --url" in line


def test_a_server_of_something_else(tmp_path):
    with serving(right) as stand_in:
        line = only_line(run_eval("--url", f"{stand_in.url}/shop", "--out", tmp_path))
    assert "/shop/v1/models names no model" in line


MODES = pytest.mark.parametrize("mode", [("--task", "own_questions"), ("--needle",), ("--parity",)])


@MODES
@pytest.mark.parametrize(
    "config, says",
    [
        (None, "holds no config.json"),
        ("{", "is no JSON object"),
        ('{"architectures": ["LlamaForCausalLM"]}', "is a checkpoint of ['LlamaForCausalLM']"),
    ],
    ids=["empty", "cut off", "another model"],
)
def test_a_wrong_folder(mode, config, says, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    if config is not None:
        (model / "config.json").write_text(config)
    assert says in only_line(run_eval(model, "--out", tmp_path / "out", *mode))


@MODES
def test_a_model_that_is_no_folder(mode, tmp_path):
    def said_of(model):
        return only_line(run_eval(model, "--out", tmp_path / "out", *mode))

    assert f"{tmp_path / 'nowhere'} does not exist: correct the path" in said_of(tmp_path / "nowhere")
    assert f"{__file__} is a file: give the folder" in said_of(__file__)
    said = said_of("no-one/nothing")
    assert "or run `hf download no-one/nothing`, after `hf auth login` where the model's licence has to be accepted" in said


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "give one of MODEL, --url and --tiny"),
        (["model", "--tiny", "scout"], "give one of MODEL, --url and --tiny"),
        (["--tiny", "scout", "--needle", "--parity"], "exclude each other"),
        (["--url", "http://x", "--parity"], "give MODEL or --tiny"),
        (["model", "--fp8"], "only with --tiny"),
        (["--tiny", "scout", "--needle", "--depth", "1.5"], "--depth"),
        (["--tiny", "scout", "--concurrency", "1"], "--concurrency"),
        (["--tiny", "scout", "--parity", "--text", "/nowhere/text"], "does not exist"),
    ],
)
def test_options_that_do_not_go_together(arguments, says):
    result = run_eval(*arguments)
    assert result.exit_code == 2 and says in " ".join(result.output.replace("│", " ").split())


URL = ["--url", "http://x"]


@pytest.mark.parametrize(
    "arguments",
    [
        [*URL, "--tp", "1"],
        [*URL, "--server-flag=--log-level=info"],
        *(["--tiny", "scout", "--needle", *given] for given in (["--task", "mmlu_pro"], ["--limit", "1"], ["--guide", "scout"])),
        *(["--tiny", "scout", "--parity", *given] for given in (["--concurrency", "128"], ["--max-gen-toks", "9"], ["--length", "4096"])),
        *([*URL, *given] for given in (["--length", "4096"], ["--depth", "0"], ["--text", __file__], ["--tokens", "9"])),
        *([*URL, *given] for given in (["--dtype", "float32"], ["--against", "transformers"])),
        [*URL, "--needle", "--tokens", "9"],
    ],
    ids=lambda arguments: " ".join(Path(each).name for each in arguments),
)
def test_an_option_without_effect_is_named(arguments):
    """Of the default's value too: what was asked for is not done."""
    result = run_eval(*arguments)
    option = next(each for each in reversed(arguments) if each.startswith("--")).partition("=")[0]
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and f"Invalid value for '{option}': " in said
    assert any(why in said for why in ("has no effect with", "only with --needle", "only with --parity"))


@has_lm_eval
@has_transformers
@pytest.mark.parametrize(
    "arguments, model, flags",
    [
        (
            ("MODEL", "--tp", 8, "--server-flag=--context-length=9000"),
            "model",
            "--mem-fraction-static=0.8 --context-length=65536 --context-length=9000",
        ),
        (("MODEL", "--needle", "--length", 10000), "model", "--context-length=11256"),
        (("--tiny", "maverick", "--fp8"), "tiny-maverick-fp8", "--context-length=2048 --max-total-tokens=8192"),
        (("--tiny", "scout", "--needle", "--length", 10000), "tiny-scout", "--context-length=11256 --max-total-tokens=12280"),
    ],
    ids=["guide", "needle", "tiny", "tiny needle"],
)
def test_the_server_is_started_as_the_guide_starts_it(arguments, model, flags, tmp_path, monkeypatch):
    """The flags of the command line come last: SGLang takes the last of two."""
    started = []

    def start(console, path, *given, log, tp):
        started.append((Path(path).name, " ".join(flag for flag in given if flag not in command.CPU_SERVER), tp))
        raise EvalError("not today")

    monkeypatch.setattr(command, "started", start)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Llama4ForConditionalGeneration"]}')
    arguments = [tmp_path / "model" if argument == "MODEL" else argument for argument in arguments]
    task = () if "--needle" in arguments else ("--task", "own_questions")
    assert "not today" in only_line(run_eval(*arguments, *task, "--out", tmp_path / "out"))
    assert started == [(model, flags, 8 if "--tp" in arguments else 1)]


@pytest.mark.parametrize("package, mode", [("lm_eval", ()), ("matplotlib", ("--parity",)), ("sglang", ("--needle",))])
def test_a_missing_package_names_the_extra(package, mode, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest))
    line = only_line(run_eval("--tiny", "scout", "--out", tmp_path, *mode))
    assert f"{package} is not installed" in line and "pip install" in line


def test_the_guides_scores_are_compared_statistically():
    same = guide.compare(75.2, 0.39, 75.2)
    assert same.verdict == "agrees" and same.low == pytest.approx(-same.high)
    assert same.stderr == pytest.approx(math.hypot(0.39, 100 * math.sqrt(0.752 * 0.248 / 12032)))
    assert guide.compare(60.0, 0.4, 75.2).verdict == "lower" and guide.compare(80.0, 0.4, 75.2).verdict == "higher"


def test_verdicts_are_as_often_wrong_as_they_say():
    """Simulated runs over the same number of questions: the true score, and one lower by what is called detectable."""
    random, n, theirs = np.random.default_rng(0), guide.QUESTIONS, 75.2

    def share_lower(truth: float) -> float:
        measured = random.binomial(n, truth / 100, 2000) / n
        published = random.binomial(n, theirs / 100, 2000) / n
        verdicts = [guide.compare(100 * m, 100 * math.sqrt(m * (1 - m) / (n - 1)), 100 * p).verdict for m, p in zip(measured, published)]
        return verdicts.count("lower") / len(verdicts)

    assert 0.015 < share_lower(theirs) < 0.037
    drop = guide.compare(theirs, 100 * math.sqrt(0.752 * 0.248 / n), theirs).detectable
    assert 0.77 < share_lower(theirs - drop) < 0.83


@pytest.mark.parametrize(
    "name, model",
    [
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "scout"),
        ("nvidia/Llama-4-Maverick-17B-128E-Instruct-FP8", "maverick"),
        ("stand-in", None),
        ("scout-or-maverick", None),
    ],
)
def test_the_guides_model_is_read_off_the_name(name, model):
    assert guide.model_in(name) == model


@has_lm_eval
@pytest.mark.parametrize(
    "changed, why",
    [
        ({}, ""),
        ({"task": "own_questions"}, "own_questions"),
        ({"limit": 3}, "first 3"),
        ({"max_gen_toks": 64}, "64"),
        ({"model": None}, "--guide"),
    ],
)
def test_only_the_guides_own_protocol_is_compared(changed, why):
    from llama4_kernels.cli.eval.accuracy import Protocol

    protocol = Protocol(**({"task": "mmlu_pro", "max_gen_toks": 2048, "concurrency": 128, "limit": None, "model": "scout"} | changed))
    assert bool(protocol.not_comparable()) == bool(why) and why in protocol.not_comparable()


@has_lm_eval
@pytest.mark.parametrize("accuracy, code, verdict", [(75.0, 0, "agrees"), (70.0, 1, "lower"), (79.0, 0, "higher")])
def test_a_lower_score_fails(accuracy, code, verdict, tmp_path, capsys):
    from rich.console import Console

    from llama4_kernels.cli.eval import accuracy as module
    from llama4_kernels.cli.eval.harness import Score

    protocol = module.Protocol("mmlu_pro", 2048, 128, None, "scout")
    total = Score("mmlu_pro", accuracy, 0.39, guide.QUESTIONS)
    comparisons = module._compare(total, protocol)
    assert module._report(Console(width=200), [total], comparisons, protocol, tmp_path) == code
    assert comparisons["sglang"].verdict == verdict and comparisons["official"].theirs == 74.3
    assert f"scout, sglang: 75.2 %; difference {accuracy - 75.2:+.1f}" in capsys.readouterr().out


@has_lm_eval
@pytest.mark.parametrize("answer, code, verdict", [(right, 0, "higher"), (wrong, 1, "lower")], ids=["right", "wrong"])
def test_the_guides_task_is_scored_over_its_subjects_and_compared(answer, code, verdict, tmp_path, monkeypatch):
    """MMLU-Pro as lm_eval has it, with our questions in place of the download: each of its subjects gets all of them."""
    import datasets

    from llama4_kernels.cli.eval import harness

    subjects = [file.stem.removeprefix("mmlu_pro_").replace("_", " ") for file in harness.MMLU_PRO.glob("mmlu_pro_*.yaml")]
    questions = [question | {"category": subject, "cot_content": ""} for subject in subjects for question in harness.own_questions()]
    split = datasets.Dataset.from_list(questions)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None: datasets.DatasetDict(test=split, validation=split))
    with serving(after(140, right, answer), model="meta-llama/Llama-4-Scout-17B-16E-Instruct") as stand_in:
        result = run_eval("--url", stand_in.url, "--out", tmp_path)
    assert result.exit_code == code
    record = json.loads((tmp_path / "results.json").read_text())
    total, *parts = record["scores"]
    assert (total["name"], total["questions"], len(parts)) == ("mmlu_pro", 14 * QUESTIONS, 14)
    assert total["accuracy"] == pytest.approx(sum(part["accuracy"] for part in parts) / 14)
    assert record["guide"]["sglang"]["verdict"] == verdict and record["guide"]["official"]["theirs"] == 74.3
    assert {part["name"] for part in parts} >= {"biology", "computer_science", "law"}


@has_lm_eval
def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    """Ctrl-C in a process of its own, which takes it even where the tests run in the background of a shell."""
    asked = threading.Event()

    def slow(prompt):
        asked.set()
        time.sleep(20)
        return right(prompt)

    with serving(after(3, right, slow)) as stand_in:
        code = "from llama4_kernels.cli.main import app; app()"
        arguments = ["eval", "--url", stand_in.url, "--task", "own_questions", "--out", tmp_path]
        take_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=take_ctrl_c)
        assert asked.wait(300)
        until = time.monotonic() + 15
        while len((tmp_path / "answers.jsonl").read_text().splitlines()) < 4:
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("FAIL: interrupted: 3 answers are kept")]) == 1
