"""Chunk-local and full paged attention: decode, prefill, and prefill after a prefix."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("chunked_attention",)
