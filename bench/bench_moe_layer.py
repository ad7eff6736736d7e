"""The whole MoE layer: router, both experts, sum."""

OPS = ("fused_moe",)


def test_moe_layer(measured):
    assert measured.status == "ok"
