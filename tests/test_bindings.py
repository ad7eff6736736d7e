"""csrc/fields.h: keywords of Python become the fields of the same names."""

from __future__ import annotations

import emulation
import pytest

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

GIVEN = dict(x=0, rows=0, columns=8, codes=0, scale=0, stream=0)


@pytest.fixture(scope="module")
def kernels():
    return emulation.load(emulation.build())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"columns": None}, "quantize_per_token: columns cannot be None"),
        ({"rows": 1.5}, "quantize_per_token: rows cannot be 1.5"),
        ({"x": -1}, "quantize_per_token: x cannot be -1"),
        ({"dtype": 0}, "quantize_per_token: dtype cannot be 0"),
        ({"column": 8}, "quantize_per_token has no column"),
    ],
)
def test_what_is_no_field_or_of_no_use_there_is_named(kernels, change, error):
    with pytest.raises(TypeError, match=f"^{error}$"):
        kernels.quantize_per_token(**(GIVEN | dict(dtype=kernels.Dtype.float32) | change))


@pytest.mark.parametrize("name", [*GIVEN, "dtype"])
def test_what_is_not_given_is_named(kernels, name):
    given = GIVEN | dict(dtype=kernels.Dtype.float32)
    kernels.quantize_per_token(**given)
    del given[name]
    with pytest.raises(TypeError, match=f"^quantize_per_token lacks {name}$"):
        kernels.quantize_per_token(**given)


def test_so_are_the_fields_of_a_struct(kernels):
    with pytest.raises(TypeError, match="^MoeRouting lacks offsets$"):
        kernels.MoeRouting(order=0)
    with pytest.raises(TypeError, match="^MoeRouting has no stream$"):
        kernels.MoeRouting(order=0, offsets=0, stream=0)
