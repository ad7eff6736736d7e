"""The measurements as pictures, SVG files beside the document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "llama4_kernels"  # the same file from the same records

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from bench.calibration.document.results import Gpu  # noqa: E402
from bench.calibration.measurements.weight_stream import BOXES, CONTIGUOUS, SCOUT  # noqa: E402
from bench.calibration.measurements.wgmma import SHARED  # noqa: E402

Point = tuple[Mapping[str, Any], float]


def write(gpu: Gpu, folder: Path) -> list[tuple[str, Path]]:
    """Title and file of each plot whose measurement there is."""
    written = []
    for name, (title, draw) in PLOTS.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        draw(gpu, axes)
        if axes.lines:
            axes.legend()
            axes.grid(alpha=0.3)
            axes.set_title(f"{gpu.machine.device}: {title}")
            path = folder / f"{gpu.machine.slug}-{name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None})
            written.append((title, path))
    return written


def bandwidth(gpu: Gpu, axes: Axes) -> None:
    for access in ("copy", "read", "write"):
        for l2, style in (("cold", "-"), ("warm", "--")):
            _line(axes, gpu.points(f"bandwidth/{access}", "bandwidth", l2=l2), "mib", f"{access}, {l2}", style)
    axes.set(xscale="log", xlabel="MiB", ylabel="GB/s", ylim=(0, None))


def weight_stream(gpu: Gpu, axes: Axes) -> None:
    for fetch, style in ((BOXES, "-"), (CONTIGUOUS, "--")):
        points = gpu.points("weight_stream", "bandwidth", experts=SCOUT, fetch=fetch, blocks_per_sm=1, evict_first=False)
        for tile in sorted({parameters["tile_kib"] for parameters, _ in points}):
            _line(axes, [point for point in points if point[0]["tile_kib"] == tile], "kib_in_flight", f"{fetch} of {tile} KiB", style)
    if axes.lines and gpu.ceilings:
        axes.axhline(gpu.ceilings.copy_gb_s, color="black", linewidth=1, label="copy")
    axes.set(xscale="log", xlabel="KiB in flight per SM", ylabel="GB/s", ylim=(0, None))


def wgmma(gpu: Gpu, axes: Axes) -> None:
    for dtype, style in (("e4m3", "-"), ("bf16", "--")):
        for warpgroups in (1, 2, 4):
            points = gpu.points("wgmma", "rate", dtype=dtype, a=SHARED, warpgroups=warpgroups)
            _line(axes, points, "n", f"{dtype}, {warpgroups} warpgroups", style)
    axes.set(xscale="log", xlabel="columns N of m64nN", ylabel="TFLOP/s", ylim=(0, None))


def accumulation(gpu: Gpu, axes: Axes) -> None:
    for data, style in (("normal", "-"), ("positive", "--")):
        for dtype, promote in (("e4m3", 0), ("e4m3", 128), ("bf16", 0)):
            points = gpu.points("fp8/accumulation", "relative_error", data=data, dtype=dtype, promote=promote)
            _line(axes, points, "k", f"{dtype}, {data}" + (f", promoted every {promote}" if promote else ""), style)
    axes.set(xscale="log", yscale="log", xlabel="K", ylabel="relative error")


def _line(axes: Axes, points: Iterable[Point], x: str, label: str, style: str) -> None:
    ordered = sorted((parameters[x], value) for parameters, value in points)
    if ordered:
        axes.plot(*zip(*ordered, strict=True), style, marker=".", label=label)


PLOTS = {
    "bandwidth": ("memory bandwidth by size", bandwidth),
    "weight-stream": ("stream of weights by bytes in flight", weight_stream),
    "wgmma": ("rate of wgmma by columns", wgmma),
    "accumulation": ("error of sums of e4m3 products", accumulation),
}
