"""How SGLang 0.5.23 reads images of requests: files that have no end, errors of formats that it does not expect, and prompts of tokens."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from urllib.parse import unquote, urlparse

MAX_FILE_BYTES = 1 << 29
MAX_PIXELS = 89_478_485  # at which Pillow warns of a decompression bomb


def bound_pixels() -> None:
    """Have Pillow refuse images of more than MAX_PIXELS, which a file of some kilobytes may have. Its error comes at twice its own limit."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2


def check_file(source: str | bytes) -> None:
    """ValueError for the path of a file that may be read for ever, or without end: SGLang reads all of it."""
    if not isinstance(source, str) or not source.startswith(("file://", "/")):
        return
    path = os.path.realpath(unquote(urlparse(source).path) if source.startswith("file://") else source)
    if not os.path.exists(path):
        return  # SGLang says so
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or path.startswith(("/proc/", "/sys/")):
        raise ValueError(f"image_data names {source}, needs a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise ValueError(f"image_data names {source} of {found.st_size} bytes, needs at most {MAX_FILE_BYTES}")


@contextlib.contextmanager
def read_image() -> Iterator[None]:
    """ValueError, as SGLang has it for other images that cannot be read, where a decoder raises an error of a kind of its own."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, (MemoryError, ImportError)):
            raise
        raise ValueError(str(error)) from error


async def process_tokens(original, processor, image_data, given: list[int], *args, **kwargs):
    """SGLang's output for a prompt of tokens, with these very tokens: SGLang makes a text of them, and of the text perhaps others.

    original: the processor's method, which is asked for the images alone; what it makes of each takes the place of its token.
    """
    image = processor._processor.image_token
    image_id = processor._tokenizer.convert_tokens_to_ids(image)
    images = image_data if isinstance(image_data, list) else [image_data]
    is_processed = any(isinstance(each, dict) for each in images)
    if is_processed or given.count(image_id) != len(images):  # of which check_media refuses the second
        return await original(processor, image_data, given, *args, **kwargs)
    output = await original(processor, image_data, image * len(images), *args, **kwargs)
    starts = [i for i, token in enumerate(output.input_ids) if token == processor.IM_START_TOKEN_ID]
    ends = [i + 1 for i, token in enumerate(output.input_ids) if token == processor.IM_END_TOKEN_ID]
    blocks = iter(list(zip(starts, ends, strict=True)))
    tokens, moved = [], []
    for token in given:
        if token != image_id:
            tokens.append(token)
            continue
        start, end = next(blocks)
        moved.append((start, end, len(tokens) - start))
        tokens += output.input_ids[start:end]
    for item in output.mm_items:
        item.offsets = [_moved(first, last, moved) for first, last in item.offsets]
    output.input_ids = tokens
    return output


def _moved(first: int, last: int, moved: list[tuple[int, int, int]]) -> tuple[int, int]:
    by = next(by for start, end, by in moved if start <= first < end)
    return first + by, last + by


def nest(request) -> None:
    """Several images of one prompt, for SGLang to take as those of each of its samples: a flat list it takes for one image a prompt."""
    images = request.image_data
    if request.batch_size == 1 and isinstance(images, list) and len(images) > 1 and not isinstance(images[0], list):
        request.image_data = [images]
