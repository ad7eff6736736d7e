"""rope_qk_norm against complex numbers in float64, and against transformers' own functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, Llama4TextRotaryEmbedding, apply_rotary_emb

from backends import assert_passes_opcheck, assert_replays, assert_same_bits, assert_within, compute, device_of
from llama4_kernels import ops
from weights import FP8, e4m3

DTYPES = [torch.bfloat16, torch.float32]


def cos_sin_table(positions: int, head_dim: int) -> Tensor:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def oracle(qkv: Tensor, positions: Tensor, *, num_heads, num_kv_heads, head_dim, cos_sin=None, interleaved=False, qk_norm_eps=None,
           temperature=None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(q, k, v) in float64."""
    q, k, v = qkv.double().view(-1, num_heads + 2 * num_kv_heads, head_dim).split([num_heads, num_kv_heads, num_kv_heads], 1)
    if cos_sin is not None:
        half = head_dim // 2
        turn = torch.complex(cos_sin.double()[:, :half], cos_sin.double()[:, half:])[positions.long()][:, None]
        real = slice(0, None, 2) if interleaved else slice(0, half)
        imaginary = slice(1, None, 2) if interleaved else slice(half, None)

        def rotate(x: Tensor) -> Tensor:
            turned = torch.complex(x[..., real], x[..., imaginary]) * turn
            out = torch.empty_like(x)
            out[..., real], out[..., imaginary] = turned.real, turned.imag
            return out

        q, k = rotate(q), rotate(k)
    if qk_norm_eps is not None:
        q, k = (x / (x.square().mean(-1, keepdim=True) + qk_norm_eps).sqrt() for x in (q, k))
    if temperature is not None:
        attn_scale, floor_scale = temperature
        factors = [1 + attn_scale * math.log1p((p + 1) // floor_scale) for p in positions.tolist()]
        q = q * torch.tensor(factors, dtype=torch.float64)[:, None, None]
    return q, k, v


def bound(x: Tensor) -> Tensor:
    """What fp32 arithmetic may lose: a few roundings of the largest of a head's values."""
    return 2.0**-20 * (x.abs() + x.abs().amax(-1, keepdim=True)) if x.numel() else x


@given(
    tokens=st.sampled_from([0, 1, 5, 33]),
    heads=st.sampled_from([(1, 1, 2), (5, 1, 128), (4, 2, 20), (40, 8, 16)]),
    dtype=st.sampled_from(DTYPES),
    rope=st.sampled_from([None, "interleaved", "halves"]),
    qk_norm_eps=st.sampled_from([None, 1e-5]),
    temperature=st.sampled_from([None, (0.1, 8192), (0.5, 3)]),
    position_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_every_mix_of_steps(backend, tokens, heads, dtype, rope, qk_norm_eps, temperature, position_dtype):
    num_heads, num_kv_heads, head_dim = heads
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    positions = torch.randint(0, 60, (tokens,), dtype=position_dtype)
    options = dict(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        cos_sin=None if rope is None else cos_sin_table(60, head_dim),
        interleaved=rope == "interleaved",
        qk_norm_eps=qk_norm_eps,
        temperature=temperature,
    )
    got = compute(backend, "rope_qk_norm", qkv, positions, **options)
    want = oracle(qkv, positions, **options)
    for result, expected in zip(got, want, strict=True):
        assert result.dtype == dtype and result.is_contiguous()
        assert_within(result, expected, bound(expected))
    assert_same_bits(got[2], qkv[:, (num_heads + num_kv_heads) * head_dim :].reshape(tokens, num_kv_heads, head_dim))


@pytest.mark.parametrize("floor_scale", [8192, 7])
def test_temperature_is_exact_at_far_positions(backend, floor_scale):
    """fp32 holds no odd integer past 16.7 million, and a quotient rounded in fp32 may reach the next floor too early."""
    last = 10_000_000 // floor_scale * floor_scale
    farther = 20_000_000 // floor_scale * floor_scale
    positions = torch.tensor([0, floor_scale - 2, floor_scale - 1, 2_499_999, last - 2, last - 1, 9_999_999, farther - 2])
    qkv = torch.ones(len(positions), 6)
    q, _, _ = compute(backend, "rope_qk_norm", qkv, positions, num_heads=1, num_kv_heads=1, head_dim=2, temperature=(0.1, floor_scale))
    want = [1 + 0.1 * math.log1p((p + 1) // floor_scale) for p in positions.tolist()]
    torch.testing.assert_close(q[:, 0, 0].double(), torch.tensor(want, dtype=torch.float64), rtol=2e-7, atol=0)


def far_rope(position_dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], dict, list[Tensor]]:
    """Arguments at positions up to ten million, and what is to come out. All rows of the table but three are never touched, so that their
    memory is never there."""
    far, near, qkv = [1_000_000, 2_500_000, 9_999_999], cos_sin_table(3, 128), torch.randn(3, 7 * 128)
    table = torch.empty(10_000_000, 128)
    table[far] = near
    options = dict(num_heads=5, num_kv_heads=1, head_dim=128, qk_norm_eps=1e-5)
    q, k, v = oracle(qkv, torch.arange(3), **options, cos_sin=near)
    factors = torch.tensor([1 + 0.1 * math.log1p((position + 1) // 8192) for position in far], dtype=torch.float64)
    arguments = qkv, torch.tensor(far, dtype=position_dtype)
    return arguments, dict(**options, cos_sin=table, temperature=(0.1, 8192)), [q * factors[:, None, None], k, v]


def test_rope_at_far_positions(backend):
    arguments, options, want = far_rope(torch.int32)
    for got, expected in zip(compute(backend, "rope_qk_norm", *arguments, **options), want, strict=True):
        assert_within(got, expected, bound(expected))


def test_rope_and_qk_norm_follow_transformers(backend):
    config = Llama4TextConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5)
    positions, qkv = torch.tensor([0, 1, 77, 8191, 8192]), torch.randn(5, 8 * 32)
    turns = Llama4TextRotaryEmbedding(config)(qkv, positions[None])
    q, k, v = qkv.view(5, 8, 32).split([4, 2, 2], 1)
    norm = Llama4TextL2Norm(config.rms_norm_eps)
    want = [norm(x[0]) for x in apply_rotary_emb(q[None], k[None], turns)]
    table = torch.zeros(8193, 32)
    table[positions] = torch.cat([turns[0].real, turns[0].imag], 1)
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=32)
    got = compute(backend, "rope_qk_norm", qkv, positions, **sizes, cos_sin=table, interleaved=True, qk_norm_eps=1e-5)
    for result, expected in zip(got[:2], want, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2], v, rtol=0, atol=0)


@pytest.mark.parametrize("with_map", [None, torch.int32, torch.int64])
@pytest.mark.parametrize(("cache_dtype", "with_scale"), [(torch.bfloat16, False), (torch.float32, False), (FP8, False), (FP8, True)])
def test_cache_write(backend, cache_dtype, with_scale, with_map):
    num_heads, num_kv_heads, head_dim, pages, page_size = 4, 2, 20, 5, 3
    qkv, positions = 4 * torch.randn(6, 8 * 20), torch.arange(6)
    slots, mapped = torch.tensor([14, -1, 0, 7, 3, 9]), torch.tensor([14, -1, 0, 7, 3, 9])
    slot_map = None
    if with_map is not None:
        slot_map = torch.randperm(15).to(with_map)
        slot_map[7] = -1
        mapped = torch.where(slots < 0, -1, slot_map[slots].long())
    before = torch.randn(pages, page_size, num_kv_heads, head_dim).to(cache_dtype)
    k_cache, v_cache = before.clone(), before.clone()
    scales = {"k_scale": torch.tensor(0.013), "v_scale": torch.tensor([0.02])} if with_scale else {}
    options = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, cos_sin=cos_sin_table(6, head_dim), qk_norm_eps=1e-5)
    caches = dict(k_cache=k_cache, v_cache=v_cache, slots=slots, slot_map=slot_map)
    q = compute(backend, "rope_qk_norm", qkv, positions, **options, **caches, **scales)
    want_q, want_k, want_v = oracle(qkv, positions, **options)
    assert_within(q, want_q, bound(want_q))

    written = mapped >= 0
    others = [slot for slot in range(pages * page_size) if slot not in mapped.tolist()]
    for cache, want, scale in ((k_cache, want_k, scales.get("k_scale")), (v_cache, want_v, scales.get("v_scale"))):
        rows, want = cache.flatten(0, 1), want[written]
        got = rows[mapped[written]]
        assert_same_bits(rows[others], before.flatten(0, 1)[others])
        if cache_dtype != FP8:
            assert_within(got, want, bound(want))
            continue
        codes = want / (1 if scale is None else scale.double())
        # Where k / k_scale lies within fp32's error of the middle of two codes, either is right.
        lower, upper = e4m3((codes - bound(codes)).float()), e4m3((codes + bound(codes)).float())
        assert ((lower <= got.double()) & (got.double() <= upper)).all()


@pytest.mark.parametrize("map_dtype", [torch.int32, torch.int64])
def test_an_empty_map_of_slots_where_no_token_is_written(backend, map_dtype):
    caches = dict(zip(("k_cache", "v_cache"), torch.randn(2, 3, 4, 2, 20)))
    before = [cache.clone() for cache in caches.values()]
    options = dict(num_heads=4, num_kv_heads=2, head_dim=20, cos_sin=cos_sin_table(3, 20))
    qkv, positions = torch.randn(3, 8 * 20), torch.arange(3)
    q = compute(backend, "rope_qk_norm", qkv, positions, **options, **caches, slots=torch.full((3,), -1), slot_map=torch.empty(0, dtype=map_dtype))
    assert_same_bits(list(caches.values()), before)
    want, _, _ = oracle(qkv, positions, **options)
    assert_within(q, want, bound(want))


def assert_a_slot_named_twice_holds_one_of_its_tokens(op: Callable, cache_dtype: torch.dtype) -> None:
    """Element by element, in a slot of two tokens and in one of sixty. op: writes to the caches that it is given."""
    qkv, positions = torch.randn(64, 9 * 20), torch.arange(64)
    options = dict(num_heads=5, num_kv_heads=2, head_dim=20, cos_sin=cos_sin_table(64, 20), qk_norm_eps=1e-5)

    def caches_after(slots: Tensor) -> list[Tensor]:
        caches = [torch.zeros(16, 4, 2, 20).to(cache_dtype) for _ in range(2)]
        op(qkv, positions, **options, k_cache=caches[0], v_cache=caches[1], slots=slots)
        return [cache.flatten(0, 1).float() for cache in caches]

    slots = torch.tensor([3, 3, 5, *[7] * 60, -1])
    for apart, together in zip(caches_after(torch.arange(64)), caches_after(slots), strict=True):
        for slot in (3, 5, 7):
            assert (together[slot] == apart[slots == slot]).any(0).all()
        assert together.any(-1).any(-1).nonzero().flatten().tolist() == [3, 5, 7]


@pytest.mark.small
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32, FP8])
def test_a_slot_named_twice_holds_one_of_its_tokens(backend, cache_dtype):
    assert_a_slot_named_twice_holds_one_of_its_tokens(partial(compute, backend, "rope_qk_norm"), cache_dtype)


def test_fp8_caches_saturate(backend):
    k_cache, v_cache = torch.zeros(1, 1, 1, 2).to(FP8), torch.zeros(1, 1, 1, 2).to(FP8)
    qkv = torch.tensor([[0.0, 0.0, 1000.0, -1000.0, 449.0, -2.0]])
    compute(backend, "rope_qk_norm", qkv, torch.tensor([0]), num_heads=1, num_kv_heads=1, head_dim=2, k_cache=k_cache, v_cache=v_cache,
            slots=torch.tensor([0]))  # fmt: skip
    assert k_cache.float().flatten().tolist() == [448, -448]
    assert v_cache.float().flatten().tolist() == [448, -2]


@pytest.mark.small
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_gives_the_same_bits_twice(backend, cache_dtype):
    cache = torch.zeros(5, 16, 1, 128).to(cache_dtype)
    options = dict(num_heads=5, num_kv_heads=1, head_dim=128, cos_sin=cos_sin_table(64, 128), qk_norm_eps=1e-5,
                   k_cache=cache, v_cache=cache.clone(), slots=torch.arange(64))  # fmt: skip
    qkv, positions = torch.randn(64, 7 * 128).bfloat16(), torch.arange(64)
    assert_same_bits(*(compute(backend, "rope_qk_norm", qkv, positions, **options) for _ in range(2)))


@pytest.mark.parametrize(
    ("cache_dtype", "with_map"), [(None, False), (torch.bfloat16, False), (torch.bfloat16, True), (FP8, False), (FP8, True)]
)
def test_replays_in_a_cuda_graph(graph_backend, cache_dtype, with_map):
    tokens = 64 if device_of(graph_backend).type == "cuda" else 8

    def given(written: float) -> tuple[tuple, dict]:
        options = dict(num_heads=5, num_kv_heads=1, head_dim=128, cos_sin=cos_sin_table(64, 128), qk_norm_eps=1e-5)
        if cache_dtype is not None:
            slots = torch.where(torch.rand(tokens) < written, torch.randperm(5 * 16)[:tokens], -1)
            options |= dict(zip(("k_cache", "v_cache"), torch.randn(2, 5, 16, 1, 128).to(cache_dtype)), slots=slots)
            options |= {"slot_map": torch.randperm(5 * 16)} if with_map else {}
            options |= {"k_scale": torch.rand(()), "v_scale": torch.rand(1)} if cache_dtype == FP8 else {}
        return (torch.randn(tokens, 7 * 128).bfloat16(), torch.randint(0, 64, (tokens,))), options

    assert_replays(graph_backend, "rope_qk_norm", given(written=1.0), given(written=0.5))


@pytest.mark.parametrize("cache_dtype", [None, torch.float32, FP8])
def test_opcheck(backend, cache_dtype):
    options = dict(num_heads=4, num_kv_heads=2, head_dim=8, cos_sin=torch.randn(9, 8), interleaved=True, qk_norm_eps=1e-5,
                   temperature=(0.1, 8192))  # fmt: skip
    if cache_dtype is not None:
        cache = torch.zeros(3, 4, 2, 8).to(cache_dtype)
        options |= dict(k_cache=cache, v_cache=cache.clone(), slots=torch.arange(7) - 1, slot_map=torch.arange(12))
        options |= dict.fromkeys(("k_scale", "v_scale"), torch.tensor(0.5)) if cache_dtype == FP8 else {}
    assert_passes_opcheck(backend, "rope_qk_norm", torch.randn(7, 64), torch.arange(7), **options)


CACHE = torch.zeros(2, 4, 1, 8)
WITH_CACHE = dict(k_cache=CACHE, v_cache=CACHE.clone(), slots=torch.tensor([0, 1, 2]))
WITH_FP8_CACHE = WITH_CACHE | dict(k_cache=CACHE.to(FP8), v_cache=CACHE.to(FP8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": torch.ones(3, 32).half()}, TypeError, "qkv has dtype float16, needs bfloat16 or float32"),
        ({"qkv": torch.ones(3, 33)}, ValueError, r"qkv has shape \[3, 33\], needs \[T, 32\]"),
        ({"qkv": torch.ones(32, 3).t()}, ValueError, "qkv has strides"),
        ({"num_heads": 0}, ValueError, "num_heads is 0, needs an int of at least 1"),
        ({"num_heads": 2**63}, ValueError, f"num_heads is {2**63}, needs an int of at least 1, at most {2**63 - 1}"),
        ({"num_heads": 2.0}, TypeError, "num_heads is 2.0, needs an int of at least 1"),
        ({"num_heads": True}, TypeError, "num_heads is True, needs an int of at least 1"),
        ({"num_kv_heads": "1"}, TypeError, "num_kv_heads is '1', needs an int of at least 1"),
        ({"interleaved": 1}, TypeError, "interleaved is 1, needs True or False"),
        ({"qk_norm_eps": "1e-5"}, TypeError, "qk_norm_eps is '1e-5', needs a finite float of at least 0"),
        ({"qk_norm_eps": True}, TypeError, "qk_norm_eps is True, needs a finite float of at least 0"),
        ({"qk_norm_eps": -1.0}, ValueError, "qk_norm_eps is -1.0, needs a finite float of at least 0"),
        ({"qk_norm_eps": float("nan")}, ValueError, "qk_norm_eps is nan, needs a finite float of at least 0"),
        ({"head_dim": 7}, ValueError, "head_dim is 7, needs to be even"),
        ({"positions": torch.arange(4)}, ValueError, r"positions has shape \[4\], needs \[3\]"),
        ({"positions": torch.ones(3)}, TypeError, "positions has dtype float32, needs int32 or int64"),
        ({"positions": torch.arange(3, device="meta")}, ValueError, "positions is on meta, needs cpu"),
        ({"positions": torch.tensor([0, 9, 1])}, ValueError, "positions holds values from 0 to 9, needs 0 to 8, the 9 rows of cos_sin"),
        ({"positions": torch.tensor([0, -1, 1])}, ValueError, "positions holds values from -1 to 1, needs 0 to 8"),
        ({"positions": torch.tensor([0, -1, 1]), "cos_sin": None, "temperature": (0.1, 4)}, ValueError, "positions holds values from -1"),
        ({"cos_sin": torch.ones(9, 4)}, ValueError, r"cos_sin has shape \[9, 4\], needs \[max_position, 8\]"),
        ({"cos_sin": torch.ones(9, 8).bfloat16()}, TypeError, "cos_sin has dtype bfloat16, needs float32"),
        ({"temperature": (0.1, 0)}, ValueError, "floor_scale of temperature is 0, needs an int of at least 1"),
        ({"temperature": (0.1, 2**63)}, ValueError, f"floor_scale of temperature is {2**63}, needs an int of at least 1, at most {2**63 - 1}"),
        ({"temperature": (0.1, 8192.0)}, TypeError, "floor_scale of temperature is 8192.0, needs an int of at least 1"),
        ({"temperature": (0.1, True)}, TypeError, "floor_scale of temperature is True, needs an int of at least 1"),
        ({"temperature": (float("inf"), 8)}, ValueError, "attn_scale of temperature is inf, needs a finite float"),
        ({"temperature": 0.1}, TypeError, r"temperature is 0.1, needs \(attn_scale, floor_scale\)"),
        ({"temperature": (0.1, 8, 9)}, ValueError, r"temperature is \(0.1, 8, 9\), needs \(attn_scale, floor_scale\)"),
        ({"temperature": ("0.1", 8)}, TypeError, "attn_scale of temperature is '0.1', needs a finite float"),
        ({"k_cache": CACHE}, ValueError, "v_cache is None, needs a Tensor: k_cache, v_cache and slots go together"),
        ({"slots": torch.arange(3)}, ValueError, "k_cache is None, needs a Tensor"),
        ({"k_scale": torch.ones(())}, ValueError, "k_scale is given without k_cache and v_cache, needs them"),
        ({"slot_map": torch.arange(3)}, ValueError, "slot_map is given without k_cache and v_cache, needs them"),
        (WITH_CACHE | {"k_cache": CACHE[:, :, 0]}, ValueError, r"k_cache has shape \[2, 4, 8\], needs \[pages, page_size, 1, 8\]"),
        (WITH_CACHE | {"k_cache": CACHE[:, :0], "v_cache": CACHE[:, :0]}, ValueError, r"k_cache has shape \[2, 0, 1, 8\], needs a page_size"),
        (WITH_CACHE | {"k_cache": CACHE.half()}, TypeError, "k_cache has dtype float16, needs bfloat16 or float32 or float8_e4m3fn"),
        (WITH_CACHE | {"v_cache": CACHE.bfloat16()}, TypeError, "v_cache has dtype bfloat16, needs float32"),
        (WITH_CACHE | {"v_cache": torch.zeros(4, 2, 1, 8).transpose(0, 1)}, ValueError, "v_cache has strides"),
        (WITH_CACHE | {"k_cache": CACHE, "v_cache": CACHE}, ValueError, "v_cache shares memory with k_cache, needs its own: both are written"),
        (WITH_CACHE | {"k_cache": CACHE[:1], "v_cache": CACHE.view(8, 1, 1, 8)[3:7].view(1, 4, 1, 8)}, ValueError, "v_cache shares memory"),
        (WITH_CACHE | {"v_scale": torch.ones(())}, ValueError, "v_scale is given with a float32 cache, needs to be None"),
        (WITH_FP8_CACHE | {"k_scale": torch.ones(2)}, ValueError, r"k_scale has shape \[2\], needs \[\] or \[1\] per tensor"),
        (WITH_FP8_CACHE | {"k_scale": torch.tensor(-1.0)}, ValueError, "k_scale holds values from -1 to -1, needs finite ones of at least 0"),
        (WITH_FP8_CACHE | {"v_scale": torch.tensor([float("nan")])}, ValueError, "v_scale holds values from nan to nan, needs finite ones"),
        (WITH_CACHE | {"slots": torch.arange(3).int()}, TypeError, "slots has dtype int32, needs int64"),
        (WITH_CACHE | {"slots": torch.tensor([0, 1, 8])}, ValueError, "slots holds values from 0 to 8, needs -1 to 7, .* 2 pages of 4"),
        (WITH_CACHE | {"slots": torch.tensor([0, 1, -2])}, ValueError, "slots holds values from -2 to 1, needs -1 to 7"),
        (WITH_CACHE | {"slot_map": torch.tensor([0, 1])}, ValueError, "slots holds values from 0 to 2, needs -1 to 1"),
        (WITH_CACHE | {"slot_map": torch.tensor([0, 1, 8])}, ValueError, "slot_map holds values from 0 to 8, needs -1 to 7"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, error, message):
    arguments = dict(qkv=torch.ones(3, 32), positions=torch.arange(3), num_heads=2, num_kv_heads=1, head_dim=8, cos_sin=torch.ones(9, 8))
    with pytest.raises(error, match=f"^rope_qk_norm: {message}"):
        ops.rope_qk_norm(**(arguments | changes))


def test_numbers_of_numpy_are_taken():
    arguments = dict(num_heads=1, num_kv_heads=1, head_dim=4, qk_norm_eps=0.5, temperature=(0.5, 8))
    as_numpy = dict(num_heads=np.int64(1), num_kv_heads=np.int32(1), head_dim=np.int64(4), qk_norm_eps=np.float32(0.5))
    qkv, positions = torch.randn(2, 12), torch.arange(2)
    ours = ops.rope_qk_norm(qkv, positions, **as_numpy, temperature=(np.float32(0.5), np.int64(8)))
    assert all(map(torch.equal, ours, ops.rope_qk_norm(qkv, positions, **arguments)))
