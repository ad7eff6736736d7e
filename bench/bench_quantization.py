"""FP8 quantisation per token."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("quantize_per_token",)
