"""A planted regression is found, and noise is not."""

from __future__ import annotations

import dataclasses

import pytest
import synthetic

from llama4_kernels.bench import compare

NAMES = [f"fused_moe/fp8/scout/tp8/t{2**i}" for i in range(14)]


def run(factor: float = 1.0, noise: float = 0.01, seed: int = 0, drift: float = 0.0) -> list:
    """All workloads, each with noise of its own; drift: how far this run as a whole is off, as another temperature would make it."""
    return [
        synthetic.benchmark(name, us=(10 + 5 * i) * factor * (1 + drift), noise=noise, seed=1000 * seed + i) for i, name in enumerate(NAMES)
    ]


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.03])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_regression_of_a_tenth_is_found_in_every_workload(noise, seed):
    found = compare.compare(run(1.1, noise, seed + 100), run(1.0, noise, seed))
    assert [each.verdict for each in found] == ["slower"] * len(NAMES)
    assert all(each.is_regression and each.interval[0] < 1.1 * 1.02 and each.interval[1] > 1.1 * 0.98 for each in found)


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.03])
@pytest.mark.parametrize("drift", [-0.01, 0.0, 0.01])
@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_drift_of_a_hundredth_are_none(noise, drift, seed):
    found = compare.compare(run(1.0, noise, seed + 100, drift), run(1.0, noise, seed))
    assert [each.verdict for each in found] == ["same"] * len(NAMES)


def test_one_regression_among_many_is_the_only_one():
    now = run(seed=1)
    now[5] = synthetic.benchmark(NAMES[5], us=(10 + 25) * 1.1, seed=77)
    slower = [each.record.workload for each in compare.compare(now, run()) if each.is_regression]
    assert slower == [NAMES[5]]


def test_a_gain_is_no_regression():
    found = compare.compare(run(0.9, seed=1), run())
    assert {each.verdict for each in found} == {"faster"} and not any(each.is_regression for each in found)


def test_few_wild_samples_prove_nothing():
    now, before = (synthetic.benchmark(us=us, noise=0.3, seed=seed) for us, seed in ((88, 1), (80, 2)))
    now, before = (dataclasses.replace(r, timing=dataclasses.replace(r.timing, samples_us=r.timing.samples_us[:5])) for r in (now, before))
    assert compare.compare_two(now, before).verdict == "same"
    single = dataclasses.replace(now, timing=dataclasses.replace(now.timing, samples_us=(800.0,)))
    assert compare.compare_two(single, before).verdict == "same"


def test_what_breaks_is_a_regression_and_what_is_repaired_is_not():
    right, broken = synthetic.benchmark(), synthetic.benchmark(status="wrong", reason="error 1")
    assert compare.compare_two(broken, right).verdict == "broken" and compare.compare_two(broken, right).is_regression
    assert compare.compare_two(right, broken).verdict == "repaired"
    assert compare.compare_two(broken, broken).verdict == "same"


def test_a_slower_peer_is_no_regression_of_ours():
    now, before = (synthetic.benchmark(backend="sglang", peer=True, us=us) for us in (110.0, 80.0))
    assert compare.compare_two(now, before).verdict == "slower" and not compare.compare_two(now, before).is_regression


def test_only_the_same_workload_backend_and_device_are_compared():
    h100 = dataclasses.replace(synthetic.GPU, device="NVIDIA H100")
    now = [synthetic.benchmark(), synthetic.benchmark(machine=h100)]
    before = [synthetic.benchmark(), synthetic.benchmark(backend="cuda")]
    assert [(each.verdict, each.record.backend) for each in compare.compare(now, before)] == [
        ("same", "triton"),
        ("new", "triton"),
        ("gone", "cuda"),
    ]


def test_the_newest_of_each_side_counts():
    old, new = synthetic.benchmark(us=50.0, date="2026-01-01T00:00:00Z"), synthetic.benchmark(us=80.0, date="2026-02-01T00:00:00Z")
    (found,) = compare.compare([synthetic.benchmark(us=80.0, seed=3)], [new, old])
    assert found.before == new and found.verdict == "same"
