"""Images that a server is asked about: of every size and kind of source, in prompts of tokens, in sessions, and such as end stock SGLang."""

import asyncio
import base64
import io
import os
import threading
import time
from types import SimpleNamespace

import pytest
import requests
from engine import llama4_server
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from llama4_kernels.cli import demo
from llama4_kernels.sglang import images, request_hooks, sessions
from llama4_kernels.sglang.media_checks import check_media


def png(size=(8, 8), mode="RGB", colour=0):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def server(make, tmp_path_factory):
    with llama4_server(make("scout", vision=True), *demo.VISION_FLAGS, log=tmp_path_factory.mktemp("images") / "log") as server:
        yield server


def generate(server, **body):
    body = {"sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}} | body
    return requests.post(f"{server.url}/generate", json=body, timeout=60)


def tokens(server, text):
    return server.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]


def close(server, session):
    assert requests.post(f"{server.url}/close_session", json={"session_id": session}, timeout=60).status_code == 200


def assert_alive(server):
    """And as it was: the same answer to the same question, and nothing that is left over."""
    before = server.__dict__.setdefault("first answer", generate(server, text="<|image|>a", image_data=[png()]).json()["output_ids"])
    assert generate(server, text="<|image|>a", image_data=[png()]).json()["output_ids"] == before


def test_a_prompt_of_tokens_is_computed_as_it_is(server):
    """Also such as a text of them would be other tokens of, and the characters of the name of a part of an image."""
    (image,) = tokens(server, "<|image|>")
    spelled = [ord(letter) for letter in "<|patch|>"]
    for given in ([230, image, 230], [*spelled, image, *spelled], [image, 65, image]):
        pictures = [png(), png((30, 9), colour=200)][: given.count(image)]
        answer = generate(server, input_ids=given, image_data=pictures, return_prompt_token_ids=True)
        assert answer.status_code == 200, answer.text
        got = answer.json()["prompt_token_ids"]
        start, end = tokens(server, "<|image_start|><|image_end|>")
        outside, inside = [], False
        for token in got:
            inside = inside or token == start
            if not inside:
                outside.append(token)
            elif token == end:
                inside, outside = False, [*outside, image]
        assert outside == given
    text = "ab<|image|>cd<|image|>"
    pair = [png(), png((30, 9), colour=200)]
    by_text, by_tokens = generate(server, text=text, image_data=pair), generate(server, input_ids=tokens(server, text), image_data=pair)
    assert by_text.json()["output_ids"] == by_tokens.json()["output_ids"]
    assert_alive(server)


def test_samples_of_a_prompt_with_several_images(server):
    body = {"text": "<|image|>a<|image|>", "image_data": [png(), png(colour=99)]}
    one = generate(server, **body).json()["output_ids"]
    two = generate(server, **body, sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True, "n": 2})
    assert two.status_code == 200 and [each["output_ids"] for each in two.json()] == [one, one]


def test_images_that_cannot_be_read_are_refused(server, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "image.png").write_bytes(base64.b64decode(png().split(",")[1]))
    for source, message in (
        (f"file://{tmp_path}/pipe", "needs a regular file"),
        ("/dev/zero", "needs a regular file"),
        ("file:///proc/self/environ", "needs a regular file"),
        (png((10000, 9000), "1"), "exceeds limit"),
        ("data:image/x-dds;base64," + base64.b64encode(b"DDS |\0\0\0" + bytes(120)).decode(), "Error while loading"),
    ):
        refused = generate(server, text="<|image|>", image_data=[source])
        assert refused.status_code == 400 and message in refused.text, (source[:80], refused.text)
    assert generate(server, text="<|image|>", image_data=[f"file://{tmp_path}/image.png"]).status_code == 200
    for route, body in (("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["!"]}]}),
                        ("/api/generate", {"prompt": "a", "images": ["!"]})):  # fmt: skip
        refused = requests.post(server.url + route, json={"model": "m", "stream": False, **body}, timeout=60)
        assert refused.status_code == 400 and "images is given" in refused.text
    assert_alive(server)


def test_turns_that_continue_images(server):
    """Past an image all is well; within one, or after an abort whose images are gone, the turn is refused and the server lives on."""
    session = server.post("/open_session", {"capacity_of_str_len": 1000})
    first = generate(server, text="abc<|image|>def", image_data=[png()], session_params={"id": session}).json()
    length, rid = first["meta_info"]["prompt_tokens"], first["meta_info"]["id"]
    for offset in (1, 4, length - 5):
        refused = generate(server, text="q" * 12, session_params={"id": session, "rid": rid, "offset": offset})
        assert refused.status_code == 400 and "behind all images" in refused.text, (offset, refused.text)
    for offset in (length - 4, length, -1, 1000):
        answer = generate(server, text="q" * 12, session_params={"id": session, "rid": rid, "offset": offset})
        assert answer.status_code == 200, (offset, answer.text)
    aborted = threading.Thread(target=generate, args=(server,), kwargs=dict(
        text="abc<|image|>def", image_data=[png(colour=7)], rid="t1", session_params={"id": session},
        sampling_params={"max_new_tokens": 900, "ignore_eos": True}))  # fmt: skip
    aborted.start()
    time.sleep(1)
    requests.post(f"{server.url}/abort_request", json={"rid": "t1"}, timeout=60)
    aborted.join()
    requests.post(f"{server.url}/flush_cache", timeout=60)
    refused = generate(server, text="more", session_params={"id": session, "rid": "t1"})
    assert refused.status_code == 400 and "released when it was aborted" in refused.text
    close(server, session)
    assert_alive(server)


def test_a_session_is_closed_while_an_image_waits(server):
    session = server.post("/open_session", {"capacity_of_str_len": 1000})
    long = {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}
    waiting = [threading.Thread(target=generate, args=(server,), kwargs=dict(text=f"{i}", sampling_params=long)) for i in range(8)]
    answers = []
    turn = dict(text="abc<|image|>def", image_data=[png(colour=123)], session_params={"id": session})
    waiting.append(threading.Thread(target=lambda: answers.append(generate(server, **turn))))
    for thread in waiting:
        thread.start()
        time.sleep(0.1)
    close(server, session)
    for thread in waiting:
        thread.join()
    assert answers[0].status_code == 200
    assert_alive(server)


@pytest.mark.parametrize("size", [(8, 8), (300, 30)])
def test_what_a_processor_makes_of_an_image_is_taken(size, make):
    path = make("scout", vision=True)
    processor, config = AutoProcessor.from_pretrained(path), AutoConfig.from_pretrained(path)
    made = processor(text="a<|image|>", images=[Image.new("RGB", size)], return_tensors="pt")
    tokens = request_hooks._image_tokens(
        SimpleNamespace(_processor=processor, IM_TOKEN_ID=config.image_token_index, vision_config=config.vision_config)
    )
    image = {"format": "processor_output", "pixel_values": made["pixel_values"]}
    request = SimpleNamespace(image_data=[image], video_data=None, audio_data=None, mm_hashes=None)
    check_media(request, made["input_ids"][0].tolist(), tokens)
    image["pixel_values"] = made["pixel_values"][1:]
    with pytest.raises(ValueError, match="for each tile"):
        check_media(request, made["input_ids"][0].tolist(), tokens)


@pytest.mark.parametrize("source", [b"bytes", "data:,a", "https://example.org/a.png", "/nowhere/a.png"])
def test_sources_that_sglang_reads_or_refuses_itself(source):
    images.check_file(source)


def test_a_file_that_is_too_large(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="needs at most"):
        images.check_file(str(tmp_path / "large"))


def test_what_is_no_error_of_the_image_stays_one():
    for cause in (MemoryError(), ImportError()):
        with pytest.raises(RuntimeError), images.read_image():
            raise RuntimeError from cause


def test_blocks_of_another_number_than_images_are_an_error():
    async def original(processor, image_data, text):
        return SimpleNamespace(input_ids=[1, 5, 2, 1], mm_items=[])

    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: 9)
    processor = SimpleNamespace(_processor=SimpleNamespace(image_token="i"), _tokenizer=tokenizer, IM_START_TOKEN_ID=1, IM_END_TOKEN_ID=2)
    with pytest.raises(ValueError):
        asyncio.run(images.process_tokens(original, processor, ["a"], [9]))


def test_images_are_left_to_requests_that_have_not_ended():
    for finished, left in ((True, 1), (False, 0)):
        nodes = {"a": SimpleNamespace(req=SimpleNamespace(finished=lambda finished=finished: finished))}
        session = SimpleNamespace(streaming=False, req_nodes=nodes)
        sessions.let_requests_end(session)
        assert len(session.req_nodes) == left
