"""e4m3 in hardware: whether it rounds as torch does, and how exact its sums are."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.calibration import gpu
from bench.calibration.native import call
from bench.calibration.measurement import Case, Figures, Measurement, WrongResult
from llama4_kernels.bench.record import Figure

E4M3_MAX = 448.0
COUNTS = {  # of float32s, by what they are: 448 is 0x43e00000, the largest finite one 0x7f7fffff
    "up to 448": 2 * (0x43E00000 + 1),
    "above 448": 2 * (0x7F7FFFFF - 0x43E00000),
    "infinite": 2,
    "nan": 2 * 0x7FFFFF,
}
FLOATS = range(-(1 << 31), 1 << 31)  # the bits of every float32
CHUNK = 1 << 26  # of them converted at once
NEVER = 0
MOST_ERROR = 0.5
PRODUCTS, ROWS = 32, 64
DATA: dict[str, Callable[[Tensor], Tensor]] = {"normal": lambda x: x, "positive": torch.abs}
SPAN_ELEMENTS = {"e4m3": 128, "bf16": 64}


def conversion_cases() -> list[Case]:
    """Every float32 there is, by what it is."""
    return [Case({"floats": floats}, bytes=count * (4 + 1)) for floats, count in COUNTS.items()]


def measure_conversion(case: Case) -> Figures:
    """Of the hardware's saturating conversion: codes that differ from those of torch's `.to`, and of torch's after a clamp to ±448."""
    total = plain = clamped = 0
    for first in FLOATS[::CHUNK]:
        floats = torch.arange(first, first + CHUNK, dtype=torch.int64, device=gpu.DEVICE).to(torch.int32).view(torch.float32)
        chosen = floats[_is(floats, case.parameters["floats"])]
        codes = convert(chosen)
        total += chosen.numel()
        plain += int(differ(codes, chosen.to(torch.float8_e4m3fn)))
        clamped += int(differ(codes, chosen.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)))
    return {
        "floats": Figure(total, "1"),
        "unlike_torch": Figure(plain, "1"),
        "unlike_torch_clamped": Figure(clamped, "1"),
    }


def _is(floats: Tensor, what: str) -> Tensor:
    if what == "nan":
        return floats.isnan()
    if what == "infinite":
        return floats.isinf()
    large = floats.abs() > E4M3_MAX
    return large & floats.isfinite() if what == "above 448" else ~large & ~floats.isnan()


def convert(floats: Tensor) -> Tensor:
    """By the hardware, saturating."""
    codes = torch.empty(floats.shape, dtype=torch.float8_e4m3fn, device=floats.device)
    if floats.numel():
        call("fp8_convert", floats, floats.numel(), codes, 8 * gpu.sms())
    return codes


def differ(codes: Tensor, others: Tensor) -> Tensor:
    """How many codes are not the same; any NaN equals any other."""
    same = codes.view(torch.uint8) == others.view(torch.uint8)
    return (~same & ~(codes.float().isnan() & others.float().isnan())).sum()


def accumulation_cases() -> list[Case]:
    """promote: after how many elements of K the sum moves to plain fp32 registers; 0 is never. bf16 for comparison."""
    chosen = []
    for data, k in itertools.product(DATA, (128, 512, 1024, 2048, 5120, 8192)):
        for dtype, promote in (("e4m3", NEVER), ("e4m3", 128), ("e4m3", 512), ("bf16", NEVER)):
            parameters = {"data": data, "dtype": dtype, "k": k, "promote": promote}
            item = 1 if dtype == "e4m3" else 2
            chosen.append(Case(parameters, bytes=PRODUCTS * ROWS * (2 * k * item + 4 * ROWS), flops=2 * PRODUCTS * ROWS * ROWS * k))
    return chosen


def measure_accumulation(case: Case) -> Figures:
    dtype, k = case.parameters["dtype"], case.parameters["k"]
    a, b = operands(case.parameters["data"], dtype, k)
    error = accumulate(a, b, case.parameters["promote"]).double() - (exact := a.double() @ b.double().mT)
    relative = float(error.norm() / exact.norm())
    if not relative < MOST_ERROR:
        raise WrongResult(f"relative error {relative:.1e}: no loss of bits explains more than {MOST_ERROR}")
    return {"relative_error": Figure(relative, "1"), "bias": Figure(float(error.mean() / exact.abs().mean()), "1")}


def operands(data: str, dtype: str, k: int) -> tuple[Tensor, Tensor]:
    """The same values for both types: those of e4m3."""
    pair = (DATA[data](torch.randn(PRODUCTS, ROWS, k, device=gpu.DEVICE)).to(torch.float8_e4m3fn) for _ in "ab")
    a, b = (each if dtype == "e4m3" else each.to(torch.bfloat16) for each in pair)
    return a, b


def accumulate(a: Tensor, b: Tensor, promote: int) -> Tensor:
    """a, b [products, 64, K] -> [products, 64, 64], summed by wgmma."""
    products, rows, k = a.shape
    out = torch.empty(products, rows, rows, device=a.device)
    dtype = "e4m3" if a.dtype == torch.float8_e4m3fn else "bf16"
    call("fp8_accumulate", a, b, products, k * a.element_size(), promote // SPAN_ELEMENTS[dtype], dtype == "bf16", out)
    return out


def bits_cases() -> list[Case]:
    return [Case({"where": where}) for where in ("within an instruction", "across instructions")]


def measure_bits(case: Case) -> Figures:
    """1 + 2^-j for each j: the last j that is not lost is how many bits the sum keeps below its leading one."""
    kept = kept_bits(accumulate(*bits_operands(case.parameters["where"]), NEVER))
    return {"bits_kept": Figure(kept, "bit")}


def bits_operands(where: str) -> tuple[Tensor, Tensor]:
    """Their product has 1 + 2^-j at [j, j], the second term in the same instruction of 32 products as the first, or in the next."""
    a, b = (torch.zeros(1, ROWS, 128, device=gpu.DEVICE) for _ in "ab")
    at = 1 if where == "within an instruction" else 32
    for j in range(19):
        a[:, j, 0] = b[:, j, 0] = 1.0
        a[:, j, at], b[:, j, at] = 2.0 ** -(j // 2), 2.0 ** -(j - j // 2)
    return a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)


def kept_bits(out: Tensor) -> int:
    """From the diagonal of one product."""
    diagonal = out[0].diagonal()[:19]
    return max((j for j in range(19) if diagonal[j] != 1.0), default=0)


MEASUREMENTS = (
    Measurement("fp8/conversion", "Does the hardware round floats to e4m3 as torch does?", 20, conversion_cases, measure_conversion),
    Measurement(
        "fp8/accumulation", "How exact are sums of e4m3 products, with and without promotion?", 20, accumulation_cases, measure_accumulation
    ),
    Measurement("fp8/bits", "How many bits does a sum of e4m3 products keep?", 10, bits_cases, measure_bits),
)
