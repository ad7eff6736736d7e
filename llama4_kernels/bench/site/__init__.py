"""A static site of results: pages by Jinja, charts by Plotly, nothing fetched when it is looked at.

`build` writes index.html, a page for each workload and the assets; every link is relative, so that a folder, any static server and
GitHub Pages show it as it is.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from llama4_kernels.bench.record import Contents
from llama4_kernels.bench.site import data

HERE = Path(__file__).parent


def build(contents: Contents, out: Path) -> int:
    """Write the site of `contents` into the folder `out`, which a build before may have filled; how many pages there are.

    What could not be read is listed on the first page.
    """
    results = data.collect(contents.records)
    assets = out / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    (out / ".nojekyll").touch()
    for static in (HERE / "static").iterdir():
        shutil.copyfile(static, assets / static.name)
    (assets / "plotly.min.js").write_text(_plotly())
    (assets / "data.js").write_text(f"window.RESULTS = {_script_json(results.for_script())};\n")
    pages = out / "workload"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    templates = _templates()
    index = templates.get_template("index.html.j2")
    (out / "index.html").write_text(index.render(root="", results=results, problems=contents.problems))
    page = templates.get_template("workload.html.j2")
    for workload in results.workloads:
        (out / workload.href).write_text(page.render(root="../", workload=workload, page=results.page(workload)))
    return 1 + len(results.workloads)


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@functools.cache
def _templates() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = figure
    environment.filters["script_json"] = lambda value: jinja2.utils.markupsafe.Markup(_script_json(value))
    return environment


def figure(value: float | None, digits: int = 4) -> str:
    """A number for a table: a few significant digits, thousands apart; a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or 1e-2 <= abs(value) < 1e7:
        decimals = max(0, digits - len(f"{int(abs(value))}")) if abs(value) >= 1 else digits - 1
        return f"{value:,.{decimals}f}"
    return f"{value:.{digits - 1}g}"


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
