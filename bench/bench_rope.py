"""RoPE, qk-norm or temperature, and the KV-cache write."""

OPS = ("rope_qk_norm",)


def test_rope(measured):
    assert measured.status == "ok"
