"""Two MoE layers in a row, whose six kernels begin as early as programmatic dependent launch allows: each before the one ahead has done
anything, which runs when the first thread waits for it."""

from __future__ import annotations

from contextlib import contextmanager
from types import ModuleType

import emulation
import pytest
import torch
from guards import Guarded
from test_moe_emulation import guarded_record
from torch import Tensor

from backends import assert_same_bits
from llama4_kernels import switches
from llama4_kernels.ops import MoEWeights
from weights import moe_weights

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")


@contextmanager
def held(module: ModuleType):
    module._C.hold_launches()
    try:
        yield
    finally:
        module._C.run_held_launches()


def two_layers(module: ModuleType, x: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
    """As they come out of launches one after another, and of overlapping ones. All memory is new and stays, since nobody knows when a
    held launch ends."""
    with Guarded() as guarded:
        arguments = guarded(x), guarded_record(guarded, weights)
        want = module.fused_moe(module.fused_moe(*arguments), arguments[1])
        with held(module):
            got = module.fused_moe(module.fused_moe(*arguments), arguments[1])
        return want, got


def problem(tokens: int, form: str) -> tuple[Tensor, MoEWeights]:
    torch.manual_seed(tokens)
    return torch.randn(tokens, 160).bfloat16(), moe_weights(form, form, experts=16, hidden=160, inner=64)


@pytest.mark.parametrize("dependent", ["0", "1"])
@pytest.mark.parametrize(("tokens", "form"), [(1, "channel"), (20, "bf16"), (20, "block"), (100, "channel")])
def test_no_kernel_touches_what_the_one_ahead_may_still_write(monkeypatch, tokens, form, dependent):
    module = emulation.op_module("moe", emulation.load(emulation.build()))
    monkeypatch.setenv(switches.DEPENDENT_LAUNCH, dependent)
    want, got = two_layers(module, *problem(tokens, form))
    assert want.isfinite().all() and want.any()
    assert_same_bits(got, want)
    assert not module.tickets(torch.device("cpu"), 1).any()


@pytest.mark.parametrize("variable", [switches.DEPENDENT_LAUNCH, switches.PREFETCH])
def test_a_switch_of_another_value_stops_the_layer(monkeypatch, variable):
    module = emulation.op_module("moe", emulation.load(emulation.build()))
    monkeypatch.setenv(variable, "off")
    with pytest.raises(ValueError, match=f"^{variable} is 'off', needs 0 or 1$"):
        module.fused_moe(*problem(1, "bf16"))


WAIT = "    hopper::wait_for_dependencies();\n"
EARLY = {  # the file, its text, the bug
    "h": ("moe_down.cu", "        wait_for_dependencies();\n        shared.stages.work", "        shared.stages.work"),
}


@pytest.mark.parametrize("what", EARLY)
def test_what_a_kernel_reads_too_early_is_not_there(what):
    name, old, new = EARLY[what]
    module = emulation.op_module("moe", emulation.load(emulation.build(planted={name: (old, new)})))
    want, got = two_layers(module, *problem(20, "bf16"))
    assert want.isfinite().all() and not torch.equal(got, want)


def seen_early(matrix: str) -> tuple[str, str, str]:
    """In route_top1: that what the kernel ahead writes there was NaN, and then no column is multiplied."""
    early = f"    const float early = __bfloat162float(*static_cast<const __nv_bfloat16*>(a.{matrix}));\n"
    token, route = (
        "    const int token = (rank - Shape::RANKS) * problem.slices + int(blockIdx.y);\n    if (routes) {\n",
        "        route_few(shared, problem, ",
    )
    old = WAIT + token + route
    return "routing_few.cuh", old + "first_column);", early + old + "first_column + (early == early ? 0 : a.hidden));"


def routed_by_what_the_kernel_ahead_writes(kernels: ModuleType, tokens: int) -> None:
    """x and the router, as a KV cache."""
    routing, rope = (emulation.op_module(stem, kernels) for stem in ("routing", "rope"))
    x, router = torch.randn(2, tokens, 160).bfloat16()
    qkv, at = torch.cat([x, x, router], 1), torch.arange(tokens)
    want, _ = routing.route_top1(x, router)
    with Guarded() as guarded:
        late = [guarded(torch.full_like(x, float("nan"))) for _ in range(2)]
        caches = dict(zip(("k_cache", "v_cache"), (of.view(1, tokens, 1, 160) for of in late)))
        with held(routing):
            rope.rope_qk_norm(qkv, at, num_heads=1, num_kv_heads=1, head_dim=160, slots=at, **caches)
            got, _ = routing.route_top1(*late, dependent=True)
        assert_same_bits(got, want)


@pytest.mark.parametrize("tokens", [1, 9, 65])
def test_the_router_too_may_be_written_by_the_kernel_ahead(tokens):
    routed_by_what_the_kernel_ahead_writes(emulation.load(emulation.build()), tokens)


@pytest.mark.parametrize("matrix", ["x", "router"])
def test_what_route_top1_reads_too_early_is_not_there(matrix):
    name, old, new = seen_early(matrix)
    kernels = emulation.load(emulation.build(planted={name: (old, new)}))
    with pytest.raises(AssertionError):
        routed_by_what_the_kernel_ahead_writes(kernels, 9)


def test_a_kernel_that_does_not_wait_is_reported():
    planted = {"moe_gate_up.cu": ("    wait_for_dependencies();\n", "")}
    module = emulation.op_module("moe", emulation.load(emulation.build(planted=planted)))
    with pytest.raises(RuntimeError, match="ends without wait_for_dependencies"):
        module.fused_moe(*problem(20, "bf16"))
