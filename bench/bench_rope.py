"""RoPE, qk-norm or temperature, and the KV-cache write."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("rope_qk_norm",)
