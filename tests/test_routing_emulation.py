"""csrc/routing.cu itself, built for the host and called through llama4_kernels/cuda/routing.py, between guard bytes, against the reference."""

from __future__ import annotations

import emulation
import planted
import pytest
import torch
from guards import Guarded
from torch import Tensor

from backends import assert_same_bits
from llama4_kernels.reference import routing as reference

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

BF16, FP32 = torch.bfloat16, torch.float32
PLANTED = {
    "ties to the highest index": ("routing_key.cuh", "(~0u - unsigned(expert))", "unsigned(expert)"),
    "a rank's sums left out": ("routing_fp32.cuh", "for (int from = «0»; from < FP32_RANKS; ++from) logit +=", "1"),
    "the cluster not waited for": ("routing_fp32.cuh", "shared.largest[thread] = most;\n        }\n        «hopper::cluster_sync();»", ""),
    "ticket not given back": (
        "routing_sort.cuh", "«is_last_ticket(tickets, blocks)»;", "hopper::add_acquire_release(tickets, 1) == blocks - 1"
    ),
    "order not stable": ("routing_sort.cuh", "expert * ROUTE_FEW_TOKENS + «token»;", "ROUTE_FEW_TOKENS - 1 - token"),
    "many tokens' order not stable": ("routing_sort.cuh", "__popc(peers[i] & ((1u << lane) - 1))", "__popc(peers[i] >> lane >> 1)"),
    "all warps count in one place": ("routing_sort.cuh", "«counts + warp * bins»;", "counts"),
    "a bit of the experts left out": ("routing_sort.cuh", "«bit <= a.experts»; bit", "bit < 8"),
    "equal experts of a warp counted once": ("routing_sort.cuh", "own[ids[i]] = place + __popc(peers[i]);", "own[ids[i]] = place + 1;"),
    "the last expert left out": ("routing_fp32.cuh", "if (lane < SLICE_EXPERTS && «expert < a.experts»)", "expert < a.experts - 1"),
    "quotients not corrected": ("routing_codes.cuh", "quotient(value, scale, reciprocal)", "value * reciprocal"),
    "barrier left out": ("routing_fp32.cuh", "value % WARP_EXPERTS] = sum;\n        }«»", "if (lane) __syncthreads();"),
}  # fmt: skip
PLANTED_ON_TENSOR_CORES = {  # in routing_wgmma.cuh
    "a rank's sums left out": ("for (int from = «0»; from < Shape::RANKS; ++from) {", "1"),
    "a rank's magnitudes left out": ("from < «Shape::RANKS»; ++from) most", "Shape::RANKS - 1"),
    "another slice of the router": ("load_router(shared, at, router, «first_column + step * Shape::STEP»);\n            }", "step * Shape::STEP"),
    "x not waited for": ("«shared.x_full[step].wait(0);»\n        shared.pipeline", ""),
    "the router not waited for": ("shared.pipeline.wait_until_full(at);", ""),
    "a stage given back too early": ("hopper::wgmma_wait<1>();", ""),
    "a stage filled before it is given back": ("shared.pipeline.wait_until_empty(at);", ""),
    "the cluster not waited for": ("hopper::cluster_sync();", "__syncthreads();"),
    "the magnitudes of half the columns": ("most = max(most, __shfl_xor_sync(ALL_LANES, most, WARP_TOKENS));", ""),
    "the scale of another row": ("divide_by(shared.scale[«token»]", "token ^ 1"),
    "codes of tokens past the last": ("min(Shape::TOKENS, «a.tokens - first_token»)", "a.tokens - first_token + 1"),
    "codes of columns past the last": ("if (column >= a.hidden) return;", ""),
    "experts past the last": ("if («expert + i < experts») best", "true"),
}  # fmt: skip
PLANTED_WITH_FEW_TOKENS = {  # in routing_few.cuh
    "a part left out": ("for (int i = «0»; i < Shape::PARTS; ++i) {", "1"),
    "the parts not waited for": ("shared.parts_full.wait(0);", ""),
    "the keys not waited for": ("shared.keys_full.wait(0);", ""),
    "a tile not waited for": ("shared.full[step].wait(0);", ""),
    "no barrier of the cluster": ("hopper::cluster_arrive_relaxed();", ""),
    "both warpgroups' parts in one place": ("shared.parts[«rank * Shape::GROUPS + group»]", "rank * Shape::GROUPS"),
    "parts to another block": ("store_async(part, «token / Shape::OWN_TOKENS»,", "token / Shape::OWN_TOKENS ^ 1"),
    "another slice of the router": ("expert = «slice * Shape::LOGITS + row»;", "row"),
    "columns past the last": ("valid = «step < steps_inside»;", "true"),
    "experts past the last": ("if («expert < experts») best", "true"),
    "a ticket too many": ("shared.is_last, «owners * problem.slices»", "owners * problem.slices + 1"),
    "codes of tokens past the last": ("} else if («token < a.tokens») {", "token <= a.tokens"),
    "the magnitudes of half the columns": ("«max(most & 0xffffu, most >> 16)»", "most & 0xffffu"),
    "a warp's magnitude left out": ("for (int i = «0»; i < Shape::WARPS; ++i) most", "1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    return emulation.load(emulation.build())


@pytest.fixture(scope="module")
def module(kernels):
    return emulation.op_module("routing", kernels)


@pytest.fixture(scope="module")
def op(module):
    return module.route_top1


def run(op, x: Tensor, router: Tensor, **options):
    with Guarded() as guarded:
        return op(guarded(x), guarded(router), **options)


def integers(*shape: int, dtype=FP32) -> Tensor:
    """Numbers whose sums of products are exact, with many ties."""
    return torch.randint(-1, 2, shape).to(dtype)


def assert_like_reference(op, x: Tensor, router: Tensor) -> None:
    """For exact logits."""
    (got, codes), (want, want_codes) = run(op, x, router, quantize=True), reference.route_top1(x, router, quantize=True)
    assert_same_bits([got.expert_ids, got.order, got.offsets], [want.expert_ids, want.order, want.offsets])
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-6, atol=0)
    assert_same_bits([codes.codes, codes.scale], [want_codes.codes, want_codes.scale])
    alone, none = run(op, x, router)
    assert none is None
    assert_same_bits(alone, got)


@pytest.mark.parametrize("experts", [1, 16, 17, 128])
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 65])
def test_sizes(op, tokens, experts):
    assert_like_reference(op, integers(tokens, 160, dtype=BF16), integers(experts, 160, dtype=BF16))


def assert_sorted(op, x: Tensor, router: Tensor) -> None:
    (got, _), (want, _) = run(op, x, router), reference.route_top1(x, router)
    assert_same_bits([got.expert_ids, got.order, got.offsets], [want.expert_ids, want.order, want.offsets])


MANY = [(65, 16), (65, 200), (127, 1), (127, 128), (128, 16), (128, 200), (300, 1), (300, 16), (300, 128), (1000, 1), (1000, 16)]


@pytest.mark.parametrize(("tokens", "experts"), [*MANY, (400, 200)])
def test_many_tokens_are_sorted(op, tokens, experts):
    assert_sorted(op, integers(tokens, 8), integers(experts, 8))


def test_counts_that_need_more_memory_than_the_rows(op):
    assert_sorted(op, integers(70, 1028), integers(256, 1028))


def test_many_tokens_are_sorted_alike_again(op):
    x, router = integers(300, 8), integers(16, 8)
    first, _ = run(op, x, router)
    for _ in range(3):
        assert_same_bits(run(op, x, router)[0], first)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("hidden", [1, 17, 128, 1028, 5120])
def test_columns(op, hidden, dtypes):
    assert_like_reference(op, integers(3, hidden, dtype=dtypes[0]), integers(20, hidden, dtype=dtypes[1]))


def test_addresses_off_16_bytes(op):
    x, router = integers(2 * 64 + 1, dtype=BF16)[1:].view(2, 64), integers(16 * 64 + 1, dtype=BF16)[1:].view(16, 64)
    got, _ = op(x, router)
    assert_same_bits([got.expert_ids], [reference.route_top1(x, router)[0].expert_ids])


def test_all_experts_equal(op):
    x, router = torch.randn(9, 200), torch.randn(1, 200).expand(128, 200).contiguous()
    assert run(op, x, router)[0].expert_ids.tolist() == [0] * 9


def test_all_tokens_on_one_expert(op):
    router = -torch.ones(128, 32)
    router[77] = 1
    for tokens in (64, 65, 300):
        routing, _ = run(op, torch.ones(tokens, 32), router)
        assert routing.expert_ids.tolist() == [77] * tokens and routing.order.tolist() == list(range(tokens))


def test_random_logits(op):
    x, router = torch.randn(40, 320), torch.randn(48, 320)
    (got, codes), (want, want_codes) = run(op, x, router, quantize=True), reference.route_top1(x, router, quantize=True)
    assert_same_bits([got.expert_ids, got.order, got.offsets, codes.codes], [want.expert_ids, want.order, want.offsets, want_codes.codes])
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=0)
    assert_same_bits(run(op, x, router, quantize=True), (got, codes))


@pytest.mark.parametrize(("tokens", "dtype"), [(9, FP32), (9, BF16), (70, FP32), (70, BF16)], ids=str)
def test_a_row_of_nan_touches_no_other_row(op, tokens, dtype):
    x, router = torch.randn(tokens, 64).to(dtype), torch.randn(16, 64).to(dtype)
    spoilt = x.clone()
    spoilt[[2, 8], 5] = float("nan")
    (clean, clean_codes), (routing, codes) = run(op, x, router, quantize=True), run(op, spoilt, router, quantize=True)
    others = [row for row in range(tokens) if row not in (2, 8)]
    for got, want in ((routing.scores, clean.scores), (routing.expert_ids, clean.expert_ids), (codes.codes, clean_codes.codes)):
        assert_same_bits(got[others], want[others])
    assert routing.scores[[2, 8]].isnan().all() and codes.scale[[2, 8]].isnan().all()
    assert 0 <= routing.expert_ids.min() and routing.expert_ids.max() < 16
    assert sorted(routing.order.tolist()) == list(range(tokens)) and int(routing.offsets[-1]) == tokens


ALL_PLANTED = PLANTED | {f"{name} (tensor cores)": ("routing_wgmma.cuh", *bug) for name, bug in PLANTED_ON_TENSOR_CORES.items()}
ALL_PLANTED |= {f"{name} (few tokens)": ("routing_few.cuh", *bug) for name, bug in PLANTED_WITH_FEW_TOKENS.items()}


def op_with(bug: str | None):
    torch.manual_seed(0)
    return emulation.op_module("routing", planted.kernels(ALL_PLANTED, bug)).route_top1


def assert_right(op) -> None:
    for x in (torch.ones(7, 1100), integers(7, 1100), torch.zeros(7, 1100)):
        assert_like_reference(op, x, integers(20, 1100) / 16)
    assert_sorted(op, integers(300, 8), integers(16, 8))


@pytest.mark.parametrize("bug", [bug for bug in PLANTED if bug != "quotients not corrected"])
def test_planted_bugs_are_noticed(bug):
    op = op_with(bug)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right(op)


# ---- on the tensor cores: more than 64 tokens, all of bfloat16

THREADS = 288  # of a block that multiplies on them


def offset(tensor: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 4."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize(
    ("x", "router", "on_tensor_cores"),
    [
        (integers(65, 8, dtype=BF16), integers(1, 8, dtype=BF16), True),
        (integers(65, 10240, dtype=BF16), integers(16, 10240, dtype=BF16), True),
        (integers(65, 10248, dtype=BF16), integers(16, 10248, dtype=BF16), False),
        (integers(64, 64, dtype=BF16), integers(16, 64, dtype=BF16), False),
        (integers(65, 68, dtype=BF16), integers(16, 68, dtype=BF16), False),
        (integers(65, 63, dtype=BF16), integers(16, 63, dtype=BF16), False),
        (offset(integers(65, 64, dtype=BF16)), integers(16, 64, dtype=BF16), False),
        (integers(65, 64, dtype=BF16), offset(integers(16, 64, dtype=BF16)), False),
        (integers(65, 64), integers(16, 64, dtype=BF16), False),
        (integers(65, 64, dtype=BF16), integers(16, 64), False),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else str(value),
)
def test_which_multiply_on_tensor_cores(kernels, op, x, router, on_tensor_cores):
    (launch,) = kernels.launches_of(lambda: op(x, router), 132)
    assert (launch["threads"] == THREADS) == on_tensor_cores
    (got, codes), (want, want_codes) = op(x, router, quantize=True), reference.route_top1(x, router, quantize=True)
    assert_same_bits([got.expert_ids, got.order, codes.codes], [want.expert_ids, want.order, want_codes.codes])


SMALL = [(65, 1, 64), (65, 17, 72), (128, 16, 136), (129, 128, 640), (65, 256, 72), (300, 16, 64), (300, 200, 136)]
LARGE = [(65, 128, 5120), (128, 16, 5120)]


@pytest.mark.parametrize(("tokens", "experts", "hidden"), [*SMALL, *LARGE])
def test_exact_logits_on_tensor_cores(op, tokens, experts, hidden):
    assert_like_reference(op, integers(tokens, hidden, dtype=BF16), integers(experts, hidden, dtype=BF16))


@pytest.mark.parametrize(("tokens", "experts", "hidden"), [(129, 128, 640), (65, 200, 5120), (300, 16, 72)])
def test_random_logits_on_tensor_cores(op, tokens, experts, hidden):
    x, router = torch.randn(tokens, hidden).to(BF16), (torch.randn(experts, hidden) / hidden**0.5).to(BF16)
    got, codes = run(op, x, router, quantize=True)
    logits = x.double() @ router.double().t()
    ids = got.expert_ids.long()
    chosen = logits.gather(1, ids[:, None])[:, 0]
    assert (logits.amax(1) - chosen < 1e-4).all()
    torch.testing.assert_close(got.scores, chosen.sigmoid().float(), rtol=1e-5, atol=0)
    assert_same_bits([got.order, got.offsets[1:]], [ids.argsort(stable=True).int(), ids.bincount(minlength=experts).cumsum(0).int()])
    want = reference.route_top1(x, router, quantize=True)[1]
    assert_same_bits([codes.codes, codes.scale], [want.codes, want.scale])
    assert_same_bits(run(op, x, router, quantize=True), (got, codes))


def test_equal_experts_tie_on_tensor_cores(op):
    x, router = torch.randn(65, 328).to(BF16), torch.randn(20, 328).to(BF16)
    ids = run(op, x, router)[0].expert_ids
    assert_same_bits([run(op, x, router.repeat_interleave(2, 0))[0].expert_ids], [2 * ids])
    assert_same_bits([run(op, x, router.repeat(10, 1))[0].expert_ids], [ids])


def test_logits_below_zero_on_tensor_cores(op):
    assert_like_reference(op, torch.ones(65, 64, dtype=BF16), integers(20, 64, dtype=BF16) - 2)


def bfloat16_rows() -> Tensor:
    """Rows with each of bfloat16's 128 mantissas as their largest magnitude, in turns in each eighth of the columns, over each mantissa in
    20 powers of two below; rows of many exponents."""
    mantissas = torch.arange(128, 256) / 128
    values = (mantissas * 2.0 ** -torch.arange(20.0)[:, None]).flatten() * torch.tensor([1.0, -1.0]).repeat(64 * 20)
    rows = torch.minimum(values, mantissas[:, None]).maximum(-mantissas[:, None])
    rows = torch.stack([row.roll(len(values) // 8 * i) for i, row in enumerate(rows)])
    return (rows * 2.0 ** torch.randint(-60, 60, (128, 1))).to(BF16)


def test_codes_are_those_of_a_division(op):
    extremes = torch.tensor([[1e38, 3e38, -1e20, 1e-38], [1e-38, 1e-39, 1e-40, 0], [0, 0, 0, 0]], dtype=BF16)
    for x in (bfloat16_rows(), extremes.repeat(30, 4)):
        (_, got), (_, want) = (each(x, torch.ones_like(x[:1]), quantize=True) for each in (op, reference.route_top1))
        assert_same_bits([got.codes, got.scale], [want.codes, want.scale])
    infinite = torch.tensor([float("inf"), 1, -1, 0]).to(BF16).repeat(65, 2)
    assert op(infinite, infinite[:1], quantize=True)[1].codes.float().nan_to_num(7).unique(dim=0).tolist() == [[7, 0, 0, 0] * 2]


def assert_right_on_tensor_cores(op) -> None:
    for experts, hidden in ((17, 1800), (16, 5120), (20, 72)):
        assert_like_reference(op, integers(70, hidden, dtype=BF16), integers(experts, hidden, dtype=BF16))
    test_logits_below_zero_on_tensor_cores(op)
    test_codes_are_those_of_a_division(op)


@pytest.mark.parametrize("bug", [*(f"{bug} (tensor cores)" for bug in PLANTED_ON_TENSOR_CORES), "quotients not corrected"])
def test_planted_bugs_on_tensor_cores_are_noticed(bug):
    op = op_with(bug)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right_on_tensor_cores(op)


# ---- up to 64 tokens of bfloat16: on the tensor cores, by one cluster for each slice of the experts

FEW_THREADS = 256  # of a block that multiplies few tokens


@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "grid"),
    [
        (0, 16, 64, [8, 1, 1]),
        (1, 1, 8, [16, 1, 1]),
        (8, 16, 8192, [16, 1, 1]),
        (9, 17, 5120, [24, 1, 1]),
        (64, 16, 72, [72, 1, 1]),
        (1, 128, 5120, [16, 4, 1]),
        (64, 128, 72, [24, 4, 1]),
        (64, 256, 72, [16, 8, 1]),
    ],
)
def test_exact_logits_of_few_tokens(kernels, op, tokens, experts, hidden, grid):
    x, router = integers(tokens, hidden, dtype=BF16), integers(experts, hidden, dtype=BF16)
    (launch,) = kernels.launches_of(lambda: op(x, router, quantize=True), 132)
    assert (launch["threads"], launch["grid"]) == (FEW_THREADS, grid)
    assert_like_reference(op, x, router)


@pytest.mark.parametrize(
    ("x", "router"),
    [
        (integers(7, 8200, dtype=BF16), integers(4, 8200, dtype=BF16)),
        (integers(7, 68, dtype=BF16), integers(16, 68, dtype=BF16)),
        (offset(integers(7, 64, dtype=BF16)), integers(16, 64, dtype=BF16)),
        (integers(7, 64, dtype=BF16), offset(integers(16, 64, dtype=BF16))),
        (integers(7, 64), integers(16, 64, dtype=BF16)),
        (integers(7, 64, dtype=BF16), integers(16, 64)),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
def test_few_tokens_on_the_fp32_units(kernels, op, x, router):
    (launch,) = kernels.launches_of(lambda: op(x, router), 132)
    assert launch["threads"] != FEW_THREADS
    (got, codes), (want, want_codes) = op(x, router, quantize=True), reference.route_top1(x, router, quantize=True)
    assert_same_bits([got.expert_ids, got.order, codes.codes], [want.expert_ids, want.order, want_codes.codes])


@pytest.mark.parametrize(("tokens", "experts", "hidden"), [(1, 16, 5120), (33, 40, 1800)])
def test_random_logits_of_few_tokens(op, tokens, experts, hidden):
    test_random_logits_on_tensor_cores(op, tokens, experts, hidden)


def test_equal_experts_tie_among_few_tokens(op):
    x, router = torch.randn(20, 328).to(BF16), torch.randn(20, 328).to(BF16)
    ids = run(op, x, router)[0].expert_ids
    assert_same_bits([run(op, x, router.repeat_interleave(2, 0))[0].expert_ids], [2 * ids])
    assert_same_bits([run(op, x, router.repeat(10, 1))[0].expert_ids], [ids])


def test_codes_of_few_tokens_are_those_of_a_division(op):
    rows = bfloat16_rows()
    extremes = torch.tensor([[1e38, 3e38, -1e20, 1e-38], [1e-38, 1e-39, 1e-40, 0], [0, 0, 0, 0]], dtype=BF16)
    for x in (rows[:64], rows[64:], extremes.repeat(20, 4)):
        (_, got), (_, want) = (each(x, torch.ones_like(x[:1]), quantize=True) for each in (op, reference.route_top1))
        assert_same_bits([got.codes, got.scale], [want.codes, want.scale])


def assert_right_with_few_tokens(op) -> None:
    for tokens, experts, hidden in ((20, 40, 1800), (64, 16, 136), (1, 9, 72)):
        assert_like_reference(op, integers(tokens, hidden, dtype=BF16), integers(experts, hidden, dtype=BF16))
    assert_like_reference(op, torch.ones(9, 64, dtype=BF16), integers(20, 64, dtype=BF16) - 2)
    x, rows = torch.full((64, 2112), 0.5, dtype=BF16), torch.arange(64)
    x[rows, 33 * rows] = 1.0 + rows.to(BF16)
    assert_like_reference(op, x, integers(16, 2112, dtype=BF16))


@pytest.mark.parametrize("bug", PLANTED_WITH_FEW_TOKENS)
def test_planted_bugs_with_few_tokens_are_noticed(bug):
    op = op_with(f"{bug} (few tokens)")
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right_with_few_tokens(op)


def test_without_a_bug_nothing_is_noticed():
    assert_right(op_with(None))
    assert_right_on_tensor_cores(op_with(None))
    assert_right_with_few_tokens(op_with(None))


def test_sanitizers_watch_every_path():
    done = emulation.run_sanitized_kernels(RUN_SANITIZED)
    assert done.returncode == 0, done.stderr


RUN_SANITIZED = """
def zeros(count): return libc.calloc(ctypes.c_size_t(count), ctypes.c_size_t(4))
def rows(count, size): return libc.aligned_alloc(ctypes.c_size_t(min(16, count * size & -count * size)), ctypes.c_size_t(count * size))
for tokens, experts, hidden, dtype in ((1, 17, 72, "bfloat16"), (9, 17, 70, "float32"), (70, 17, 70, "bfloat16"), (65, 1, 72, "bfloat16"),
                                       (70, 17, 1800, "bfloat16"), (130, 200, 136, "bfloat16")):
    size = 2 if dtype == "bfloat16" else 4
    best = zeros(2 * tokens * kernels.route_slices(experts)) if tokens <= kernels.ROUTE_FEW_TOKENS else 0
    for codes, scale in ((0, 0), (rows(tokens, hidden), zeros(tokens))):
        kernels.route_top1(
            x=rows(tokens, size * hidden), x_dtype=getattr(kernels.Dtype, dtype), router=rows(experts, size * hidden),
            router_dtype=getattr(kernels.Dtype, dtype), tokens=tokens, hidden=hidden, experts=experts, expert_ids=zeros(tokens),
            scores=zeros(tokens), order=zeros(tokens), offsets=zeros(experts + 1), codes=codes, scale=scale, best=best, tickets=zeros(1),
            dependent=False, stream=0)
"""


@pytest.mark.parametrize(
    ("x", "router", "reason"),
    [
        (torch.ones(2, 8), torch.ones(257, 8), "router has 257 experts, more than 256"),
        (torch.ones(1, 49153), torch.ones(1, 49153), "x has 49153 columns, not 1 to 49152"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(module, x, router, reason):
    assert module.why_not_route_top1(x, router) == reason
