"""docs/fp8_hidden.md rests on bench/fp8_hidden.py: the document quotes its results, and they hold when measured again."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("fp8_hidden", ROOT / "bench" / "fp8_hidden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_quotes_the_results(bench):
    assert bench.table(json.loads(bench.RESULTS.read_text())) in (ROOT / "docs" / "fp8_hidden.md").read_text()


def test_the_results_hold(bench):
    committed = json.loads(bench.RESULTS.read_text())
    for data, forms in bench.measure().items():
        for form, errors in forms.items():
            assert errors == pytest.approx(committed[data][form], rel=0.02), (data, form)
        blocks, rows = forms["one scale per row and 128 columns"], forms["one scale per row"]
        assert blocks["whole"] < rows["whole"] and blocks["worst_token"] < rows["worst_token"], data
