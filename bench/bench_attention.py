"""Chunk-local and full paged attention: decode, prefill, and prefill after a prefix."""

OPS = ("chunked_attention",)


def test_attention(measured):
    assert measured.status == "ok"
