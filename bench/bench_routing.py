"""Top-1 routing with the quantisation of its tokens."""

OPS = ("route_top1",)


def test_routing(measured):
    assert measured.status == "ok"
