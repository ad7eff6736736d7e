"""Images through SGLang's own vision tower and processor."""

import base64
import io

import requests
from engine import llama4_server
from PIL import Image

from llama4_kernels.cli import demo
from llama4_kernels.cli.oracle import Oracle


def test_an_image_request(make, tmp_path):
    """And a text that has the token of an image's parts itself, which is refused."""
    path = make("scout", vision=True)
    reference = demo.Reference(Oracle(path), None)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    with llama4_server(path, "--enable-multimodal", log=tmp_path / "log") as server:
        refused = requests.post(f"{server.url}/generate", json={"text": "<|image|><|patch|>", "image_data": [image]}, timeout=60)
        assert refused.status_code == 400 and "<|patch|> beside image_data" in refused.text
        compared = demo.ask_about_image(server, reference, path)
    assert compared.difference.max() <= demo.TOLERANCE and compared.greedy == compared.generated
