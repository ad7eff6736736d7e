"""Grouped GEMM: the gate and up projection of the routed experts."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("grouped_gemm",)
