"""The two halves of the MoE layer."""

OPS = ("moe_gate_up", "moe_down")


def test_moe(measured):
    assert measured.status == "ok"
