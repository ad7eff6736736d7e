"""csrc/quantization.cu itself, built for the host, against the reference; and that the emulation notices bugs planted in it."""

from __future__ import annotations

import emulation
import pytest
import torch

from llama4_kernels.reference import quantization as reference

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

GUARD = 0xAB
GUARD_BYTES = 64

MISSING_BARRIER = {"quantization.cu": ("    __syncthreads();\n", "")}
HALF_A_SHORT_ROW = {"quantization.cu": ("lanes < SHORT_ROW;", "lanes < SHORT_ROW / 2;")}
DIVERGENT_BARRIER = {"quantization.cu": ("__syncthreads();", "if (threadIdx.x != 0) __syncthreads();")}
READ_PAST_THE_END = {"quantization.cu": ("begin + i < columns ? row", "begin + i <= columns ? row")}
SMALL_SHARED_MEMORY = {"quantization.cu": ("threads / WARP * sizeof(unsigned), stream", "sizeof(unsigned), stream")}


@pytest.fixture(scope="module")
def kernels():
    return emulation.load(emulation.build())


def quantize(kernels, x: torch.Tensor, *, misaligned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale, after a look at the bytes around them. misaligned: every pointer one element off 16 bytes."""
    rows, columns = x.shape
    shift = x.element_size() if misaligned else 0
    source = torch.empty(x.numel() + 1, dtype=x.dtype)[misaligned:][: x.numel()].view_as(x).copy_(x)
    codes = torch.full((rows * columns + 2 * GUARD_BYTES + shift,), GUARD, dtype=torch.uint8)
    scale = torch.full((rows * 4 + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8)
    kernels.quantize_per_token(
        x=source.data_ptr(),
        dtype=getattr(kernels.Dtype, str(x.dtype).removeprefix("torch.")),
        rows=rows,
        columns=columns,
        codes=codes.data_ptr() + GUARD_BYTES + shift,
        scale=scale.data_ptr() + GUARD_BYTES,
        stream=0,
    )
    start = GUARD_BYTES + shift
    for written, first, size in ((codes, start, rows * columns), (scale, GUARD_BYTES, rows * 4)):
        assert (written[:first] == GUARD).all() and (written[first + size :] == GUARD).all(), "a byte outside the outputs was written"
    got_codes = codes[start : start + rows * columns].clone().view(torch.float8_e4m3fn).view(rows, columns)
    return got_codes, scale[GUARD_BYTES : GUARD_BYTES + rows * 4].clone().view(torch.float32)


def assert_like_reference(kernels, x: torch.Tensor, **how: bool) -> None:
    codes, scale = quantize(kernels, x, **how)
    want = reference.quantize_per_token(x)
    torch.testing.assert_close(scale, want.scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(codes.float(), want.codes.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes.view(torch.uint8)[~codes.isnan()], want.codes.view(torch.uint8)[~want.codes.isnan()])


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100_003 + columns)
    magnitude = torch.logspace(-6, 6, max(rows, 1), dtype=torch.float32)[:rows, None]
    return (torch.randn(rows, columns, generator=generator) * magnitude).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        *((0, 128), (1, 1), (1, 5120), (3, 17), (5, 128), (64, 128), (129, 128), (2, 8191), (2, 8192), (2, 8208), (2, 16384)),
        *((1, 32768), (1, 32769), (1, 40960), (70, 48)),
    ],
)
def test_equals_the_reference_bit_for_bit(kernels, rows, columns, dtype):
    assert_like_reference(kernels, random(rows, columns, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_misaligned_pointers(kernels, dtype):
    assert_like_reference(kernels, random(3, 256, dtype), misaligned=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [128, 160, 161])
def test_rows_of_special_values_do_not_touch_others(kernels, columns, dtype):
    x = random(7, columns, dtype)
    x[1] = 0
    x[2, 100] = float("nan")
    x[3, 0], x[3, 1] = float("inf"), float("-inf")
    x[4] = -0.0
    x[5] *= 1e-36
    x[6, -1] = torch.finfo(dtype).max
    assert_like_reference(kernels, x)


def test_magnitudes_too_small_for_a_scale_become_zeros(kernels):
    x = torch.full((1, 32), 1e-44)
    assert quantize(kernels, x)[1].item() == 0.0
    assert_like_reference(kernels, x)


def test_every_bfloat16(kernels):
    """Each bfloat16 once, in a row whose maximum is 448, so that the codes are the values rounded to e4m3."""
    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = bits[bits.float().abs() <= 448]
    assert_like_reference(kernels, torch.cat([values, values.new_tensor([448.0])]).unsqueeze(0))


@pytest.mark.parametrize(("planted", "columns"), [(MISSING_BARRIER, 1024), (HALF_A_SHORT_ROW, 128)], ids=["no barrier", "half a short row"])
def test_a_maximum_of_a_part_of_the_row_is_noticed(planted, columns):
    kernels = emulation.load(emulation.build(planted=planted))
    with pytest.raises(AssertionError):
        assert_like_reference(kernels, random(4, columns, torch.float32))


def test_a_barrier_that_a_thread_never_reaches_is_noticed():
    with pytest.raises(RuntimeError, match="threads from 1 to 63: waits at quantization.cu:[0-9]+ for __syncthreads"):
        quantize(emulation.load(emulation.build(planted=DIVERGENT_BARRIER)), random(4, 1024, torch.float32))


@pytest.mark.parametrize("planted", [None, READ_PAST_THE_END, SMALL_SHARED_MEMORY], ids=["as it is", "read past the end", "small shared memory"])
def test_address_sanitizer_watches_global_and_shared_memory(planted):
    run = emulation.run_sanitized_kernels(RUN_SANITIZED, planted)
    if planted is None:
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in run.stderr, run.stderr


RUN_SANITIZED = """
for columns in (16, 33, 128, 1024):
    x, codes, scale = (libc.calloc(ctypes.c_size_t(3 * columns), ctypes.c_size_t(size)) for size in (4, 1, 4))
    kernels.quantize_per_token(x=x, dtype=kernels.Dtype.float32, rows=3, columns=columns, codes=codes, scale=scale, stream=0)
"""
