"""The documentation site builds without a warning, and every link inside it leads somewhere. Links to other hosts are not followed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from llama4_kernels import ops

pytest.importorskip("sphinx", reason='sphinx is not installed: pip install ".[docs]"')
pytest.importorskip("myst_parser", reason='myst-parser is not installed: pip install ".[docs]"')

DOCS = Path(__file__).parents[1] / "docs"


def build(source: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "doctrees", source, out / "html"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    result = build(DOCS, out)
    assert result.returncode == 0, result.stderr
    return out / "html"


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links |= {values[name] for name in ("href", "src") if values.get(name)}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}


def dead_links(site: Path) -> list[str]:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (url.fragment and target in pages and unquote(url.fragment) not in anchors):
                dead.append(f"{path.name}: {link}")
    return dead


def test_no_link_of_the_built_site_is_dead(site):
    assert dead_links(site) == []


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_in_markdown(page: Path) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        url = urlsplit(link)
        target = page.parent / url.path if url.path else page
        if not url.scheme and (not target.exists() or (url.fragment and url.fragment not in headings(target))):
            dead.append(link)
    return dead


def test_no_link_of_the_readme_is_dead(tmp_path):
    assert dead_in_markdown(DOCS.parent / "README.md") == []
    (tmp_path / "a.md").write_text("# One `thing` here\n[x](#one-thing-here) [x](#two) [x](b.md) [x](https://example.org/x) [x](a.md#one)")
    assert dead_in_markdown(tmp_path / "a.md") == ["#two", "b.md", "a.md#one"]


def test_the_reference_has_every_public_op_with_what_it_takes_and_raises(site):
    page = (site / "ops.html").read_text()
    assert {f"llama4_kernels.ops.{name}" for name in ops.__all__} <= Page(site / "ops.html").anchors
    for words in ("<dt><strong>page_table_rows</strong></dt>", "<dt><strong>w13</strong></dt>", "<dt>Raises</dt>", "<dt>Returns</dt>"):
        assert words in page


def test_dead_links_fail_the_build_by_name(tmp_path):
    source = shutil.copytree(DOCS, tmp_path / "docs")
    page = source / "testing.md"
    dead = {
        "nowhere.md": "[x](nowhere.md)",
        "no-such-heading": "[x](attention.md#no-such-heading)",
        "no-heading-here": "[x](#no-heading-here)",
        "no_such_op": "{py:func}`~llama4_kernels.ops.no_such_op`",
    }
    page.write_text("\n\n".join([page.read_text(), *dead.values()]))
    result = build(source, tmp_path / "out")
    assert result.returncode != 0
    assert [name for name in dead if name not in result.stderr] == []


def test_a_dead_link_in_html_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there">b</a><a href="b.html#gone">b</a><img src="c.png"><a href="#top">a</a>')
    (tmp_path / "b.html").write_text('<p id="there">b</p><a href="https://example.org/x">x</a>')
    assert sorted(dead_links(tmp_path)) == ["a.html: #top", "a.html: b.html#gone", "a.html: c.png"]
