"""`llama4-kernels report`: what is made of results: a site, the tables of Markdown pages, and the formats of other tools."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llama4_kernels.bench import formats, readme, record, site
from llama4_kernels.bench.record import Benchmark


def run(results: Sequence[Path], *, out: Path | None = None, pages: Sequence[Path] = (), exports: Sequence[str] = ()) -> int:
    """The command: 0, or 1 where no result could be read or something could not be written; what could not be read is said.

    results: files, or folders of them; where none is given, the folder of each device in bench/results. exports: "format=path" each.
    """
    paths = results or sorted(path for path in record.RESULTS.glob("*") if path.is_dir())
    if not paths:
        print(f"report: {record.RESULTS.absolute()} holds no folder of results, nothing is written: name files or folders", file=sys.stderr)
        return 1
    contents = record.read(*paths)
    for problem in contents.problems:
        print(f"report: {problem}", file=sys.stderr)
    benchmarks = [each for each in contents.records if isinstance(each, Benchmark)]
    devices = sorted({each.machine.device for each in contents.records})
    print(
        f"report: {len(benchmarks)} benchmarks and {len(contents.records) - len(benchmarks)} calibrations of {', '.join(devices) or 'no device'}"
    )
    if pages and not contents.records:
        print(f"report: no result was read from {', '.join(map(str, paths))}, nothing is written", file=sys.stderr)
        return 1
    try:
        for page in pages:
            changed = readme.update(page, contents.records)
            print(f"report: {page} {'rewritten' if changed else 'is up to date'}")
        for export in exports:
            form, _, path = export.partition("=")
            if not path:
                raise ValueError(f"export is {export!r}, needs format=path with a format of {', '.join(formats.FORMATS)}")
            formats.write(form, Path(path), contents.records)
            print(f"report: {form} written to {path}")
        if out is not None:
            print(f"report: {site.build(contents, out)} pages written to {out}, first {out / 'index.html'}")
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0 if contents.records else 1
