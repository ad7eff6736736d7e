"""One decoder layer on one rank, without its all-reduces."""

OPS = ("decoder_layer",)


def test_decoder_layer(measured):
    assert measured.status == "ok"
