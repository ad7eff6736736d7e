"""bench/calibration/kernels: what nvcc makes of them, and the same sources run by the host emulation: what is timed is what is meant."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import emulation
import pytest
import torch
from test_package import cuobjdump

from bench.calibration import gpu, native, plan
from bench.calibration.measurement import Case, Unavailable, WrongResult
from bench.calibration.measurements import bandwidth, cluster, fp8, l2, matmul, weight_stream, wgmma
from llama4_kernels.bench.timing import summary

ROOT = Path(__file__).parents[1]
SMS = 3
EMULATED = [native.KERNELS / f"{name}.cu" for name in ("bandwidth", "weight_stream", "cluster", "wgmma_rate", "fp8")]

no_emulation = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def built():
    try:
        return native.build()
    except native.BuildError as error:
        if "no nvcc" not in str(error):
            raise
        pytest.skip(str(error))


def test_kernels_compile_without_spills_and_without_serialised_wgmma(built):
    kernels = re.findall(r"Function properties for (\w+)", built.ptxas)
    assert len(kernels) > 30 and any("rate_kernel" in name for name in kernels)
    assert set(re.findall(r"\d+ bytes (?:stack frame|spill stores|spill loads)", built.ptxas)) == {
        "0 bytes stack frame",
        "0 bytes spill stores",
        "0 bytes spill loads",
    }
    assert not re.search("serializ|Performance Loss|warning", built.ptxas, re.IGNORECASE)


def test_every_entry_point_that_measurements_call_is_there(built):
    dll = ctypes.CDLL(str(built.path))
    sources = "".join(path.read_text() for path in (native.KERNELS.parent / "measurements").glob("*.py"))
    entries = set(re.findall(r'call\(\s*"(\w+)"', sources)) | set(re.findall(r'call, "(\w+)"', sources))
    defined = set(
        re.findall(r"^CALIBRATION_ENTRY (\w+)\(", "".join(path.read_text() for path in native.KERNELS.glob("*.cu")), re.MULTILINE)
    )
    assert entries == defined and len(entries) > 10
    assert all(hasattr(dll, entry) for entry in entries)


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither on PATH nor in triton")
def test_kernels_are_sm_90a_and_use_the_instructions_that_they_measure(built):
    def dump(option: str) -> str:
        return subprocess.run([cuobjdump(), option, built.path], check=True, capture_output=True, text=True).stdout

    assert {line.split(".")[-2] for line in dump("--list-elf").splitlines() if line.startswith("ELF file")} == {"sm_90a"}
    code = {part.split(maxsplit=1)[0]: part for part in dump("--dump-sass").split("Function : ")[1:]}

    def of(kernel: str) -> list[str]:
        found = [body for name, body in code.items() if kernel in name]
        assert found, kernel
        return found

    assert all("UTMALDG.2D" in body or "UBLKCP" in body for body in of("stream_kernel"))
    assert all("UBLKPF" in body for body in of("prefetch_kernel"))
    assert sum("QGMMA" in body for body in of("rate_kernel")) == sum("HGMMA" in body for body in of("rate_kernel")) == 12
    assert all("LDG.E.128" in body for body in [*of("read_kernel"), *of("copy_kernel")])
    assert all("ACQBULK" in body for body in of("link_kernel"))
    (probe,) = of("probe_kernel")
    order = re.findall(r"LDG|STS|SR_CLOCK|STG", probe)
    assert order == ["LDG", "STS", "SR_CLOCK", "LDG", "STS", "SR_CLOCK", "STG"], "the clock is not read around one load that lands"


@pytest.fixture
def host(monkeypatch):
    """`call` runs the kernels on the host, on CPU tensors."""
    dll = ctypes.CDLL(str(emulation.build(sources=EMULATED)))
    monkeypatch.setattr(native, "_loaded", lambda: dll)
    monkeypatch.setattr(native, "_stream", lambda: 0)
    monkeypatch.setattr(gpu, "sms", lambda: SMS)
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))


def words(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)


@no_emulation
@pytest.mark.parametrize("pieces", [1, 1023, 1024, 5000])
def test_copy_moves_every_byte_and_no_other(host, pieces):
    source, target = words(4 * pieces), torch.zeros(4 * pieces + 8, dtype=torch.int32)
    native.call("bandwidth_copy", source, target, 16 * pieces, 2)
    assert torch.equal(target[: 4 * pieces], source) and not target[4 * pieces :].any()


@no_emulation
@pytest.mark.parametrize("shift", [0, 9])
@pytest.mark.parametrize("passes", [1, 3])
def test_read_reads_every_word_once_in_each_pass(host, passes, shift):
    source, checksums = words(4 * 7000), torch.zeros(4 * bandwidth.WARPS_PER_BLOCK, dtype=torch.int32)
    native.call("bandwidth_read", source, source.nbytes, passes, shift, checksums, 4)
    assert bandwidth.exclusive_or(checksums) == bandwidth.exclusive_or(source)
    native.call("bandwidth_read", source, source.nbytes, 2 * passes, shift, checksums, 4)
    assert bandwidth.exclusive_or(checksums) == 0


@no_emulation
def test_write_writes_every_word_and_no_other(host):
    target = torch.zeros(4 * 3000 + 4, dtype=torch.int32)
    native.call("bandwidth_write", target, 16 * 3000, 1, 2)
    first = (torch.arange(3000) ^ 1) * 2654435761 & 0xFFFFFFFF
    expected = torch.stack([first ^ salt for salt in (0, 0x9E3779B9, 0x7F4A7C15, 0x85EBCA6B)], 1).to(torch.int32)
    assert torch.equal(target[:-4].view(3000, 4), expected) and not target[-4:].any()


def test_exclusive_or_is_that_of_all_words():
    source = words(100_003)
    found = 0
    for word in source.tolist():
        found ^= word
    assert bandwidth.exclusive_or(source) == found


@no_emulation
@pytest.mark.parametrize("fetch", [weight_stream.BOXES, weight_stream.CONTIGUOUS])
@pytest.mark.parametrize(("tile_kib", "stages", "blocks_per_sm"), [(8, 2, 1), (4, 3, 2), (16, 5, 1 / 3), (32, 2, 1)])
@pytest.mark.parametrize("evict_first", [False, True])
def test_a_stream_reads_every_weight_once(host, monkeypatch, fetch, tile_kib, stages, blocks_per_sm, evict_first):
    assert_streams(monkeypatch, fetch, tile_kib, stages, blocks_per_sm, evict_first)


def assert_streams(monkeypatch, fetch, tile_kib, stages, blocks_per_sm, evict_first):
    matrix = words(256 * weight_stream.COLUMNS // 4).view(torch.uint8)
    checksums = torch.zeros(2 * SMS * weight_stream.CONSUMER_WARPS, dtype=torch.int32)
    monkeypatch.setattr(weight_stream, "checksums", lambda: checksums)
    how = {"fetch": fetch, "tile_kib": tile_kib, "stages": stages, "blocks_per_sm": blocks_per_sm, "evict_first": evict_first}
    weight_stream.stream(matrix, how)()
    assert bandwidth.exclusive_or(checksums) == bandwidth.exclusive_or(matrix.view(torch.int32))


@no_emulation
@pytest.mark.parametrize(
    ("text", "bug"),
    [("empty[stage].wait(parity ^ 1);", ""), ("full[stage].wait(parity);", "")],
    ids=["a stage is overwritten", "a tile is read too early"],
)
def test_a_stream_that_does_not_wait_is_noticed(host, monkeypatch, text, bug):
    source = native.KERNELS / "weight_stream.cu"
    dll = ctypes.CDLL(str(emulation.build(sources=[source], planted={source.name: (text, bug)})))
    monkeypatch.setattr(native, "_loaded", lambda: dll)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_streams(monkeypatch, weight_stream.BOXES, 8, 2, 1, False)


@no_emulation
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_block_reads_the_others_of_its_cluster_in_turn(host, size):
    repeats = 5
    checksums, cycles = torch.zeros(4, cluster.THREADS, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    native.call("cluster_read", cluster.BYTES, repeats, size, checksums, cycles, 4)
    cluster.check(checksums[:size], size, repeats)
    assert (cycles > 0).all()
    checksums[0, 5] += 1
    with pytest.raises(WrongResult, match=f"block 0 of a cluster of {size}"):
        cluster.check(checksums, size, repeats)


@no_emulation
@pytest.mark.parametrize("source", [wgmma.SHARED, wgmma.REGISTERS])
@pytest.mark.parametrize("dtype", wgmma.K)
@pytest.mark.parametrize("n", [8, 64, 256])
def test_the_rate_kernel_multiplies_what_it_is_given(host, n, dtype, source):
    torch.manual_seed(n)
    a, b = wgmma.operands(dtype, n)
    out, cycles = torch.zeros(2, wgmma.M, n), torch.zeros(1, dtype=torch.int64)
    native.call("wgmma_rate", a, b, n, dtype == "bf16", source == wgmma.REGISTERS, 2 * wgmma.B_TILES, 2, out, cycles, 1)
    assert wgmma.relative_error(out, 2 * wgmma.expected(a, b)) < 1e-5 and cycles.item() > 0
    with pytest.raises(RuntimeError, match="wgmma_rate: n is 24, needs 8, 16, 32, 64, 128 or 256"):
        native.call("wgmma_rate", a, b, 24, 0, 0, 4, 2, out, cycles, 1)


@no_emulation
@pytest.mark.parametrize("data", fp8.DATA)
@pytest.mark.parametrize(("dtype", "promote"), [("e4m3", 0), ("e4m3", 128), ("e4m3", 256), ("bf16", 0)])
def test_sums_are_those_of_the_products(host, monkeypatch, data, dtype, promote):
    monkeypatch.setattr(fp8, "PRODUCTS", 2)
    torch.manual_seed(0)
    a, b = fp8.operands(data, dtype, 640)
    out = fp8.accumulate(a, b, promote)
    exact = a.double() @ b.double().mT
    assert (out - exact).norm() / exact.norm() < 1e-6


@no_emulation
@pytest.mark.parametrize("where", [case.parameters["where"] for case in fp8.bits_cases()])
def test_all_bits_are_kept_by_an_fp32_accumulator(host, where):
    out = fp8.accumulate(*fp8.bits_operands(where), fp8.NEVER)
    assert out[0].diagonal()[:19].tolist() == [1 + 2.0**-j for j in range(19)]
    assert fp8.kept_bits(out) == 18


def test_bits_are_counted_from_what_is_lost():
    out = torch.ones(1, 64, 64)
    for j in range(14):
        out[0, j, j] = 1 + 2.0**-j
    assert fp8.kept_bits(out) == 13


@no_emulation
def test_hardware_conversion_is_set_against_torch(host):
    """CUDA's own host code stands in for the instruction here: it saturates, where torch gives NaN."""
    floats = torch.tensor([0.0, 1.0, 447.0, 448.0, 463.9, 465.0, 1e9, -1e9, float("inf"), float("nan")])
    codes = fp8.convert(floats)
    assert codes.float()[:-1].tolist() == [0.0, 1.0, 448.0, 448.0, 448.0, 448.0, 448.0, -448.0, 448.0]
    assert int(fp8.differ(codes, floats.clamp(-448, 448).to(E4M3))) == 0
    assert int(fp8.differ(codes, torch.full_like(floats, 2.0).to(E4M3))) == len(floats)


def test_every_float_belongs_to_one_case_of_the_conversion():
    kinds = [case.parameters["floats"] for case in fp8.conversion_cases()]
    assert sum(fp8.COUNTS.values()) == len(fp8.FLOATS) == 2**32
    edges = torch.tensor([0x43E00000, 0x43E00001, 0x7F7FFFFF, 0x7F800000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert [kind for each in edges for kind in kinds if fp8._is(each, kind)] == ["up to 448", "above 448", "above 448", "infinite", "nan"]
    floats = torch.tensor([0.0, -448.0, 448.1, 3e38, float("inf"), -float("inf"), float("nan")])
    assert torch.equal(sum(fp8._is(floats, kind).int() for kind in kinds), torch.ones(7, dtype=torch.int32))


@pytest.mark.parametrize("dtype", matmul.ITEM_BYTES)
def test_products_that_torch_is_timed_with_are_right(monkeypatch, dtype):
    """On a CPU torch has the same functions."""
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    matmul._ones.cache_clear()
    torch.manual_seed(0)
    product = matmul.Product.random(dtype, 32, 64, 128)
    assert product.run().dtype == torch.bfloat16 and product.error() < 4e-3
    matmul._ones.cache_clear()


def test_matmul_cases_are_the_layers_of_llama_4():
    shapes = {(case.parameters["layer"], case.parameters["n"], case.parameters["k"]) for case in matmul.cases("fp8")}
    assert {("gate_up tp8", 2048, 5120), ("down tp8", 5120, 1024), ("gate_up tp1", 16384, 5120), ("down tp1", 5120, 8192)} < shapes


@pytest.fixture
def small(host, monkeypatch):
    """Measurements on the host, of sizes that it can do; a launch is run once instead of timed."""

    def time(launches, rounds=20):
        for launch in launches[:2]:
            launch()
        return summary("cuda_graph", True, [2.0])

    monkeypatch.setattr(gpu, "time", time)
    monkeypatch.setattr(gpu, "l2_bytes", lambda: 1 << 16)
    for module, name, value in (
        (bandwidth, "MIB", 1 << 13),
        (weight_stream, "ROWS", 256),
        (weight_stream, "COLUMNS", 256),
        (cluster, "REPEATS", 5),
        (wgmma, "REPEATS", 8),
        (fp8, "PRODUCTS", 1),
        (fp8, "CHUNK", 1 << 12),
        (l2, "MIB", 1 << 13),
    ):
        monkeypatch.setattr(module, name, value)
    for cached in (gpu.random_bytes, bandwidth.checksums, weight_stream.checksums, weight_stream._expected):
        cached.cache_clear()


def chosen(question: str, count: int = 3) -> list[Case]:
    """Cases that differ as much as possible, none of them large."""
    cases = sorted(plan.find(question).cases(), key=lambda case: (case.bytes, case.flops))[:60]
    return cases[:: max(1, len(cases) // count)]


@no_emulation
@pytest.mark.parametrize(
    "question", ["bandwidth/copy", "bandwidth/read", "bandwidth/write", "bandwidth/torch_copy", "weight_stream", "wgmma"]
)
def test_measurements_run_from_case_to_figures(small, question):
    for case in chosen(question):
        figures = plan.find(question).measure(case)
        assert figures["time"].value == 2.0 and figures["rate" if question == "wgmma" else "bandwidth"].value > 0


@no_emulation
def test_measurements_of_l2_and_of_clusters_run(small, monkeypatch):
    monkeypatch.setattr(gpu, "sms", lambda: 4)
    for case in (Case({"mib": 4, "passes": 3, "reader": reader}, bytes=1) for reader in ("same SM", "another SM")):
        assert "bandwidth" in plan.find("bandwidth/l2").measure(case)
    for size in (1, 2, 4):
        assert plan.find("cluster/read").measure(Case({"cluster": size}))["per_cycle"].value > 0


@no_emulation
def test_measurements_of_fp8_run(small, monkeypatch):
    case = Case({"data": "positive", "dtype": "e4m3", "k": 128, "promote": 128})
    assert plan.find("fp8/accumulation").measure(case)["relative_error"].value < 1e-6
    assert plan.find("fp8/bits").measure(Case({"where": "within an instruction"}))["bits_kept"].value == 18
    monkeypatch.setattr(fp8, "FLOATS", range(-(1 << 12), 1 << 12))
    figures = plan.find("fp8/conversion").measure(Case({"floats": "nan"}))
    assert figures["floats"].value == 1 << 12 and figures["unlike_torch_clamped"].value == 0


class Signatures:
    """Stands in for the library: an entry point takes what its declaration says, and launches nothing."""

    def __init__(self) -> None:
        text = " ".join("".join(path.read_text() for path in native.KERNELS.glob("*.cu")).split())
        self.known = {name: declared.split(", ") for name, declared in re.findall(r"CALIBRATION_ENTRY (\w+)\(([^)]*)\)", text)}
        self.called: set[str] = set()

    def __getattr__(self, name: str):
        declared = self.known[name]

        def entry(*values) -> None:
            kinds = [ctypes.c_void_p if "*" in each or each.startswith("cudaStream_t") else ctypes.c_int64 for each in declared]
            assert [type(value) for value in values] == kinds, (name, declared)
            self.called.add(name)

        return entry


@no_emulation
@pytest.mark.parametrize("question", ["launch/graph", "launch/dependent", "launch/barrier", "l2/prefetch"])
def test_entry_points_that_the_host_cannot_run_are_called_as_declared(small, monkeypatch, question):
    signatures = Signatures()
    monkeypatch.setattr(native, "_loaded", lambda: signatures)
    for case in plan.find(question).cases():
        try:
            assert plan.find(question).measure(case)
        except Unavailable as error:
            assert question == "l2/prefetch" and "too close" in str(error)
    assert signatures.called


def test_a_graph_holds_launches_for_long_enough_and_not_too_many(monkeypatch):
    held: list[int] = []

    def time_calls(calls, device, rounds):
        held.append(len(calls))
        return summary("cuda_graph", True, [1.0]), []

    monkeypatch.setattr(gpu, "time_calls", time_calls)
    for single_us in (1.0, 100.0, 1e4):
        monkeypatch.setattr(gpu, "estimate_us", lambda launch, device, us=single_us: us)
        gpu.time([int, int, int])
    assert held == [1002, 21, 3]
    monkeypatch.setattr(gpu, "time_calls", lambda *_: (summary("cuda_events", True, [1.0]), ["cannot be captured"]))
    with pytest.raises(RuntimeError, match="cannot be captured"):
        gpu.time([int])
