"""The performance tables of pages are what the committed results say, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from llama4_kernels.bench import readme, record, workloads
from llama4_kernels.cli.main import app

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(path for path in (ROOT / "bench" / "results").glob("*") if path.is_dir())
EMPTY = f"# Title\n{readme.START}\n{readme.END}\nAfter.\n"


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_a_page_agrees_with_the_committed_results(page):
    contents = record.read(*COMMITTED)
    assert contents.problems == ()
    text = (ROOT / page).read_text()
    assert readme.replaced(text, contents.records) == text, f"run {readme.COMMAND}"


def test_headlines_are_workloads():
    assert [workloads.parse(name).name for name in readme.HEADLINES] == list(readme.HEADLINES)


def test_without_a_result_from_a_gpu_it_says_so():
    cpu = dataclasses.replace(synthetic.GPU, kind="cpu", device="A CPU")
    for records in ([], [synthetic.benchmark(machine=cpu)], [synthetic.calibration()]):
        assert readme.table(records) == readme.NOTHING


def test_a_row_gives_the_fastest_right_results_and_keeps_the_shapes_that_lose():
    records = [
        synthetic.benchmark(backend="triton", us=100.0, noise=0),
        synthetic.benchmark(backend="cuda", us=80.0, noise=0),
        synthetic.benchmark(backend="wrong", us=1.0, status="wrong", reason="error"),
        synthetic.benchmark(backend="sglang", peer=True, us=160.0, noise=0),
        synthetic.benchmark(backend="fbgemm", peer=True, us=200.0, noise=0),
        synthetic.benchmark("fused_moe/fp8/scout/tp8/t1", us=50.0, noise=0),
        synthetic.benchmark("fused_moe/fp8/scout/tp8/t1", "sglang", peer=True, us=40.0, noise=0),
        synthetic.benchmark("fused_moe/fp8/scout/tp8/t8", status="failed", reason="broke", timing=None),
        synthetic.benchmark("fused_moe/fp8/scout/tp8/t8", "cuda", us=1.0, status="wrong", reason="error"),
        synthetic.benchmark("fused_moe/fp8/scout/tp8/t8", "fbgemm", peer=True, us=200.0, noise=0),
        synthetic.benchmark("fused_moe/fp8/scout/tp8/t16", "fbgemm", peer=True, us=200.0, noise=0),
    ]
    table = readme.table(records)
    assert table.startswith("NVIDIA H200;")
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert "| aaaaaaa | cuda | 80 |" in rows["fused_moe/fp8/scout/tp8/t64"] and "| sglang | 2.00 |" in rows["fused_moe/fp8/scout/tp8/t64"]
    assert "| sglang | 0.80 |" in rows["fused_moe/fp8/scout/tp8/t1"]
    assert "| aaaaaaa | triton: failed, cuda: wrong result | – |" in rows["fused_moe/fp8/scout/tp8/t8"]
    assert "| – | not measured | – |" in rows["fused_moe/fp8/scout/tp8/t16"]
    assert list(rows) == [f"fused_moe/fp8/scout/tp8/t{tokens}" for tokens in (1, 8, 16, 64)]


def test_the_readme_has_the_headlines_and_the_other_page_all():
    headline, other = "fused_moe/fp8/scout/tp8/t64", "fused_moe/fp8/scout/tp8/t32"
    records = [synthetic.benchmark(headline), synthetic.benchmark(other)]
    for marker, listed in ((readme.START, [headline]), (readme.START_ALL, [other, headline])):
        text = readme.replaced(f"{marker}\n{readme.END}\n", records)
        assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == listed


def test_a_ratio_is_of_two_results_of_one_run():
    def at(run, *arguments, **fields):
        return synthetic.benchmark(*arguments, run=f"2026112{run}T120000Z-aaaaaaa", date=f"2026-11-2{run}T12:00:00Z", noise=0, **fields)

    lone, whole = "fused_moe/fp8/scout/tp8/t1", "fused_moe/fp8/scout/tp8/t8"
    records = [
        at(1, lone, "sglang", peer=True, us=200.0),
        at(2, lone, "cuda", us=100.0),
        at(1, whole, "cuda", us=100.0),
        at(1, whole, "sglang", peer=True, us=300.0),
        at(1, whole, "fbgemm", peer=True, us=400.0),
        at(2, whole, "sglang", peer=True, us=150.0),
        at(2, whole, "fbgemm", peer=True, us=50.0),
    ]
    rows = {line.split("`")[1]: line for line in readme.table(records).splitlines() if line.startswith("| `")}
    assert rows[lone].endswith("| – | – |")
    assert rows[whole].endswith("| sglang | 3.00 |")


def test_the_command_rewrites_between_the_markers_only(tmp_path):
    path, results = tmp_path / "README.md", tmp_path / "results.json"
    path.write_text(EMPTY)
    record.append(results, [synthetic.benchmark()])
    ran = CliRunner().invoke(app, ["report", str(results), "--readme", str(path)])
    assert ran.exit_code == 0 and "rewritten" in ran.output
    text = path.read_text()
    assert text.startswith(f"# Title\n{readme.START}\n") and text.endswith(f"{readme.END}\nAfter.\n")
    assert "`fused_moe/fp8/scout/tp8/t64`" in text
    assert "is up to date" in CliRunner().invoke(app, ["report", str(results), "--readme", str(path)]).output


def test_where_no_result_can_be_read_the_table_stays(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(EMPTY)
    monkeypatch.chdir(tmp_path)
    for results in ([], [str(tmp_path / "nosuch.json")], [str(path)]):
        ran = CliRunner().invoke(app, ["report", *results, "--readme", str(path)])
        assert ran.exit_code == 1 and "nothing is written" in ran.output and path.read_text() == EMPTY


@pytest.mark.parametrize("text", ["# Title\n", f"{readme.END}\n{readme.START}\n"])
def test_a_readme_without_markers_is_refused(text, tmp_path):
    path, results = tmp_path / "README.md", tmp_path / "results.json"
    path.write_text(text)
    record.append(results, [synthetic.benchmark()])
    ran = CliRunner().invoke(app, ["report", str(results), "--readme", str(path)])
    assert ran.exit_code == 1 and "needs the lines" in ran.output
    assert path.read_text() == text
