"""Grouped GEMM: the gate and up projection of the routed experts."""

OPS = ("grouped_gemm",)


def test_grouped_gemm(measured):
    assert measured.status == "ok"
