"""The MoE layer, and its two halves."""

from measurement import test_a_measurement_makes_sense  # noqa: F401

OPS = ("moe_gate_up", "moe_down", "fused_moe")
