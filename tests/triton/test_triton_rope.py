"""The RoPE kernel against the reference, in every combination of its steps."""

from __future__ import annotations

import pytest
import torch
from cases import few_examples, generator, same_bits
from guards import Guarded
from hypothesis import given
from hypothesis import strategies as st

from llama4_kernels.reference.rope import rope_qk_norm as reference
from llama4_kernels.triton.rope import rope_qk_norm

pytestmark = pytest.mark.triton

FP8 = torch.float8_e4m3fn
MAX_POSITION = 64


def arguments(tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, **given) -> dict:
    random = generator(tokens)
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=random)
    angles = torch.rand(MAX_POSITION, head_dim // 2, generator=random) * 6
    steps = dict(
        cos_sin=torch.cat([angles.cos(), angles.sin()], 1) if given.pop("rope", True) else None,
        qk_norm_eps=1e-5 if given.pop("norm", True) else None,
        temperature=(0.1, 7) if given.pop("temperature", False) else None,
    )
    heads = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return dict(qkv=qkv.to(dtype), positions=torch.randint(MAX_POSITION, (tokens,), generator=random)) | heads | steps | given


def caches(tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int = 4, mapped: bool = False) -> dict:
    """Paged caches with room for all tokens, every third of which is not to be written."""
    pages = -(-tokens // page_size) + 2
    slots = torch.randperm(pages * page_size, generator=generator(1))[:tokens]
    slots[::3] = -1
    k_cache, v_cache = torch.randn(2, pages, page_size, num_kv_heads, head_dim, generator=generator(2)).to(dtype)
    scales = dict(k_scale=torch.tensor([0.01]), v_scale=torch.tensor(0.5)) if dtype == FP8 else {}
    if mapped:
        scales["slot_map"] = torch.randperm(pages * page_size, generator=generator(3)).to(torch.int32)
        scales["slot_map"][slots[1]] = -1
    return dict(k_cache=k_cache, v_cache=v_cache, slots=slots) | scales


def run(given: dict, device: torch.device) -> list[torch.Tensor]:
    """What the call returns and the caches after it."""
    with Guarded() as guarded:
        given = {name: guarded(value.to(device)) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        result = rope_qk_norm(given.pop("qkv"), given.pop("positions"), **given)
    return list(result) if given.get("k_cache") is None else [result, given["k_cache"], given["v_cache"]]


def expect(given: dict) -> list[torch.Tensor]:
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    result = reference(given.pop("qkv"), given.pop("positions"), **given)
    return list(result) if given.get("k_cache") is None else [result, given["k_cache"], given["v_cache"]]


def check(given: dict, device: torch.device) -> None:
    """Each value is the reference's, or, once in a hundred, its neighbour in that dtype, where the two fp32 results round apart."""
    for got, expected in zip(run(given, device), expect(given), strict=True):
        step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, FP8: 2**-3}[expected.dtype]
        torch.testing.assert_close(got.float().cpu(), expected.float(), rtol=step, atol=2e-6)
        if expected.dtype != torch.float32:
            assert (got.cpu() != expected).sum() <= 0.01 * expected.numel()


@given(st.integers(0, 20), st.sampled_from([(5, 1), (4, 2), (3, 3)]), st.sampled_from([2, 6, 16]), st.booleans(), st.booleans(), st.booleans(), st.booleans())
@few_examples
def test_steps(device, tokens, heads, head_dim, rope, norm, temperature, interleaved):
    given = arguments(tokens, *heads, head_dim, torch.float32, rope=rope, norm=norm, temperature=temperature, interleaved=interleaved)
    check(given, device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_shape_of_scout_per_rank(device, interleaved, norm):
    check(arguments(7, 5, 1, 128, torch.bfloat16, interleaved=interleaved, norm=norm), device)


@pytest.mark.parametrize("dtype, kv_dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8), (torch.float32, torch.float32), (torch.float32, FP8)])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
def test_caches(device, dtype, kv_dtype, mapped, page_size):
    given = arguments(13, 5, 2, 16, dtype) | caches(13, 2, 16, kv_dtype, page_size, mapped)
    check(given, device)
    before, after = given["v_cache"].flatten(0, 1), run(given, device)[2].cpu().flatten(0, 1)
    slots = given["slots"][given["slots"] >= 0]
    written = (given["slot_map"][slots] if mapped else slots).tolist()
    untouched = [slot for slot in range(len(before)) if slot not in written]
    assert len(untouched) < len(before) and same_bits(after[untouched], before[untouched])


def test_fp8_cache_saturates(device):
    given = arguments(4, 1, 1, 16, torch.float32, norm=False) | caches(4, 1, 16, FP8)
    given["qkv"] *= 1e4
    check(given, device)
    assert run(given, device)[1].float().abs().max() == 448


def test_nan_stays_in_its_row(device):
    given = arguments(5, 2, 1, 16, torch.float32)
    given["qkv"][2, 0] = torch.nan
    got, expected = run(given, device)[0], expect(given)[0]
    assert got[2, 0].isnan().all() and got[[0, 1, 3, 4]].isfinite().all() and got[2, 1].isfinite().all()
    torch.testing.assert_close(got.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_temperature_around_its_steps(device, dtype):
    floor_scale = 8192
    positions = torch.tensor([step * floor_scale + by for step in (1, 2, 122, 305, 1220) for by in (-2, -1, 0)], dtype=dtype)
    given = arguments(len(positions), 1, 1, 16, torch.float32, rope=False, norm=False) | dict(positions=positions, temperature=(0.1, floor_scale))
    check(given, device)
    ratio = run(given, device)[0].cpu() / given["qkv"].view(-1, 3, 16)[:, :1]
    steps = (ratio[:, 0].median(-1).values.double() - 1).div(0.1).exp().sub(1)
    torch.testing.assert_close(steps, ((positions + 1) // floor_scale).double(), rtol=1e-4, atol=1e-4)


def test_same_bits_again(device):
    given = arguments(9, 5, 1, 128, torch.bfloat16) | caches(9, 1, 128, FP8)
    assert all(same_bits(a, b) for a, b in zip(run(given, device), run(given, device)))
