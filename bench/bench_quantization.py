"""FP8 quantisation per token."""

OPS = ("quantize_per_token",)


def test_quantization(measured):
    assert measured.status == "ok"
