"""One decoder layer on one rank, without its all-reduces."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("decoder_layer",)
