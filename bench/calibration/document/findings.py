"""What the measurements say the author of a kernel should do: a sentence for each, or none where its figures are missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.calibration.document.results import Gpu
from bench.calibration.measurements.launch import DEPENDENT, EARLY, PLAIN
from bench.calibration.measurements.weight_stream import BOXES, CONTIGUOUS, SCOUT
from bench.calibration.measurements.wgmma import REGISTERS, SHARED

ENOUGH = 0.95  # of a ceiling
NEARLY = 0.9
Point = tuple[Mapping[str, Any], float]


def of(gpu: Gpu) -> list[str]:
    return [sentence for finding in FINDINGS if (sentence := finding(gpu))]


def bytes_in_flight(gpu: Gpu) -> str | None:
    points = gpu.points("weight_stream", "bandwidth", experts=SCOUT, fetch=BOXES, blocks_per_sm=1, evict_first=False)
    if not points or gpu.ceilings is None:
        return None
    copy = gpu.ceilings.copy_gb_s
    enough = [point for point in points if point[1] >= ENOUGH * copy]
    if not enough:
        parameters, best = _best(points)
        where = f"{_ring(parameters)}: {best:.0f} GB/s, {best / copy:.0%}"
        return f"No ring of stages streams weights at {ENOUGH:.0%} of the copy rate; the best has {where}."
    parameters, bandwidth = min(enough, key=lambda point: (point[0]["kib_in_flight"], -point[1]))
    return (
        f"Keep {parameters['kib_in_flight']:g} KiB in flight on every SM: {_ring(parameters)} is the least that streams weights at "
        f"{ENOUGH:.0%} of the copy rate ({bandwidth:.0f} GB/s)."
    )


def fetch(gpu: Gpu) -> str | None:
    def fastest(how: str) -> float | None:
        points = gpu.points("weight_stream", "bandwidth", experts=SCOUT, fetch=how, blocks_per_sm=1, evict_first=False)
        return _best(points)[1] if points else None

    boxes, contiguous = fastest(BOXES), fastest(CONTIGUOUS)
    if boxes is None or contiguous is None:
        return None
    return (
        f"Weights as K-major boxes of 128 bytes reach {boxes:.0f} GB/s, packed in the order of use {contiguous:.0f} GB/s "
        f"({contiguous / boxes - 1:+.1%})."
    )


def blocks(gpu: Gpu) -> str | None:
    points = gpu.points("weight_stream", "bandwidth", experts=SCOUT, fetch=BOXES, tile_kib=8, evict_first=False)
    best = {
        count: _best([p for p in points if p[0]["blocks_per_sm"] == count])[1] for count in sorted({p[0]["blocks_per_sm"] for p in points})
    }
    if len(best) < 2:
        return None
    return "Blocks that stream weights, per SM: " + ", ".join(f"{count:g} → {value:.0f} GB/s" for count, value in best.items()) + "."


def few_experts(gpu: Gpu) -> str | None:
    points = gpu.points("weight_stream", "bandwidth", experts=2)
    many = gpu.points("weight_stream", "bandwidth", experts=SCOUT)
    if not points or not many:
        return None
    few, all_experts = _best(points)[1], _best(many)[1]
    return (
        f"One token reads two experts, and such a short stream reaches {few:.0f} GB/s ({few / all_experts:.0%} of a long one): a decode "
        "kernel can still gain at its start and its end."
    )


def l2_size(gpu: Gpu) -> str | None:
    points = gpu.points("bandwidth/l2", "bandwidth", reader="another SM")
    if not points:
        return None
    best = _best(points)[1]
    held = max(parameters["mib"] for parameters, value in points if value >= NEARLY * best)
    return (
        f"L2 is read at up to {best:.0f} GB/s, and at {NEARLY:.0%} of that or more for up to {held} MiB, if each pass reads what another "
        "SM read before."
    )


def l2_prefetch(gpu: Gpu) -> str | None:
    def survived(evict_first: bool) -> str | None:
        """How much may be streamed after a prefetch that is to be found again."""
        points = gpu.points("l2/prefetch", "still_there", prefetched_mib=16, evict_first=evict_first)
        if not points:
            return None
        return f"{max((parameters['streamed_mib'] for parameters, value in points if value >= 100 * NEARLY), default=0)} MiB"

    plain, first = survived(False), survived(True)
    if plain is None or first is None:
        return None
    return (
        f"Of 16 MiB prefetched into L2, {NEARLY:.0%} are still there after up to {plain} of other weights, and after up to {first} of "
        "weights marked to be evicted first."
    )


def launches(gpu: Gpu) -> str | None:
    empty = gpu.value("launch/graph", "time", blocks_per_sm=1, threads=128)
    grid = gpu.value("launch/barrier", "time", scope="grid", threads=128)
    if empty is None or grid is None:
        return None
    verdict = "phases of one kernel are cheaper than kernels" if grid < empty else "kernels are no dearer than phases of one kernel"
    return f"A kernel in a CUDA graph costs {empty:.2f} µs, a barrier of the whole grid {grid:.2f} µs: {verdict}."


def dependent_launch(gpu: Gpu) -> str | None:
    times = {how: gpu.value("launch/dependent", "time", launch=how, prologue_cycles=4000) for how in (PLAIN, DEPENDENT, EARLY)}
    if None in times.values():
        return None
    return (
        f"A dependent launch saves {times[PLAIN] - times[DEPENDENT]:.2f} µs of a kernel's {times[PLAIN]:.2f} µs, half of which is a "
        f"prologue that needs nothing from the kernel before; triggered early it saves {times[PLAIN] - times[EARLY]:.2f} µs."
    )


def cluster(gpu: Gpu) -> str | None:
    own = gpu.value("cluster/read", "per_cycle", cluster=1)
    others = [point for point in gpu.points("cluster/read", "per_cycle") if point[0]["cluster"] > 1]
    if not own or not others:
        return None
    shares = ", ".join(f"{parameters['cluster']} → {value / own:.0%}" for parameters, value in others)
    return (
        f"An SM reads {own:.0f} bytes per cycle from its own shared memory. From its cluster's, by blocks of the cluster: {shares} of that."
    )


def tile_columns(gpu: Gpu) -> str | None:
    points = gpu.points("wgmma", "rate", dtype="e4m3", a=SHARED, warpgroups=2)
    if not points:
        return None
    best = _best(points)[1]
    columns = min(parameters["n"] for parameters, value in points if value >= NEARLY * best)
    small = ", ".join(f"n {parameters['n']} → {value / best:.0%}" for parameters, value in sorted(points, key=lambda p: p[0]["n"]))
    return f"Two warpgroups issue e4m3 products at up to {best:.0f} TFLOP/s; {NEARLY:.0%} of that needs n ≥ {columns} ({small})."


def operand_source(gpu: Gpu) -> str | None:
    points = {a: gpu.points("wgmma", "rate", dtype="e4m3", a=a, warpgroups=2) for a in (SHARED, REGISTERS)}
    rates = {a: {parameters["n"]: value for parameters, value in found} for a, found in points.items()}
    common = sorted(rates[SHARED].keys() & rates[REGISTERS].keys())
    if not common:
        return None
    ratios = ", ".join(f"n {n} {rates[REGISTERS][n] / rates[SHARED][n] - 1:+.0%}" for n in common)
    return f"A from registers instead of shared memory changes the rate of e4m3 products by: {ratios}."


def accumulation(gpu: Gpu) -> str | None:
    def error(dtype: str, promote: int) -> float | None:
        return gpu.value("fp8/accumulation", "relative_error", data="normal", k=5120, dtype=dtype, promote=promote)

    never, often, bf16 = error("e4m3", 0), error("e4m3", 128), error("bf16", 0)
    bits = gpu.value("fp8/bits", "bits_kept", where="across instructions")
    if never is None or often is None or bf16 is None or bits is None:
        return None
    return (
        f"A sum of e4m3 products keeps {bits:.0f} bits below its leading one. Over K = 5120 the relative error is {never:.1e} without "
        f"promotion and {often:.1e} with promotion every 128; bf16 products of the same values have {bf16:.1e}."
    )


def conversion(gpu: Gpu) -> str | None:
    points = gpu.points("fp8/conversion", "unlike_torch")
    clamped = gpu.points("fp8/conversion", "unlike_torch_clamped")
    if not points or not clamped:
        return None
    unlike = [f"{value:.0f} floats ({parameters['floats']})" for parameters, value in points if value]
    still = [f"{value:.0f} floats ({parameters['floats']})" for parameters, value in clamped if value]
    return (
        f"The hardware's saturating conversion to e4m3 differs from torch's for {' and '.join(unlike) or 'no float32'}; "
        f"if torch clamps to ±448 first, for {' and '.join(still) or 'no float32'}."
    )


def layouts(gpu: Gpu) -> str | None:
    count = [value for _, value in gpu.points("layouts", "as_assumed")]
    return f"All {count[0]:.0f} layouts of swizzles, descriptors and fragments are as the host emulation assumes." if count else None


def _best(points: list[Point]) -> Point:
    return max(points, key=lambda point: point[1])


def _ring(parameters: Mapping[str, Any]) -> str:
    return f"{parameters['stages']} stages of {parameters['tile_kib']} KiB"


FINDINGS: tuple[Callable[[Gpu], str | None], ...] = (
    bytes_in_flight,
    fetch,
    blocks,
    few_experts,
    l2_size,
    l2_prefetch,
    launches,
    dependent_launch,
    cluster,
    tile_columns,
    operand_source,
    accumulation,
    conversion,
    layouts,
)
