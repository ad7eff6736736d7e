"""The site of results: what is on its pages, and how it behaves in a browser."""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from llama4_kernels.bench import record, site, workloads
from llama4_kernels.cli.main import app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

CPU = dataclasses.replace(synthetic.GPU, kind="cpu", device="A CPU", capability=None)
H100 = dataclasses.replace(synthetic.GPU, device="NVIDIA H100")
REGRESSED = "fused_moe/fp8/scout/tp8/t64"
RUNS = 5


def results(count: int = 600) -> list[record.Record]:
    """RUNS runs of two backends and two peers on many workloads; in the last run cuda and torch are a tenth slower on REGRESSED."""
    names = [workload.name for workload in workloads.named()]
    per_run = count // RUNS // 4
    names = list(dict.fromkeys([REGRESSED, *names[:: max(1, len(names) // per_run)]]))[:per_run]
    found: list[record.Record] = []
    for number in range(RUNS):
        machine = dataclasses.replace(synthetic.GPU, commit=f"{number}" * 40)
        for place, name in enumerate(names):
            for backend, peer, factor in (("cuda", False, 1.0), ("triton", False, 1.3), ("sglang", True, 1.9), ("torch", True, 0.8)):
                slower = 1.1 if (number, name) == (RUNS - 1, REGRESSED) and backend in ("cuda", "torch") else 1.0
                us = (20 + place % 97) * factor * slower
                seed = number * 100_000 + place * 10 + len(backend)
                common = {"machine": machine, "run": f"run{number}", "date": f"2026-11-1{number}T12:00:00Z"}
                found.append(synthetic.benchmark(name, backend, peer=peer, us=us, seed=seed, **common))
    return found


def mixed() -> list[record.Record]:
    """Other devices, and what has no figure."""
    others = [
        synthetic.benchmark(machine=H100, us=120.0),
        synthetic.benchmark("route_top1/fp8/scout/tp8/t1", "reference", machine=CPU, us=900.0),
        synthetic.benchmark("fused_moe/fp8/scout/tp8/t1", "cuda", status="wrong", reason="its error is <b>large</b>"),
        synthetic.benchmark(
            "fused_moe/fp8/scout/tp8/t1", "deep_gemm", peer=True, status="failed", reason="crashed </script>", timing=None, floor=None
        ),
        synthetic.benchmark(
            backend="fbgemm", peer=True, status="unavailable", reason="fbgemm_gpu is not installed", timing=None, floor=None
        ),
        synthetic.calibration(),
    ]
    return results() + others


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A site of mixed results with a file that is none beside them."""
    folder = tmp_path_factory.mktemp("results")
    record.append(folder / "nvidia-h200" / "good.json", mixed())
    (folder / "nvidia-h200" / "bad.json").write_text('{"schema": 0}\n{"cut')
    (folder / "empty.json").touch()
    out = tmp_path_factory.mktemp("site")
    ran = CliRunner().invoke(app, ["report", str(folder), "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "schema version is 0, needs 1" in ran.output and "empty.json: is empty" in ran.output
    return out


class Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def links(page: Path) -> list[str]:
    parser = Links()
    parser.feed(page.read_text())
    return [link for link in parser.found if not link.startswith("data:")]


def test_every_link_is_relative_and_leads_to_a_file(built):
    for page in built.rglob("*.html"):
        for link in links(page):
            assert "://" not in link and not link.startswith("/"), (page, link)
            assert (page.parent / link).resolve().is_file(), (page, link)
    assert (built / ".nojekyll").exists()


def test_our_pages_and_scripts_name_no_other_host(built):
    for path in [*built.rglob("*.html"), *(built / "assets").glob("[!p]*.js"), *built.rglob("*.css")]:
        assert not re.search(r"(?<!\")https?://", path.read_text()), path


def test_every_workload_has_a_page_with_its_repro_lines(built):
    names = {done.workload for done in mixed() if isinstance(done, record.Benchmark)}
    assert {page.stem for page in (built / "workload").iterdir()} == {name.replace("/", "-") for name in names}
    page = (built / "workload" / f"{REGRESSED.replace('/', '-')}.html").read_text()
    assert f"llama4-kernels bench --workload {REGRESSED}" in page
    assert "NVIDIA H100" in page and "NVIDIA H200" in page and "slower 1.1" in page


def test_reasons_are_text_and_not_markup(built):
    page = (built / "workload" / "fused_moe-fp8-scout-tp8-t1.html").read_text()
    assert "&lt;b&gt;large&lt;/b&gt;" in page and "<b>large" not in page
    assert "</script>" not in (built / "assets" / "data.js").read_text()


def test_what_could_not_be_read_is_on_the_first_page(built):
    index = (built / "index.html").read_text()
    assert "could not be read; the rest is shown" in index and "empty.json: is empty" in index and "good.json" not in index


def test_results_of_a_cpu_alone_are_labelled(tmp_path):
    site.build(record.Contents((synthetic.benchmark(machine=CPU, backend="reference"),), ()), tmp_path)
    assert "No result here is from a GPU." in (tmp_path / "index.html").read_text()
    assert "it says nothing about a kernel's speed" in next((tmp_path / "workload").iterdir()).read_text()


def test_no_result_at_all_gives_a_page_that_says_so_and_exit_code_1(tmp_path):
    (tmp_path / "empty.json").touch()
    ran = CliRunner().invoke(app, ["report", str(tmp_path / "empty.json"), "--out", str(tmp_path / "site")])
    assert ran.exit_code == 1
    assert "No result could be read" in (tmp_path / "site" / "index.html").read_text()


def test_a_second_build_leaves_no_page_of_the_first(tmp_path):
    for name in ("fused_moe/fp8/scout/tp8/t1", "fused_moe/fp8/scout/tp8/t2"):
        site.build(record.Contents((synthetic.benchmark(name),), ()), tmp_path)
    assert [page.name for page in (tmp_path / "workload").iterdir()] == ["fused_moe-fp8-scout-tp8-t2.html"]


def test_a_workload_of_another_version_is_named_and_the_rest_is_shown(tmp_path):
    unknown = dataclasses.replace(synthetic.benchmark(), workload="new_op/fp8/scout/tp8/t1", op="new_op")
    assert site.build(record.Contents((unknown, synthetic.benchmark()), ()), tmp_path) == 2
    assert "new_op/fp8/scout/tp8/t1" in (tmp_path / "index.html").read_text()


# ---------------------------------------------------------------- in a browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def served(built):
    """The site under a path of its own on a static server, as GitHub Pages has it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built.parent))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{built.name}/"
    server.shutdown()
    thread.join()
    server.server_close()


class Watched:
    """A page, and everything that it complained about or asked of another host."""

    def __init__(self, browser, **options):
        self.page = browser.new_context(**options).new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url))
        self.page.on("request", self._request)

    def _request(self, request):
        if not request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:")):
            self.complaints.append(f"asked for {request.url}")

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def scroll_through(self) -> None:
        """Charts are drawn when they come into view."""
        for chart in self.page.query_selector_all("article:not([hidden]) .chart"):
            chart.scroll_into_view_if_needed()
            self.page.wait_for_function("chart => chart.dataset.drawn !== undefined", arg=chart)

    def traces(self, op: str, kind: str) -> list[str]:
        chart = self.page.query_selector(f"[data-op='{op}'] [data-chart={kind}]")
        chart.scroll_into_view_if_needed()
        self.page.wait_for_function("chart => chart.dataset.drawn !== undefined", arg=chart)
        return self.page.evaluate("chart => (chart.data ?? []).map((trace) => trace.name)", chart)

    def choose(self, **filters: str) -> None:
        for name, value in filters.items():
            self.page.select_option(f"select[name={name}]", value)

    def rows(self) -> list[str]:
        return self.page.eval_on_selector_all("#table tbody tr", "rows => rows.map((row) => row.innerText)")


@in_browser
@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)], ids=["light", "dark", "phone", "dark phone"]
)
def test_charts_are_drawn_without_a_complaint(browser, served, scheme, width):
    watched = Watched(browser, color_scheme=scheme, viewport={"width": width, "height": 800})
    watched.open(served)
    watched.scroll_through()
    drawn = watched.page.eval_on_selector_all(".js-plotly-plot .main-svg", "all => all.length")
    assert drawn >= 3 * 3 and watched.complaints == []
    assert watched.page.evaluate("document.documentElement.dataset.theme") == scheme
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = watched.page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > sum(map(int, re.findall(r"\d+", paper)[:3]))) == (scheme == "dark")


@in_browser
def test_the_site_works_from_a_folder_too(browser, built):
    watched = Watched(browser)
    watched.open(built.joinpath("index.html").as_uri())
    assert watched.traces("fused_moe", "floor") and watched.complaints == []


@in_browser
def test_a_chart_shows_what_the_records_say(browser, served):
    watched = Watched(browser)
    watched.open(served)
    watched.choose(dtype="fp8")
    assert watched.traces("fused_moe", "floor") == ["cuda", "triton", "peer sglang", "peer torch"]
    assert watched.traces("fused_moe", "peers") == ["sglang", "torch"]
    assert watched.traces("fused_moe", "history")[-1] == "regression"
    points = watched.page.evaluate("document.querySelector(\"[data-op='fused_moe'] [data-chart=peers]\").data.map((trace) => trace.y)")
    assert all(y == pytest.approx(1.9, rel=0.15) for y in points[0]) and all(y == pytest.approx(0.8, rel=0.15) for y in points[1])
    marked = watched.page.evaluate("document.querySelector(\"[data-op='fused_moe'] [data-chart=history]\").data.at(-1).customdata")
    assert [name for name, _ in marked] == [REGRESSED]
    assert "fp8 ceiling" in watched.traces("*", "roofline") and watched.complaints == []


@in_browser
def test_a_peer_is_set_against_ours_of_the_same_run(browser, tmp_path):
    def at(run, name, *arguments, **fields):
        return synthetic.benchmark(name, *arguments, run=f"run{run}", date=f"2026-11-1{run}T12:00:00Z", noise=0, **fields)

    lone, whole = "fused_moe/fp8/scout/tp8/t1", "fused_moe/fp8/scout/tp8/t8"
    records = (
        at(1, lone, "sglang", peer=True, us=200.0),
        at(2, lone, "cuda", us=100.0),
        at(1, whole, "cuda", us=100.0),
        at(1, whole, "sglang", peer=True, us=300.0),
        at(2, whole, "sglang", peer=True, us=150.0),
    )
    site.build(record.Contents(records, ()), tmp_path)
    watched = Watched(browser)
    watched.open(tmp_path.joinpath("index.html").as_uri())
    watched.choose(dtype="fp8")
    assert watched.traces("fused_moe", "peers") == ["sglang"]
    shown = watched.page.evaluate("document.querySelector(\"[data-op='fused_moe'] [data-chart=peers]\").data[0]")
    assert [point[0] for point in shown["customdata"]] == [whole] and shown["y"] == pytest.approx([3.0])
    assert watched.complaints == []


@in_browser
def test_filters_leave_what_they_name(browser, served):
    watched = Watched(browser)
    watched.open(served)
    everything = len(watched.rows())
    watched.choose(op="fused_moe", implementation="cuda", dtype="fp8")
    assert 0 < len(watched.rows()) < everything
    assert all("fused_moe/fp8/scout/tp8" in row and "cuda" in row for row in watched.rows())
    visible = watched.page.eval_on_selector_all("#ops article:not([hidden])", "all => all.map((one) => one.dataset.op)")
    assert visible == ["fused_moe"] and watched.traces("fused_moe", "floor") == ["cuda"]
    watched.choose(model="maverick", tp="all", implementation="all")
    assert watched.rows() and all("/maverick/" in row for row in watched.rows())
    watched.choose(device="NVIDIA H100", model="all")
    assert "The filters leave no result of" not in watched.page.inner_text("main")
    watched.choose(op="all")
    assert "The filters leave no result of chunked_attention" in watched.page.inner_text("main")
    assert len(watched.rows()) == 1 and REGRESSED in watched.rows()[0]
    address = watched.page.url
    watched.page.click("button[type=reset]")
    watched.page.wait_for_function("count => document.querySelectorAll('#table tbody tr').length === count", arg=everything)
    again = Watched(browser)
    again.open(address)
    assert len(again.rows()) == 1
    assert watched.complaints == again.complaints == []


@in_browser
def test_the_table_is_sorted_and_leads_to_the_workload(browser, served):
    watched = Watched(browser)
    watched.open(served)
    watched.choose(op="fused_moe", dtype="fp8")
    watched.page.click("th[data-sort=median]")
    times = watched.page.eval_on_selector_all(
        "#table tbody tr.ok td:nth-child(3)", "cells => cells.map((cell) => Number(cell.textContent))"
    )
    assert len(times) > 1 and times == sorted(times)
    watched.page.click("th[data-sort=median]")
    again = watched.page.eval_on_selector_all(
        "#table tbody tr.ok td:nth-child(3)", "cells => cells.map((cell) => Number(cell.textContent))"
    )
    assert again == times[::-1]
    watched.page.click(f"#table a:text-is('{REGRESSED}')")
    watched.page.locator("#history").scroll_into_view_if_needed()
    watched.page.wait_for_selector("#history[data-drawn]")
    symbols = watched.page.evaluate("document.getElementById('history').data.map((trace) => trace.marker.symbol.at(-1))")
    assert symbols.count("x") == 1
    watched.page.click("a.brand")
    watched.page.wait_for_selector("html[data-ready]")
    assert watched.complaints == []


@in_browser
def test_the_theme_is_switched_and_kept(browser, served):
    watched = Watched(browser, color_scheme="light")
    watched.open(served)
    watched.traces("fused_moe", "floor")
    watched.page.click("#theme")
    assert watched.page.evaluate("document.documentElement.dataset.theme") == "dark"
    colour = "document.querySelector(\"[data-op='fused_moe'] [data-chart=floor]\").layout.font.color"
    assert watched.page.evaluate(colour) == watched.page.evaluate("css('--text')")
    watched.page.reload()
    watched.page.wait_for_selector("html[data-ready]")
    assert watched.page.evaluate("document.documentElement.dataset.theme") == "dark" and watched.complaints == []


def test_five_thousand_records_are_built_in_ten_seconds(large):
    out, seconds = large
    assert seconds < 10
    assert json.loads((out / "assets" / "data.js").read_text().removeprefix("window.RESULTS = ").rstrip(";\n"))["rows"].__len__() == 5000


@in_browser
def test_five_thousand_records_appear_in_two_seconds(browser, large):
    """Until the table is filled and the charts in the window are drawn, the best of three: in time that the page's thread computes, and by
    the clock too where this machine is not busy with more than it has cores for."""
    computed, clock = [], []
    for _ in range(3):
        watched = Watched(browser)
        metrics = watched.page.context.new_cdp_session(watched.page)
        metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
        watched.page.goto(large[0].joinpath("index.html").as_uri())
        watched.page.wait_for_selector("article:first-child .chart[data-drawn] .main-svg")
        clock.append(watched.page.evaluate("performance.now()"))
        assert len(watched.rows()) == 100 and watched.complaints == []
        values = {metric["name"]: metric["value"] for metric in metrics.send("Performance.getMetrics")["metrics"]}
        computed.append(values["TaskDuration"])
    assert 0 < min(computed) < 2, computed
    assert min(clock) < 2000 or os.getloadavg()[0] > os.cpu_count(), clock


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, float]:
    """A site of 5,000 records that were read from a file, and how long reading and building took."""
    folder = tmp_path_factory.mktemp("large")
    record.append(folder / "results.json", results(5000))
    started = time.perf_counter()
    contents = record.read(folder / "results.json")
    site.build(contents, folder / "site")
    return folder / "site", time.perf_counter() - started
