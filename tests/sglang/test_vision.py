"""Images through SGLang's own vision tower and processor."""

from engine import llama4_server

from llama4_kernels.cli import demo
from llama4_kernels.cli.oracle import Oracle


def test_an_image_request(make, tmp_path):
    path = make("scout", vision=True)
    reference = demo.Reference(Oracle(path), None)
    with llama4_server(path, "--enable-multimodal", log=tmp_path / "log") as server:
        compared = demo.ask_about_image(server, reference, path)
    assert compared.difference.max() <= demo.TOLERANCE and compared.greedy == compared.generated
