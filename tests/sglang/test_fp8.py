"""Every FP8 form against transformers on codes * scale, with activations rounded as the ops define it.

The bound is `oracle.rounding_bound`: half of what a mistake in a typical place of quantisation would cost. It is one of means,
because float32 noise moves a code now and then; see there. Once moved, a code moves what follows in its prompt, so the median prompt has to
keep the bound. The first tokens, before noise has moved a code, agree as in float32: a mistake anywhere, which is in every token, does not.
"""

import statistics

import pytest
import torch
from engine import LENGTHS, TOLERANCE, ask, difference, differences, llama4_server, prompt

from llama4_kernels.cli import checkpoint_files
from llama4_kernels.cli.oracle import Oracle, rounding_bound

FIRST = 8


def check(server, full, fp8, tp=1):
    rounded, unrounded = Oracle(full, quantise_activations=fp8, ranks=tp), Oracle(full)
    shares, first = [], []
    for length in LENGTHS:
        answer = ask(server, prompt(length))
        ids = answer.prompt + answer.generated
        cost = (rounded.logprobs(ids)[0] - unrounded.logprobs(ids)[0]).abs().mean()
        error = difference(answer, rounded)
        first.append(error[:FIRST])
        shares.append(float(error.mean() / rounding_bound(float(cost), rounded.rounding_sites())))
    assert statistics.median(shares) <= 1, shares
    assert torch.cat(first).median() <= TOLERANCE


@pytest.mark.parametrize(
    "like, form, attention, tp",
    [
        ("maverick", "compressed-tensors-experts", False, 2),
        ("scout", "compressed-tensors", False, 1),
        ("maverick", "redhat", True, 2),
        ("scout", "modelopt", False, 1),
        ("scout", "block", True, 1),
    ],
)
def test_checkpoint(like, form, attention, tp, make, tmp_path):
    path = make(like, fp8=form, fp8_attention=attention, intermediate_size=256)
    full = checkpoint_files.dequantised(path, tmp_path / "full")
    with llama4_server(path, log=tmp_path / "log", tp=tp) as server:
        check(server, full, path, tp)


@pytest.mark.parametrize("like, form, attention", [("maverick", "redhat", True), ("scout", "modelopt", False)])
def test_checkpoint_in_bfloat16(like, form, attention, make, tmp_path):
    """About as far from the oracle as the oracle in bf16, whose rounding moves codes: a coarse check, test_checkpoint is sharper."""
    path = make(like, fp8=form, fp8_attention=attention, intermediate_size=256, dtype="bfloat16")
    full = checkpoint_files.dequantised(path, tmp_path / "full")
    exact, rounded = Oracle(full, quantise_activations=path), Oracle(full, quantise_activations=path, dtype=torch.bfloat16)
    with llama4_server(path, log=tmp_path / "log", dtype="bfloat16") as server:
        answers = [ask(server, prompt(length)) for length in LENGTHS]
    errors, theirs = differences(answers, exact, rounded)
    assert errors.median() <= 1.25 * theirs.median()


def test_quantised_at_load(make, tmp_path):
    """A checkpoint whose weights are codes * scale already is quantised to those codes and scales again, so that the oracle is known."""
    fp8 = make("maverick", fp8="compressed-tensors", fp8_attention=True)
    full = checkpoint_files.dequantised(fp8, tmp_path / "full")
    with llama4_server(full, "--quantization=fp8", log=tmp_path / "log") as server:
        check(server, full, fp8)
