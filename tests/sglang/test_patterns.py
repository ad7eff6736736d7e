"""Searches in bounded time; test_bad_requests.py asks a server."""

import re
from types import SimpleNamespace

import pytest

from llama4_kernels.sglang import patterns, plugin


@pytest.mark.parametrize("pattern, text", [
    (r"\\boxed{e}", r"\boxes x"),
    (r"\\boxed{e}", r"\boxed{e}"),
    ("sum_{i}", "sum_ sum_{i}"),
    ("(?:END){e}", "abc"),
    ("x_{i=1}", "x_{i=1}"),
    ("[{]e}|{}", "{e}"),
    ("{}", "a{}"),
    (r"\{e}", "{e}"),
    ("a{2}b{,2}c{1,}d{1,2}", "aabbccd"),
    ("a{,}b", "aab"),
    (r"\N{DIGIT ONE}{2}", "211"),
], ids=str)  # fmt: skip
def test_braces_mean_what_they_mean_in_python(pattern, text):
    found, wanted = patterns.search(pattern, text), re.search(pattern, text)
    assert (found and found.span()) == (wanted and wanted.span())


def test_a_search_that_takes_too_long_is_given_up():
    with pytest.raises(re.error, match="takes longer than"):
        patterns.search("(a|aa)+[^a]", "a" * 60)


@pytest.mark.parametrize("full_window_matched, end", [(True, 3), (False, None)])
def test_an_answer_ends_with_its_last_token_where_those_before_cannot_be_searched_in_time(full_window_matched, end):
    def locate(request, accepted, *, stop_regex, full_window_matched):
        raise re.error("too long")

    request = SimpleNamespace(output_ids=[1, 2, 3])
    assert plugin._end_at_stop(locate, request, 2, stop_regex="a", full_window_matched=full_window_matched) == end
