"""docs/hardware.md: that it is what the generator makes of the committed records, and what the generator makes of records at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")

from bench.calibration.document import findings, page, results
from bench.calibration.measurements import MEASUREMENTS, launch, weight_stream
from llama4_kernels.bench import record, workloads
from llama4_kernels.bench.machine import Machine
from llama4_kernels.bench.record import Benchmark, Calibration, Figure
from llama4_kernels.bench.timing import summary

ROOT = Path(__file__).parents[1]
GPU = Machine("NVIDIA H200", "gpu", "9.0", 700.0, "580.1", "13.0", "2.11.0", "3.6.0", "3.12.3", "0123abc" * 5, False)
CPU = dataclasses.replace(GPU, device="a CPU", kind="cpu", capability=None)
COPY, BF16, FP8 = 4000.0, 800.0, 1500.0


def calibration(question: str, parameters: dict, run: str = "b", **figures: tuple[float, str]) -> Calibration:
    date = f"2026-01-0{1 if run == 'a' else 2}T00:00:00Z"
    made = {name: Figure(value, unit) for name, (value, unit) in figures.items()}
    return Calibration(question, f"About {question}?", made, GPU, run, date, "", parameters=parameters)


def bandwidth(question: str, parameters: dict, value: float, run: str = "b") -> Calibration:
    return calibration(question, parameters, run, time=(1.0, "us"), bandwidth=(value, "GB/s"))


def rate(question: str, parameters: dict, value: float) -> Calibration:
    return calibration(question, parameters, time=(1.0, "us"), rate=(value, "TFLOP/s"))


CEILINGS = [
    bandwidth("bandwidth/copy", {"mib": 4096, "l2": "cold"}, COPY),
    bandwidth("bandwidth/torch_copy", {"mib": 1024, "l2": "cold"}, COPY - 1),
    bandwidth("bandwidth/copy", {"mib": 8, "l2": "cold"}, 2 * COPY),  # fits L2: no ceiling of memory
    rate("matmul/bf16", {"layer": "square", "m": 8192}, BF16),
    rate("matmul/fp8", {"layer": "square", "m": 4096}, FP8),
    rate("matmul/fp8", {"layer": "gate_up tp1", "m": 8192}, 2 * FP8),  # not square
]


def stream(tile_kib: int, stages: int, value: float, **changed) -> Calibration:
    parameters = {"experts": weight_stream.SCOUT, "fetch": "boxes", "tile_kib": tile_kib, "stages": stages, "blocks_per_sm": 1}
    parameters |= {"kib_in_flight": tile_kib * stages, "evict_first": False} | changed
    return bandwidth("weight_stream", parameters, value)


STREAMS = [
    stream(8, 2, 1000.0),
    stream(8, 4, 3000.0),
    stream(8, 8, 0.96 * COPY),
    stream(16, 6, 0.97 * COPY),
    stream(8, 4, 900.0, experts=2),
]


def benchmark(workload: str, backend: str, us: float | None, **changed) -> Benchmark:
    made = Benchmark(workload.partition("/")[0], workload, backend, GPU, "b", "2026-01-02T00:00:00Z", "", peer=True)
    if us is not None:
        made = dataclasses.replace(made, timing=summary("cuda_graph", True, [us]))
    return dataclasses.replace(made, **changed)


def rows(text: str, after: str) -> list[list[str]]:
    """Cells of the first table after a text, without its header."""
    lines = text.partition(after)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[2:]


def test_the_committed_document_is_made_of_the_committed_records(tmp_path):
    made = page.page(results.read(page.RESULTS), tmp_path)
    assert page.PAGE.read_text() == made, f"run {page.COMMAND}"
    plots = {path.name for path in (page.PAGE.parent / page.PLOTS).glob("*")}
    assert plots == {path.name for path in (tmp_path / page.PLOTS).glob("*")}


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--no-such-option", 2)])
def test_the_command_writes_nothing_for_arguments_that_it_does_not_know(argument, code, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "hardware.md")
    assert CliRunner().invoke(page.app, [argument]).exit_code == code
    assert not list(tmp_path.iterdir())


def test_without_a_record_it_says_that_nothing_was_measured(tmp_path):
    text = page.page([dataclasses.replace(record, machine=CPU) for record in CEILINGS], tmp_path)
    assert "**No record of a GPU is committed: nothing on this page was measured.**" in " ".join(text.split())
    assert {row[2] for row in rows(text, "Ceilings in use")} == {"an H200's datasheet"}
    assert "### Peers" not in text and not list(tmp_path.iterdir())


def test_a_gpu_of_which_only_our_own_kernels_are_known_has_no_section(tmp_path):
    other = dataclasses.replace(GPU, device="NVIDIA H100 80GB HBM3")
    ours = benchmark("fused_moe/fp8/scout/tp8/t64", "cuda", 100.0, machine=other, peer=False)
    text = page.page([*CEILINGS, ours], tmp_path)
    assert "## NVIDIA H200" in text and "H100" not in text


def test_ceilings_are_those_of_large_copies_and_square_products(tmp_path):
    text = page.page(CEILINGS, tmp_path)
    assert [row[1:] for row in rows(text, "Ceilings in use")] == [
        ["4000 GB/s", "this GPU"],
        ["800 TFLOP/s", "this GPU"],
        ["1500 TFLOP/s", "this GPU"],
    ]


@pytest.mark.parametrize(("device", "model", "bandwidth"), [("NVIDIA H200", "H200", 4800), ("NVIDIA H100 80GB HBM3", "H100", 3350)])
def test_without_one_ceiling_the_floors_rest_on_the_datasheet_and_it_says_so(tmp_path, device, model, bandwidth):
    records = [dataclasses.replace(record, machine=dataclasses.replace(GPU, device=device)) for record in CEILINGS[:3]]
    text = page.page(records, tmp_path)
    assert f"so its floors rest on the datasheet of an {model}" in " ".join(text.split())
    assert f"{bandwidth} GB/s" in text and "4000 GB/s" not in text


def test_floors_are_bytes_or_flops_over_the_ceilings(tmp_path):
    text = page.page(CEILINGS, tmp_path)
    found = {int(row[0]): row[1:] for row in rows(text, "`fused_moe`")}
    one = workloads.work(workloads.parse("fused_moe/fp8/scout/tp8/t1"))
    assert found[1][0] == f"{one.bytes / COPY / 1e3:.3g} m"
    many = workloads.work(workloads.parse("fused_moe/fp8/scout/tp8/t8192"))
    assert found[8192][0] == f"{many.flops['fp8'] / FP8 / 1e6 + many.flops['bf16'] / BF16 / 1e6:.0f} c"
    decode = workloads.work(workloads.parse("chunked_attention/bf16/scout/tp8/full/b64/q1/c131072/p64"))
    attention = {tuple(row[:3]): row[3:] for row in rows(text, "`chunked_attention`")}
    assert attention["64", "1", "131072"][2] == f"{decode.bytes / COPY / 1e3:.0f} m"


def test_peers_are_set_against_the_floor_and_failures_are_counted(tmp_path):
    records = [
        *CEILINGS,
        benchmark("fused_moe/fp8/scout/tp8/t8", "sglang", 100.0, notes=("its own tiles",)),
        benchmark("fused_moe/fp8/scout/tp8/t64", "sglang", 200.0),
        benchmark("fused_moe/fp8/scout/tp8/t8", "fbgemm_cutlass", 50.0, status="wrong", reason="its error is 0.5"),
        *(benchmark(f"fused_moe/fp8/scout/tp8/t{t}", "deep_gemm", None, status="unavailable", reason="not installed") for t in (8, 64)),
    ]
    text = page.page(records, tmp_path)
    floor = workloads.work(workloads.parse("fused_moe/fp8/scout/tp8/t8")).bytes / COPY / 1e3
    table = rows(text.partition("### Peers")[2], "`fused_moe`")
    assert [row[0] for row in table] == ["fused_moe/fp8/scout/tp8/t8", "fused_moe/fp8/scout/tp8/t64"]
    assert table[0][1:] == [f"{floor:.3g}", f"100 ({floor / 100:.2f})"]
    assert "- fbgemm_cutlass: wrong for 1 workload: its error is 0.5" in text
    assert "- deep_gemm: unavailable for 2 workloads: not installed" in text
    assert "- sglang: its own tiles" in text


def test_the_latest_run_counts_and_the_one_before_gives_the_spread(tmp_path):
    size = {"mib": 4096, "l2": "cold"}
    first, second = bandwidth("bandwidth/copy", size, 3900.0, run="a"), bandwidth("bandwidth/copy", size, 4100.0)
    text = page.page([second, first, *CEILINGS[3:]], tmp_path)
    assert rows(text, "Ceilings in use")[0][1] == "4100 GB/s"
    assert rows(text, "Spread between two runs") == [["bandwidth/copy", "1", "5.0%", "5.0%", "mib 4096, l2 cold"]]
    assert "No measurement has a second run to compare with." in page.page(CEILINGS, tmp_path)
    times = {"2026-01-01T00:00:00Z": 100.0, "2026-01-02T00:00:00Z": 110.0}
    twice = [benchmark("fused_moe/fp8/scout/tp8/t8", "sglang", us, date=date) for date, us in times.items()]
    spread = rows(page.page([*CEILINGS, *twice], tmp_path), "Spread between two runs")
    assert spread == [["peers/fused_moe", "1", "9.5%", "9.5%", "workload fused_moe/fp8/scout/tp8/t8, peer sglang"]]


def test_what_failed_stands_in_the_table_of_its_question(tmp_path):
    failed = dataclasses.replace(calibration("cluster/read", {"cluster": 16}), status="failed", reason="CUDA refused the launch")
    assert "- cluster 16: failed: CUDA refused the launch" in page.page([*CEILINGS, failed], tmp_path)


def test_a_failure_that_was_understood_since_is_explained(tmp_path):
    (question, run), words = next(iter(page.EXPLAINED.items()))
    failed = dataclasses.replace(calibration(question, {}, run=run), status="failed", reason="an illegal instruction")
    assert words in " ".join(page.page([*CEILINGS, failed], tmp_path).split())
    assert words not in " ".join(page.page([*CEILINGS, dataclasses.replace(failed, run="c")], tmp_path).split())


def gpu(*records: Calibration) -> results.Gpu:
    return results.gpus([*CEILINGS, *records])[0]


def test_bytes_in_flight_are_the_least_that_reach_the_copy_rate():
    assert findings.bytes_in_flight(gpu(*STREAMS)).startswith("Keep 64 KiB in flight on every SM: 8 stages of 8 KiB is the least")
    assert findings.bytes_in_flight(gpu(*STREAMS[:2])) == (
        "No ring of stages streams weights at 95% of the copy rate; the best has 4 stages of 8 KiB: 3000 GB/s, 75%."
    )
    assert "reaches 900 GB/s (23% of a long one)" in findings.few_experts(gpu(*STREAMS))


@pytest.mark.parametrize(("grid", "verdict"), [(0.9, "phases of one kernel are cheaper"), (1.9, "kernels are no dearer")])
def test_launches_are_weighed_against_grid_barriers(grid, verdict):
    empty = calibration("launch/graph", {"blocks_per_sm": 1, "threads": 128}, time=(1.2, "us"))
    barrier = calibration("launch/barrier", {"scope": "grid", "threads": 128}, time=(grid, "us"))
    assert verdict in findings.launches(gpu(empty, barrier))


def test_the_share_of_a_prologue_that_a_dependent_launch_hides():
    times = {launch.PLAIN: 5.0, launch.DEPENDENT: 4.5, launch.EARLY: 3.0}
    records = [calibration("launch/dependent", {"prologue_cycles": 4000, "launch": how}, time=(us, "us")) for how, us in times.items()]
    said = findings.dependent_launch(gpu(*records))
    assert "saves 0.50 µs" in said and "triggered early it saves 2.00 µs" in said


def test_how_far_a_prefetch_survives():
    records = [
        calibration("l2/prefetch", {"prefetched_mib": 16, "streamed_mib": mib, "evict_first": first}, still_there=(share, "%"))
        for first, shares in ((False, {16: 99, 64: 40, 256: 0}), (True, {16: 100, 64: 95, 256: 20}))
        for mib, share in shares.items()
    ]
    said = findings.l2_prefetch(gpu(*records))
    assert "after up to 16 MiB of other weights, and after up to 64 MiB of weights marked to be evicted first" in said


def test_every_finding_speaks_once_its_figures_are_there_and_not_before(tmp_path):
    """On figures made up for every case of every measurement."""
    units = {
        "time": "us",
        "bandwidth": "GB/s",
        "rate": "TFLOP/s",
        "still_there": "%",
        "relative_error": "1",
        "bits_kept": "bit",
        "as_assumed": "1",
    }
    units |= {"unlike_torch": "1", "unlike_torch_clamped": "1", "per_cycle": "B/cycle per SM"}
    made = [
        calibration(step.question, dict(case.parameters), **{name: (100.0, unit) for name, unit in units.items()})
        for step in MEASUREMENTS
        for case in step.cases()
    ]
    assert not findings.of(results.gpus([CEILINGS[0]])[0])
    said = findings.of(results.gpus(made)[0])
    assert len(said) == len(findings.FINDINGS)
    text = page.page(made, tmp_path)
    assert all(f"- {sentence}" in " ".join(text.split()) for sentence in said)
    plots = sorted(path.name for path in (tmp_path / page.PLOTS).iterdir())
    assert plots == [f"nvidia-h200-{name}.svg" for name in ("accumulation", "bandwidth", "weight-stream", "wgmma")]
    assert all(f"](hardware/{name})" in text for name in plots)
    before = {path: path.read_bytes() for path in (tmp_path / page.PLOTS).iterdir()}
    page.page(made, tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_committed_file_that_is_no_record_is_an_error(tmp_path):
    file = tmp_path / "nvidia-h200" / "x.json"
    record.append(file, CEILINGS)
    assert len(results.read(tmp_path)) == len(CEILINGS)
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"x\.json:7: "):
        results.read(tmp_path)
