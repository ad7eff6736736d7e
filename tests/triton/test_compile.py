"""Offline compilation of every shipped kernel, against the committed baseline_<list>.json.

Margins: registers and instructions may grow by a tenth, shared memory not at all; nothing spills. On purpose worse, or better:
`python tests/triton/offline.py` rewrites the baselines. Another Triton version than the baseline's, which is the one that the tested SGLang
brings, is held to the absolute rules only, and a kernel may spill SPILL_BYTES a thread there: configurations are chosen for the baseline's.
"""

import fcntl
import json
import os

import offline
import pytest
import triton

pytestmark = pytest.mark.compile

GROWTH = 1.1
SPILL_BYTES = 64


@pytest.fixture(scope="module", params=offline.ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module", params=offline.LISTS)
def shipped_list(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(architecture, shipped_list, tmp_path_factory):
    """Compiled by one of xdist's processes, for all of them."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    file = folder / f"{architecture}-{shipped_list}.json"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_text(json.dumps(offline.measure(architecture, shipped_list)))
    return json.loads(file.read_text())


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("no_such_list", 2)])
def test_what_is_no_list_is_not_compiled(argument, code, monkeypatch):
    monkeypatch.setattr(offline, "measure", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit) as ended:
        offline.main([argument])
    assert ended.value.code == code


def test_no_kernel_spills(shipped_list, kernels):
    allowed = 0 if json.loads(offline.baseline(shipped_list).read_text())["triton"] == triton.__version__ else SPILL_BYTES
    assert {name: kernel["spill_bytes"] for name, kernel in kernels.items() if kernel["spill_bytes"] > allowed} == {}


def test_no_register_is_read_that_nothing_wrote(kernels):
    """ptxas 12.8, which Triton 3.6 brings, loses the value of a wgmma descriptor where a tile takes over the shared memory of another."""
    assert kernels and {name for name, kernel in kernels.items() if kernel["unwritten_registers"]} == set()


def test_shared_memory_fits(architecture, kernels):
    limit = offline.SHARED_KIB[architecture] * 1024
    assert {name: kernel["shared_bytes"] for name, kernel in kernels.items() if kernel["shared_bytes"] > limit} == {}


def test_what_claims_wgmma_has_it(architecture, shipped_list, kernels):
    if architecture != "sm_90":
        pytest.skip("Hopper only")
    claimed = offline.module(shipped_list).WGMMA
    lacking = [name for name, kernel in kernels.items() if name.split("[")[0] in claimed and not kernel["wgmma"]]
    assert lacking == []
    assert claimed <= {name.split("[")[0] for name in kernels}


def test_no_worse_than_the_baseline(architecture, shipped_list, kernels):
    baseline = json.loads(offline.baseline(shipped_list).read_text())
    if baseline["triton"] != triton.__version__:
        pytest.skip(f"the baseline is from Triton {baseline['triton']}")
    expected = baseline[architecture]
    assert sorted(kernels) == sorted(expected), "other kernels ship than the baseline lists: python tests/triton/offline.py rewrites it"
    worse = [
        f"{name}: {what} {expected[name][what]} -> {kernel[what]}"
        for name, kernel in kernels.items()
        for what, growth in (("registers", GROWTH), ("instructions", GROWTH), ("shared_bytes", 1.0))
        if kernel[what] > growth * expected[name][what]
    ]
    assert worse == []
