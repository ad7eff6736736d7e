"""csrc/rope.cu itself, built for the host and called through llama4_kernels/cuda/rope.py, between guard bytes, against float64."""

from __future__ import annotations

import emulation
import planted
import pytest
import torch
from guards import Guarded
from test_rope import assert_a_slot_named_twice_holds_one_of_its_tokens, bound, cos_sin_table, far_rope, oracle
from torch import Tensor

from backends import assert_same_bits, assert_within
from llama4_kernels.reference.rope import rope_qk_norm as reference
from weights import FP8, e4m3

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

SCOUT = dict(num_heads=5, num_kv_heads=1, head_dim=128)

PLANTED = {
    "interleaved pairs as halves": ("? «Places{start + 2 * pair, start + 2 * pair + WIDTH}»", "Places{start + pair, start + pair + WIDTH}"),
    "sine and cosine swapped": ("x * cos[i] - y * sin[i]", "x * sin[i] - y * cos[i]"),
    "v turned too": ("if (a.cos_sin && «!is_v»)", "true"),
    "v normalised too": ("if («!is_v») factor = rsqrtf", "true"),
    "half of the sum of squares": ("int distance = «lanes / 2»", "lanes / 4"),
    "k scaled as q": ("if (a.floor_scale && «is_q»)", "!is_v"),
    "floor one position late": ("«(position + 1)» / a.floor_scale", "position"),
    "unmapped slot": ("slot = at(a.slot_map, slot);", "at(a.slot_map, slot);"),
    "slot -1 written": ("if (!is_q && slot < 0) return;", "if (slot < 0) slot = 0;"),
    "v with the scale of k": ("is_v ? a.v_scale : a.k_scale", "a.k_scale"),
    "a vector too far": ("static_cast<T*>(to) + «places.high», high", "places.high + WIDTH"),
}


@pytest.fixture(scope="module")
def op():
    return emulation.op_module("rope", emulation.load(emulation.build())).rope_qk_norm


def run(op, qkv: Tensor, positions: Tensor, **options) -> list[Tensor]:
    """What the call returns, then the caches as it leaves them; unwritten elements are NaN."""
    with Guarded() as guarded:
        options = {name: guarded(value) if isinstance(value, Tensor) else value for name, value in options.items()}
        result = op(guarded(qkv), guarded(positions), **options)
    return list(result) if options.get("k_cache") is None else [result, options["k_cache"], options["v_cache"]]


def caches(tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, page_size: int = 4, map_dtype=None) -> dict:
    """Caches of noise with room for all tokens; some tokens are not to be written, by their slot or by the map."""
    pages = tokens // page_size + 2
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[1::3] = -1
    given = dict(slots=slots)
    for name in ("k_cache", "v_cache"):
        given[name] = torch.randn(pages, page_size, num_kv_heads, head_dim).to(dtype)
    if map_dtype is not None:
        given["slot_map"] = torch.randperm(pages * page_size).to(map_dtype)
        given["slot_map"][slots[0]] = -1
    if dtype == FP8:
        given |= dict(k_scale=torch.tensor(0.013), v_scale=torch.tensor([0.5]))
    return given


def assert_like_reference(op, qkv: Tensor, positions: Tensor, **options) -> None:
    """Equal to fp32's last bits; where that is the middle of two values of the output's dtype, either."""
    expected = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
    want = reference(qkv, positions, **expected)
    want = list(want) if expected.get("k_cache") is None else [want, expected["k_cache"], expected["v_cache"]]
    for got, wanted in zip(run(op, qkv, positions, **options), want, strict=True):
        step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, FP8: 2**-3}[wanted.dtype]
        torch.testing.assert_close(got.float(), wanted.float(), rtol=step, atol=2e-6)
        assert wanted.dtype == torch.float32 or (got.float() != wanted.float()).sum() <= 0.01 * wanted.numel()


def everything(tokens: int = 6) -> dict:
    """All steps at once, so that each planted bug shows."""
    return dict(
        qkv=torch.randn(tokens, 4 * 32),
        positions=torch.arange(tokens) + 2,
        num_heads=2, num_kv_heads=1, head_dim=32, interleaved=True, qk_norm_eps=1e-5, temperature=(0.1, 3),
        cos_sin=cos_sin_table(tokens + 2, 32),
        **caches(tokens, 1, 32, FP8, map_dtype=torch.int32),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(5, 1, 128), (2, 1, 64), (1, 1, 2), (3, 3, 20), (4, 2, 512)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("steps", ["rope", "rope, norm", "norm", "temperature", "none"])
def test_steps(op, dtype, heads, interleaved, steps):
    num_heads, num_kv_heads, head_dim = heads
    qkv, positions = torch.randn(7, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype), torch.randint(0, 40, (7,), dtype=torch.int32)
    options = dict(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, interleaved=interleaved,
        cos_sin=cos_sin_table(40, head_dim) if "rope" in steps else None,
        qk_norm_eps=1e-5 if "norm" in steps else None,
        temperature=(0.5, 3) if steps == "temperature" else None,
    )  # fmt: skip
    for got, want in zip(run(op, qkv, positions, **options), oracle(qkv, positions, **options), strict=True):
        assert_within(got, want, bound(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("head_dim", [128, 20])
@pytest.mark.parametrize("page_size, map_dtype", [(1, None), (16, torch.int32), (4, torch.int64)])
def test_caches(op, dtype, fp8, head_dim, page_size, map_dtype):
    given = caches(9, 2, head_dim, FP8 if fp8 else dtype, page_size=page_size, map_dtype=map_dtype)
    qkv, positions = torch.randn(9, 10 * head_dim).to(dtype), torch.arange(9)
    assert_like_reference(op, qkv, positions, num_heads=6, num_kv_heads=2, head_dim=head_dim, cos_sin=cos_sin_table(9, head_dim), **given)


@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8])
def test_a_slot_named_twice_holds_one_of_its_tokens(op, cache_dtype):
    assert_a_slot_named_twice_holds_one_of_its_tokens(op, cache_dtype)


def test_an_empty_map_of_slots_where_no_token_is_written(op):
    given = caches(3, 1, 128, torch.float32) | dict(slots=torch.full((3,), -1), slot_map=torch.empty(0, dtype=torch.int64))
    assert_like_reference(op, torch.randn(3, 7 * 128), torch.arange(3), **SCOUT, **given)


def test_no_tokens(op):
    q, k, v = run(op, torch.empty(0, 7 * 128), torch.empty(0, dtype=torch.int64), **SCOUT)
    assert q.shape == (0, 5, 128) and k.shape == v.shape == (0, 1, 128)


def test_fp8_codes_are_the_reference_s_bit_for_bit(op):
    """Without arithmetic before the division, no rounding differs."""
    given = caches(40, 1, 128, FP8, page_size=1)
    qkv = torch.randn(40, 7 * 128) * torch.logspace(-4, 4, 40)[:, None]
    qkv[3, 700:] = torch.tensor(float("inf"))
    got = run(op, qkv, torch.arange(40), **SCOUT, **given)
    written = given["slots"] >= 0
    _, k, v = qkv.view(40, 7, 128).split([5, 1, 1], 1)
    for cache, values, scale in zip(got[1:], (k, v), (0.013, 0.5)):
        want = e4m3((values[written] / torch.tensor(scale)).clamp(-448, 448))
        assert torch.equal(cache[given["slots"][written], 0].double(), want.double())


def test_a_head_of_nan_stays_alone(op):
    qkv = torch.randn(3, 7 * 128)
    qkv[1, 128:256] = torch.nan
    got = run(op, qkv, torch.arange(3), **SCOUT, cos_sin=cos_sin_table(3, 128), qk_norm_eps=1e-5)
    assert got[0][1, 1].isnan().all() and sum(int(x.isnan().sum()) for x in got) == 128


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_far_positions(op, position_dtype):
    arguments, options, want = far_rope(position_dtype)
    for got, expected in zip(op(*arguments, **options), want, strict=True):
        assert_within(got, expected, bound(expected))


def test_same_bits_again(op):
    given = everything()
    assert_same_bits(*(run(op, **given) for _ in range(2)))


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_noticed(bug):
    op = op_with(bug)
    with pytest.raises(AssertionError):
        assert_like_reference(op, **everything())


def test_without_a_bug_nothing_is_noticed():
    assert_like_reference(op_with(None), **everything())


def op_with(bug: str | None):
    bugs = {name: ("rope.cu", *change) for name, change in PLANTED.items()}
    return emulation.op_module("rope", planted.kernels(bugs, bug)).rope_qk_norm
