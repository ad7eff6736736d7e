"""The needle in a long text, over servers that find it, forget it or fail."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from evaluations import after, only_line, run_eval
from standin import CHARACTERS_PER_TOKEN, serving

from llama4_kernels.cli.eval import needle


def reader(memory: int | None = None):
    """A model that finds the number in the last `memory` tokens of the prompt."""

    def answer(prompt: str) -> str:
        seen = prompt if memory is None else prompt[-memory * CHARACTERS_PER_TOKEN :]
        found = re.search(r"locker is (\d+)", seen)
        return f"The number is {found[1]}." if found else "12345"

    return answer


def seek(stand_in, out, *more):
    depths = itertools.chain.from_iterable(("--depth", depth) for depth in (0, 0.5, 1))
    return run_eval("--url", stand_in.url, "--needle", "--length", 1000, "--length", 9000, *depths, "--out", out, *more)


def probes(out):
    return {(p["length"], p["depth"]): p for p in json.loads((out / "results.json").read_text())["probes"]}


def test_a_model_that_reads_everything_finds_every_number(tmp_path):
    with serving(reader()) as stand_in:
        result = seek(stand_in, tmp_path)
    assert result.exit_code == 0 and "OK: found 6 of 6; 3 of 3 in prompts of more than 8192 tokens" in result.stdout
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    for (length, _), probe in probes(tmp_path).items():
        assert 0.99 * length <= probe["tokens"] <= 1.01 * length + 60


def test_a_model_that_forgets_what_is_a_chunk_back_is_found_out(tmp_path):
    with serving(reader(memory=4000)) as stand_in:
        result = seek(stand_in, tmp_path)
    assert result.exit_code == 1 and "FAIL: found 4 of 6; 1 of 3 in prompts of more than 8192 tokens" in result.stdout
    assert [probe["found"] for probe in probes(tmp_path).values()] == [True, True, True, False, False, True]


@pytest.mark.parametrize("answer", ["12345", "", "I cannot tell.", "Some 48 of them"])
def test_another_answer_is_not_found(answer, tmp_path):
    with serving(lambda prompt: answer) as stand_in:
        assert "FAIL: found 0 of 6" in seek(stand_in, tmp_path).stdout


@pytest.mark.parametrize(
    ("answer", "found"),
    [("12345", True), ("The number is 12,345.", True), ("It is 54321, or 12345.", False), ("123456", False), ("1234 5", False)],
)
def test_the_first_whole_number_of_an_answer_counts(answer, found):
    assert needle.is_found(answer, "12345") is found


def test_a_prompt_that_is_too_long_is_shown_and_the_others_are_asked(tmp_path):
    with serving(lambda prompt: 400 if len(prompt) > 8000 * CHARACTERS_PER_TOKEN else reader()(prompt)) as stand_in:
        result = seek(stand_in, tmp_path)
    assert result.exit_code == 1 and "FAIL: found 3 of 6; 0 of 0" in result.stdout and "refused: Error code: 400" in result.stdout


def test_the_picture_shows_what_was_found_by_length_and_depth():
    given = {(1000, 0.0): True, (1000, 1.0): False, (9000, 0.0): False, (9000, 1.0): None}
    outcomes = [
        needle.Outcome(length, depth, 0 if found is None else length + 7, None if found is None else "answer", bool(found))
        for (length, depth), found in given.items()
    ]
    (axes,) = needle.draw(outcomes, [1000, 9000], [0.0, 1.0], "a model").axes
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "yes", (1, 0): "no", (0, 1): "no", (1, 1): "–"}
    (yes, no), (no_again, refused) = axes.images[0].get_array()
    assert no == no_again and len({int(yes), int(no), int(refused)}) == 3
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0%", "100%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1007", "9007"]


def test_a_search_that_broke_goes_on(tmp_path):
    with serving(after(4, reader(), lambda prompt: 503)) as stand_in:  # two prompts measure tokens
        line = only_line(seek(stand_in, tmp_path))
    assert "answered 503" in line and "2 answers are kept" in line
    with serving(reader()) as stand_in:
        result = seek(stand_in, tmp_path)
    assert result.exit_code == 0 and len(stand_in.requests) == 2 + 4


def test_the_haystack_holds_no_number_and_the_needle_stands_where_it_should():
    probe = needle.Probe(1000, 0.5)
    prompt = probe.prompt(20000)
    assert re.findall(r"\d+", prompt) == [probe.number]
    assert prompt.index(probe.number) == pytest.approx(len(prompt) / 2, rel=0.05)
    assert len({needle.Probe(length, depth).number for length in (1, 2, 3) for depth in (0.0, 0.5)}) == 6
