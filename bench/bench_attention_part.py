"""The attention part of a layer: qkv projection to output projection."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("attention_part",)
