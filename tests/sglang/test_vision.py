"""Images through SGLang's own vision tower and processor."""

import base64
import io
import shutil

import pytest
import requests
from engine import llama4_server
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import save_file

from llama4_kernels.cli import demo
from llama4_kernels.cli.checkpoint_files import load_weights
from llama4_kernels.cli.oracle import Oracle
from llama4_kernels.sglang import vision
from llama4_kernels.sglang.vision import vision_tensors


def test_an_image_request(make, tmp_path):
    """And some that are refused: a text with the token of an image's parts, an image without a place in the text, a file that there is not."""
    path = make("scout", vision=True)
    reference = demo.Reference(Oracle(path), None)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    with llama4_server(path, *demo.VISION_FLAGS, log=tmp_path / "log") as server:
        for text, media, message in (
            ("<|image|><|patch|>", {"image_data": [image]}, "<|patch|> beside image_data"),
            ("a", {"image_data": [image]}, "image_data has 1 images, the prompt has <|image|> 0 times"),
            ("<|image|>", {"image_data": [image] * 2}, "image_data has 2 images, the prompt has <|image|> 1 times"),
            ("<|image|>", {"image_data": [image], "mm_hashes": ["ab"]}, "mm_hashes is given"),
            ("a", {"video_data": ["a.mp4"]}, "video_data is given"),
            ("a", {"audio_data": ["a.wav"]}, "audio_data is given"),
            ("", {"image_data": [image]}, "the request cannot be read"),
            ("<|image|>", {"image_data": [str(tmp_path / "nowhere.png")]}, "No such file or directory"),
        ):
            refused = requests.post(f"{server.url}/generate", json={"text": text, **media}, timeout=60)
            assert refused.status_code == 400 and message in refused.text, (text, refused.text)
        (place,) = server.post("/tokenize", {"prompt": "<|image|>", "add_special_tokens": False})["tokens"]
        places = {"input_ids": [[place], [place]], "image_data": [[image], [image]], "sampling_params": {"max_new_tokens": 1}}
        assert len(server.post("/generate", places)) == 2
        compared = demo.ask_about_image(server, reference, path)
    assert compared.difference.max() <= demo.TOLERANCE and compared.greedy == compared.generated


@pytest.fixture
def hub(monkeypatch):
    """Puts a folder in the place of the repository owner/name."""

    def serve(folder):
        def download(repository, name, *, revision, cache_dir):
            assert (repository, revision, cache_dir) == ("owner/name", "a-branch", "/cache")
            if not (folder / name).exists():
                raise EntryNotFoundError(name)
            return str(folder / name)

        monkeypatch.setattr(vision, "hf_hub_download", download)

    return serve


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("layout", ["an index", "one file"])
def test_the_vision_tower_is_found(layout, where, make, tmp_path, hub):
    path = make("scout", vision=True)
    weights = load_weights(path)
    if layout == "one file":
        save_file(weights, tmp_path / "model.safetensors")
        path = tmp_path
    hub(path)
    found = vision_tensors(str(path), None, None) if where == "folder" else vision_tensors("owner/name", "a-branch", "/cache")
    assert sorted(found) == sorted(name for name in weights if name.startswith("vision_model."))


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_checkpoint_without_a_vision_tower(where, make, tmp_path, hub):
    path = make("scout")
    checkpoint = str(path) if where == "folder" else "owner/name"
    hub(path)
    with pytest.raises(ValueError, match=f"{checkpoint} with --enable-multimodal, .* looked at model.safetensors$"):
        vision_tensors(checkpoint, "a-branch", "/cache")
    hub(tmp_path)
    with pytest.raises(ValueError, match=r"looked at model.safetensors.index.json and \*.safetensors, and found neither"):
        vision_tensors(str(tmp_path) if where == "folder" else checkpoint, "a-branch", "/cache")


def test_an_index_without_a_vision_tower(make, tmp_path):
    shutil.copy(make("scout", vision=True) / "model.safetensors.index.json", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("vision_model.", "language_model."))
    with pytest.raises(ValueError, match="looked at model.safetensors.index.json$"):
        vision_tensors(str(tmp_path), None, None)
