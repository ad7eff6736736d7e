"""csrc/moe_gate_up.cu and moe_down.cu themselves, built for the host and called through llama4_kernels/cuda/moe.py, between guard bytes."""

from __future__ import annotations

import dataclasses
import functools
from itertools import accumulate, pairwise, product
from pathlib import Path
from unittest import mock

import emulation
import moe_balance
import planted
import pytest
import torch
from guards import Guarded
from test_moe import assert_hidden, gate_up_oracle
from torch import Tensor

from backends import assert_same_bits
from llama4_kernels.ops import Linear, MoEWeights, Quantized, Routing
from llama4_kernels.reference import moe as reference
from llama4_kernels.reference.routing import route_top1
from weights import FORMS, FP8, linear, moe_weights, random_routing

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

BF16 = torch.bfloat16
WEIGHTS = [form for form in FORMS if form != "fp32"]
MIXED = [("channel", "bf16"), ("tensor static", "bf16"), ("bf16", "channel"), ("block", "tensor static")]
MIXES = [(form, form) for form in WEIGHTS] + MIXED


@pytest.fixture(scope="module")
def module():
    return emulation.op_module("moe", emulation.load(emulation.build()))


def guarded_record(guarded: Guarded, record):
    """The record, and every tensor in it, between guard bytes."""
    if isinstance(record, Tensor):
        return guarded(record)
    if not dataclasses.is_dataclass(record):
        return record
    return type(record)(*(guarded_record(guarded, getattr(record, field.name)) for field in dataclasses.fields(record)))


def run(op, *arguments, **options):
    with Guarded() as guarded:
        return op(*(guarded_record(guarded, argument) for argument in arguments), **options)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def assert_layer(module, x: Tensor, routing: Routing, weights: MoEWeights, forms: tuple[str, str]) -> None:
    """Both halves, each against the reference on the same input."""
    shared, routed = run(module.moe_gate_up, x, routing, weights)
    want_shared, want_routed = gate_up_oracle(x, routing, weights, *forms)
    assert_hidden(shared, want_shared, weights.shared_w2, BF16)
    assert_hidden(routed, want_routed, weights.w2, BF16)
    y = run(module.moe_down, shared, routed, routing, weights, out_dtype=BF16)
    assert y.dtype == BF16
    assert error(y, reference.moe_down(shared, routed, routing, weights, out_dtype=torch.float32)) <= 4e-3


@pytest.mark.parametrize("forms", MIXES, ids="-".join)
@pytest.mark.parametrize("tokens", [7, 65])
def test_forms(module, tokens, forms):
    weights = moe_weights(*forms, experts=4, hidden=272, inner=144, shared_inner=80)
    assert_layer(module, torch.randn(tokens, 272).to(BF16), random_routing(tokens, 4), weights, forms)


@pytest.mark.parametrize("on_one", [False, True], ids=["spread", "on one expert"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 17, 64, 65, 300])
def test_tokens(module, tokens, on_one):
    weights = moe_weights("channel", "bf16", experts=40, hidden=144, inner=48)
    x, routing = torch.randn(tokens, 144).to(BF16), random_routing(tokens, 40, on_one)
    for multiprocessors in (3, 17):  # the first has enough tiles to leave them whole
        with on_multiprocessors(module, multiprocessors):
            assert_layer(module, x, routing, weights, ("channel", "bf16"))


def on_multiprocessors(module, count: int):
    return mock.patch.object(module._C, "moe_multiprocessors", lambda: count)


SHARED_FORMS = ("bf16", "block")  # of the routed experts and of the shared one, whose tiles have fewer stages
SHARING = [(*case, on_one) for case in product((1, 20, 300), (1, 2, 5, 11, 100)) for on_one in (False, True)]  # tokens, multiprocessors


def sharing_layer(tokens: int, on_one: bool) -> tuple[Tensor, Routing, MoEWeights]:
    torch.manual_seed(tokens)
    weights = moe_weights(*SHARED_FORMS, experts=3, hidden=400, inner=272)
    return torch.randn(tokens, 400).to(BF16), random_routing(tokens, 3, on_one), weights


def assert_shares(module, tokens: int, multiprocessors: int, on_one: bool) -> None:
    """The layer where blocks share tiles, again and again, as blocks come in random order; parts that nothing wrote are NaN."""
    x, routing, weights = sharing_layer(tokens, on_one)
    with on_multiprocessors(module, multiprocessors):
        assert_layer(module, x, routing, weights, SHARED_FORMS)
        runs = [run(module.moe_down, *run(module.moe_gate_up, x, routing, weights), routing, weights, out_dtype=BF16) for _ in range(2)]
    assert_same_bits(*runs)
    assert not module.tickets(torch.device("cpu"), 1).any()


@pytest.mark.parametrize(("tokens", "multiprocessors", "on_one"), SHARING)
def test_blocks_share_tiles(module, tokens, multiprocessors, on_one):
    assert_shares(module, tokens, multiprocessors, on_one)


def test_every_kind_of_cut_is_among_the_shared_tiles(module):
    """Runs that begin in the middle of a tile, where a tile ends and within a routed segment of moe_down; whole tiles within a run; tiles of
    three blocks; blocks without a run; tiles that are left whole; and a moe_down whose tiles differ."""
    found = set()
    for tokens, multiprocessors, on_one in SHARING:
        x, routing, weights = sharing_layer(tokens, on_one)
        counts = routing.offsets.diff().tolist()
        shared, routed = reference.moe_gate_up(x, routing, weights)
        gate_up = functools.partial(module.moe_gate_up, x, routing, weights)
        down = functools.partial(module.moe_down, shared, routed, routing, weights, out_dtype=BF16)
        for op, call, tiles_of in (("gate_up", gate_up, moe_balance.gate_up_tiles), ("down", down, moe_balance.down_tiles)):
            (launch,) = [each for each in module._C.launches_of(call, multiprocessors) if each["op"] == f"moe_{op}"]
            tiles = tiles_of(counts, 400, 272, row_bytes=(1, 2))
            found |= {(op, cut) for cut in cuts(tiles, launch["grid"][0], module._C)}
    in_both = product(("gate_up", "down"), ("in a tile", "at a tile's end", "a whole tile", "three blocks", "no run", "turns"))
    assert found == {*in_both, ("down", "in a routed segment"), ("down", "tiles that differ")}


def cuts(tiles: list[int], grid: int, kernels) -> set[str]:
    """What equal runs do to tiles of so many stages."""
    if len(tiles) >= kernels.MOE_MANY_ROUNDS * grid:
        return {"turns"}
    begins, ends = kernels.moe_run_begins(sum(tiles), grid), list(accumulate(tiles))
    found = {"tiles that differ"} if len(set(tiles)) > 1 and tiles[0] > 7 else set()
    for begin, end in pairwise(begins):
        if begin == end:
            found.add("no run")
            continue
        inside = [(stop - steps, steps) for steps, stop in zip(tiles, ends, strict=True) if stop - steps < end and stop > begin]
        first, steps = inside[0]
        found.add("in a tile" if begin > first else "at a tile's end")
        if tiles[0] > 7 and begin - first > 3 and (begin - first - 3) % 5:  # of moe_down: 3 stages of the shared expert, 5 of each other
            found.add("in a routed segment")
        if any(start >= begin and start + steps <= end for start, steps in inside):
            found.add("a whole tile")
        if begin > first and end < first + steps:
            found.add("three blocks")
    return found


@pytest.mark.parametrize("stages", [1, 3, 4, 5, 75, 640, 5443, 2**31 - 5])
@pytest.mark.parametrize("grid", [1, 2, 7, 132])
def test_runs_are_equal_and_leave_nothing_out(module, stages, grid):
    begins = module._C.moe_run_begins(stages, grid)
    lengths = [end - begin for begin, end in pairwise(begins)]
    at_work = min(grid, -(-stages // module._C.MOE_MIN_RUN))
    assert begins[0] == 0 and begins[-1] == stages
    assert max(lengths[:at_work]) - min(lengths[:at_work]) <= 1 and not any(lengths[at_work:])


@pytest.mark.parametrize("per", ["row", "block"])
def test_quantized_x(module, per):
    weights = dataclasses.replace(moe_weights("channel", "channel", experts=4, hidden=208, inner=32), shared_w2=linear("bf16", 208, 32))
    x = Quantized((100 * torch.randn(9, 208)).clamp(-448, 448).to(FP8), 0.01 * (1 + torch.rand((9,) if per == "row" else (9, 2))))
    routing = random_routing(9, 4)
    shared, routed = run(module.moe_gate_up, x, routing, weights)
    want_shared, want_routed = gate_up_oracle(x, routing, weights, "channel", "channel")
    assert_hidden(shared, want_shared, weights.shared_w2, BF16)
    assert_hidden(routed, want_routed, weights.w2, BF16)


LAYERS = [("channel", "channel"), ("bf16", "bf16"), ("tensor static", "bf16"), ("block", "channel")]


@pytest.mark.parametrize("forms", LAYERS, ids="-".join)
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 65, 300])
def test_layer(module, tokens, forms):
    weights, x = moe_weights(*forms, experts=16, hidden=160, inner=64), torch.randn(tokens, 160).to(BF16)
    y, again = run(module.fused_moe, x, weights), run(module.fused_moe, x, weights)
    assert_same_bits(y, again)
    routing, _ = route_top1(x, weights.router)
    want = reference.moe_down(*reference.moe_gate_up(x, routing, weights), routing, weights, out_dtype=torch.float32)
    assert y.shape == x.shape and y.dtype == BF16
    assert error(y, want) <= 4e-3


def test_what_a_static_scale_is_too_small_for_saturates(module):
    """Even where the quotient is no float: the reference clamps."""
    weights, x = moe_weights("tensor static", "tensor static", experts=2, hidden=144, inner=48), 1e3 * torch.randn(9, 144).to(BF16)
    small = {name: dataclasses.replace(getattr(weights, name), input_scale=torch.tensor(1e-37)) for name in ("w2", "shared_w2")}
    weights, routing = dataclasses.replace(weights, **small), random_routing(9, 2)
    for got, want in zip(run(module.moe_gate_up, x, routing, weights), reference.moe_gate_up(x, routing, weights), strict=True):
        saturated = want.codes.float().abs() == 448
        assert saturated.float().mean() > 0.3
        assert torch.equal(got.codes.float()[saturated], want.codes.float()[saturated])


@pytest.mark.parametrize("form", ["bf16", "channel"])
def test_nan_stays_in_its_row_and_its_expert(module, form):
    weights, x = moe_weights(form, form, experts=5, hidden=144, inner=48), torch.randn(9, 144).to(BF16)
    clean = run(module.fused_moe, x, weights)
    routing, _ = module.route_top1(x, weights.router)
    ids = routing.expert_ids.tolist()
    broken = next(expert for expert in ids if expert != ids[0])
    for weight in (weights.w13.weight, weights.w2.weight):
        weight[broken].view(torch.uint8).fill_(0xFF)
    x[3] = float("nan")
    spoilt = run(module.fused_moe, x, weights)
    others = [row for row in range(9) if row != 3 and ids[row] != broken]
    assert others and spoilt[3].isnan().all()
    torch.testing.assert_close(spoilt[others], clean[others], rtol=2**-7, atol=1e-3)


WHOLE = "segment.first_row == tile.first_row && segment.end_row == tile.end_row"
PLANTED = {
    "rows not gathered": ("moe_gate_up.cu", "«a.routing.order», piece.begin", "nullptr"),
    "up channels from the gate": ("moe_gate_up.cu", "column_tile * H_COLUMNS, «width», first_row", "0"),
    "an expert's NaN for every row": ("moe_down.cu", f"is_whole = «{WHOLE}»;", "true"),
    "rows not scattered": ("moe_down.cu", "= «a.routing.order[tile.first_row + threadIdx.x]»;", "tile.first_row + threadIdx.x"),
    "an expert left out": ("moe_down.cu", "below(«starts_», experts_, end_row(first_row))", "starts_ + 1"),
    "no proxy fence": ("moe_tile.cuh", "hopper::fence_async_proxy();", ""),
    "a proxy fence of one warpgroup alone": ("moe_tile.cuh", "hopper::fence_async_proxy();", "if (warpgroup_ == 0) hopper::fence_async_proxy();"),
    "loaders that arrive before their copies": ("moe_load.cuh", "hopper::cp_async_arrive(full);", "full.arrive();"),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_noticed(bug):
    module = module_with(bug)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right(module)


def module_with(bug: str | None):
    return emulation.op_module("moe", planted.kernels(PLANTED | SHARING_PLANTED, bug))


def assert_right(module) -> None:
    torch.manual_seed(0)
    weights = moe_weights("channel", "bf16", experts=4, hidden=272, inner=144)
    assert_layer(module, torch.randn(13, 272).to(BF16), random_routing(13, 4), weights, ("channel", "bf16"))
    test_nan_stays_in_its_row_and_its_expert(module, "channel")


SHARING_PLANTED = {
    "a piece left out": ("moe_tile.cuh", "«block + j <= last» ?", "block + j < last"),
    "both pieces in one part": ("moe_tile.cuh", "(runs.begin(block) < first_stage)", "0"),
    "a tile's first block overlooked": ("moe_tile.cuh", "while (runs.begin(first) > «first_stage»)", "first_stage + 1"),
    "a ticket too early": ("moe_tile.cuh", "piece.tile, «last - first + 1»);", "last - first"),
    "a ticket too late": ("moe_tile.cuh", "piece.tile, «last - first + 1»);", "last - first + 2"),
    "tickets left behind": ("tickets.cuh", "if (is_last) *counter = 0;", ""),
    "a stage twice": ("moe_runs.cuh", "begin = «runs.begin(blockIdx.x)»;", "max(runs.begin(blockIdx.x) - 1, 0)"),
    "a run too short": ("moe_runs.cuh", "end = «runs.begin(blockIdx.x + 1)»;", "runs.begin(blockIdx.x + 1) - 1"),
    "experts of the first rows": ("moe_down.cu", "const int present = «tile.first_present + index»;", "index"),
    "a few rows in others' place": ("moe_tile.cuh", "group == «window + from»", "window + from + 1"),
    "nobody's first turn": ("issue_turns.cuh", "if (warpgroup_ == 1) pass();", ";"),
    "a last turn left": ("moe_down.cu", "consumer.finish();", ""),
    "the last tile of a run": ("moe_runs.cuh", "tiles.tile_of(end - 1) + 1", "tiles.tile_of(end - 1)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", SHARING_PLANTED)
def test_bugs_planted_in_sharing_are_noticed(bug):
    module = module_with(bug)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_shares(module, 300, 11, on_one=False)


def test_without_a_bug_nothing_is_noticed():
    assert_right(module_with(None))
    assert_shares(module_with(None), 300, 11, on_one=False)


def test_the_balance_that_the_documentation_shows():
    document = (Path(__file__).parents[1] / "docs" / "moe.md").read_text()
    assert "\n".join(moe_balance.table()) in document, "PYTHONPATH=tests python tests/moe_balance.py prints its rows"


def test_the_kernels_share_as_the_balance_assumes(module):
    assert (module._C.MOE_MIN_RUN, module._C.MOE_MANY_ROUNDS) == (moe_balance.MIN_RUN, moe_balance.MANY_ROUNDS)
    assert all(module._C.moe_tile_tokens(tokens) == moe_balance.tile_tokens(tokens) for tokens in moe_balance.TOKENS)
    assert all(module._C.moe_down_columns(tokens) == moe_balance.down_channels(tokens) for tokens in moe_balance.TOKENS)
    assert moe_balance.in_runs([5, 5, 5], 2) == 16 / 15 and moe_balance.in_runs([5] * 17, 2) == 18 / 17


def test_what_the_kernels_do_not_take_is_named(module):
    weights, x = moe_weights("bf16", "bf16", experts=2, hidden=16, inner=8), torch.ones(3, 16)
    routing = random_routing(3, 2)
    assert module.why_not_fused_moe(x.to(BF16), weights) == ""
    assert module.why_not_fused_moe(x, weights) == "x is float32: the tensor cores take bfloat16"
    assert module.why_not_dtype(torch.float32, "x") == "x is float32: the tensor cores take bfloat16" and not module.why_not_dtype(
        BF16, "x"
    )
    odd = dataclasses.replace(weights, w2=linear("channel", 2, 16, 8))
    assert module.why_not_moe_gate_up(x.to(BF16), routing, odd) == "a row of weights.w2 has 8 bytes, not a multiple of 16"
    fp32 = dataclasses.replace(weights, shared_w2=Linear(torch.ones(16, 8)))
    assert module.why_not_moe_gate_up(x.to(BF16), routing, fp32) == "weights.shared_w2 is float32: the tensor cores take bfloat16 or fp8"
    h = torch.ones(3, 8, dtype=BF16)
    assert module.why_not_moe_down(h, h, routing, weights, out_dtype=torch.float32) == "out_dtype is float32, not bfloat16"
    shifted = torch.ones(17, dtype=BF16)[1:].view(1, 16)
    assert module.why_not_moe_gate_up(shifted, routing, weights) == "x does not begin at a multiple of 16 bytes"


def test_sanitizers_watch_every_path():
    done = emulation.run_sanitized_kernels(RUN_SANITIZED)
    assert done.returncode == 0, done.stderr


RUN_SANITIZED = """
def zeros(*sizes):
    count = 4
    for size in sizes: count *= size
    return libc.calloc(ctypes.c_size_t(count), ctypes.c_size_t(1))
def rows(count, size): return libc.aligned_alloc(ctypes.c_size_t(16), ctypes.c_size_t(count * size))
experts, hidden, inner = 3, 272, 144
fp8, bf16, plain = kernels.Dtype.float8_e4m3fn, kernels.Dtype.bfloat16, kernels.MoeConversion.none
for tokens, blocks in ((1, 2), (20, 7), (70, 1), (70, 5), (200, 30)):
    x, codes, scale = rows(tokens, 2 * hidden), rows(tokens, hidden), zeros(tokens)
    ids, scores, order, offsets = zeros(tokens), zeros(tokens), zeros(tokens), zeros(experts + 1)
    kernels.route_top1(
        x=x, x_dtype=bf16, router=rows(experts, 4 * hidden), router_dtype=kernels.Dtype.float32, tokens=tokens, hidden=hidden, experts=experts,
        expert_ids=ids, scores=scores, order=order, offsets=offsets, codes=codes, scale=scale, best=zeros(2, tokens), tickets=zeros(1),
        dependent=False, stream=0)
    def shared(columns, n): return kernels.MoeWeight(values=rows(n, 2 * columns), dtype=bf16, scale=0, scale_dimensions=0)
    def routed(columns, n): return kernels.MoeWeight(values=rows(experts * n, columns), dtype=fp8, scale=zeros(experts, n), scale_dimensions=1)
    def operand(values, scale=0, row=0, step=0, factors=0):
        return kernels.MoeOperand(values=values, scale=scale, scale_row_stride=row, scale_step_stride=step, factors=factors, conversion=plain)
    def sharing(tiles, part):
        return kernels.MoeSharing(blocks=blocks, parts=zeros(2 * blocks, part), tickets=zeros(min(tiles, kernels.MOE_MANY_ROUNDS * blocks)))
    h_shared, h_routed, h_scale = rows(tokens, 2 * inner), rows(tokens, inner), zeros(tokens, 2)
    routing = kernels.MoeRouting(order=order, offsets=offsets)
    row_tiles = -(-tokens // kernels.moe_tile_tokens(tokens))
    kernels.moe_gate_up(
        x_shared=operand(x), x_routed=operand(codes, scale, 1, 0, scores), w_shared=shared(hidden, 2 * inner), w_routed=routed(hidden, 2 * inner),
        h_shared=kernels.MoeHidden(values=h_shared, dtype=bf16, scale=0, is_static=False, width=inner),
        h_routed=kernels.MoeHidden(values=h_routed, dtype=fp8, scale=h_scale, is_static=False, width=inner), routing=routing, tokens=tokens,
        hidden=hidden, experts=experts, sharing=sharing(2 * (row_tiles + min(tokens, row_tiles + experts)), kernels.moe_gate_up_part(tokens)),
        prefetch_w_shared=True, prefetch_address=0, prefetch_bytes=0, dependent=False, stream=0)
    kernels.moe_down(
        h_shared=operand(h_shared), h_routed=operand(h_routed, h_scale, 2, 1), w_shared=shared(inner, hidden), w_routed=routed(inner, hidden),
        k_shared=inner, k_routed=inner, routing=routing, tokens=tokens, hidden=hidden, experts=experts, out=rows(tokens, 2 * hidden),
        sharing=sharing(-(-hidden // kernels.moe_down_columns(tokens)) * row_tiles, kernels.moe_down_part(tokens)), dependent=False, stream=0)
"""
