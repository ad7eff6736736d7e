"""The attention part of a layer: qkv projection to output projection."""

OPS = ("attention_part",)


def test_attention_part(measured):
    assert measured.status == "ok"
