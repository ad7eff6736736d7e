"""Images, videos and audio that SGLang 0.5.23 takes, and leaves out of what it computes without a word, or fails at."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageTokens:
    """What stands for an image in a prompt, and for each of its parts in what is computed, in text and as a token; and of a tile of an
    image its side in pixels and how many parts it has."""

    image: str
    image_id: int
    part: str
    part_id: int
    side: int
    parts: int


def check_media(request, input_ids: list[int], tokens: ImageTokens | None) -> None:
    """ValueError for media that would not all be computed.

    request: SGLang's GenerateReqInput of one prompt.
    input_ids: the prompt's tokens, with those of the parts of images.
    tokens: None where the model sees no images.
    """
    from sglang.srt.multimodal.mm_utils import has_valid_data

    for name in ("video_data", "audio_data"):
        if has_valid_data(getattr(request, name)):
            raise ValueError(f"{name} is given, needs text and images only")
    if not has_valid_data(request.image_data):
        return
    if tokens is None:
        raise ValueError("image_data is given, needs a checkpoint with a vision tower and a server with --enable-multimodal")
    if request.mm_hashes:
        raise ValueError("mm_hashes is given, needs images without: other requests would be answered from the cache for another image")
    images = request.image_data if isinstance(request.image_data, list) else [request.image_data]
    formats = {_format(image) for image in images}
    if "precomputed_embedding" in formats:
        raise ValueError("image_data has the format precomputed_embedding, needs images or the format processor_output")
    if formats == {"processor_output"}:
        for image in images:
            _check_processed(image, input_ids, tokens)
        return
    if _count(request, tokens.part, tokens.part_id):
        raise ValueError(f"the prompt has {tokens.part} beside image_data, needs one {tokens.image} for each image, no more")
    places = _count(request, tokens.image, tokens.image_id)
    if places != len(images):
        raise ValueError(f"image_data has {len(images)} images, the prompt has {tokens.image} {places} times, needs one for each image")


def _check_processed(image: dict, input_ids: list[int], tokens: ImageTokens) -> None:
    """What a processor made of an image, which SGLang's Engine takes as it is."""
    modality, pixels = image.get("modality", "image"), image.get("pixel_values")
    if getattr(modality, "name", str(modality)).lower() != "image":
        raise ValueError(f"image_data has the modality {modality}, needs image")
    size = (3, tokens.side, tokens.side)
    if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point() or pixels.dim() != 4 or pixels.shape[1:] != size:
        found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"image_data has pixel_values of {found}, needs a tensor of floats, [tiles, {', '.join(map(str, size))}]")
    places = [i for i, token in enumerate(input_ids) if token == tokens.part_id]
    if len(places) != len(pixels) * tokens.parts:
        raise ValueError(
            f"image_data has {len(pixels)} tiles, the prompt {len(places)} times {tokens.part}, needs {tokens.parts} for each tile"
        )
    offsets = image.get("offsets")
    if offsets is not None and [i for first, last in offsets for i in range(int(first), int(last) + 1)] != places:
        raise ValueError(f"image_data has offsets other than the places of {tokens.part} in the prompt, needs those, or none")


def _count(request, text: str, token: int) -> int:
    return request.text.count(text) if request.text else (request.input_ids or []).count(token)


def _format(image) -> str:
    """Of what SGLang's Engine takes in place of an image, processor_output or precomputed_embedding; empty for an image."""
    given = image.get("format", "") if isinstance(image, dict) else ""
    return getattr(given, "name", given).lower()
