"""Top-1 routing with the quantisation of its tokens."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("route_top1",)
