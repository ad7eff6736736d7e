"""What every CUDA op launches at named shapes, against the committed baseline_launches.json, exactly.

On purpose different: `PYTHONPATH=tests python tests/hopper/launches.py` rewrites the baseline.
"""

from __future__ import annotations

import json

import emulation
import launches
import pytest
import torch
from guards import Guarded

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

BASELINE = json.loads(launches.BASELINE.read_text())
PER_CALL = {"fused_moe": 3}  # of the others 1


@pytest.fixture(scope="module")
def kernels():
    return emulation.load(emulation.build())


@pytest.fixture(scope="module")
def measured(kernels):
    return launches.measure(kernels)


def test_the_baseline_is_of_these_shapes():
    assert list(BASELINE) == launches.SHAPES, "PYTHONPATH=tests python tests/hopper/launches.py rewrites it"


@pytest.mark.parametrize("shape", launches.SHAPES)
def test_as_in_the_baseline(measured, shape):
    assert measured[shape] == BASELINE[shape]


@pytest.mark.parametrize("shape", launches.SHAPES)
def test_launches_per_call(measured, shape):
    assert len(measured[shape]) == PER_CALL.get(shape.partition("/")[0], 1)


def test_nothing_runs_while_launches_are_noted_and_all_does_afterwards(kernels):
    quantize, x, made = emulation.op_module("quantization", kernels).quantize_per_token, torch.ones(3, 64, dtype=torch.bfloat16), []
    with Guarded():
        noted = kernels.launches_of(lambda: made.append(quantize(x)), 132)
    assert [each["grid"] for each in noted] == [[3, 1, 1]] and made[0].scale.isnan().all()
    with pytest.raises(ZeroDivisionError):
        kernels.launches_of(lambda: 1 / 0, 132)
    torch.testing.assert_close(quantize(x).scale, torch.full((3,), 1 / 448))


def test_a_launch_too_many_is_seen():
    launch = "launch(config, &route_wgmma_kernel<Shape>, x, router, TileProblem{a, steps});"
    planted = {"routing_wgmma.cuh": (launch, f"{launch} {launch}")}
    few, many = "fused_moe/fp8/scout/tp8/t64", "fused_moe/fp8/scout/tp8/t8192"
    found = launches.measure(emulation.load(emulation.build(planted=planted)), [few, many])
    assert found[few] == BASELINE[few] and len(found[many]) == 4
