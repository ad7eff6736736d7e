"""Images, videos and audio that SGLang 0.5.23 takes, and leaves out of what it computes without a word, or fails at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageTokens:
    """What stands for an image in a prompt, and for each of its parts in what is computed, in text and as a token."""

    image: str
    image_id: int
    part: str
    part_id: int


def check_media(request, tokens: ImageTokens | None) -> None:
    """ValueError for media that would not all be computed.

    request: SGLang's GenerateReqInput of one prompt.
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
    images = request.image_data if isinstance(request.image_data, list) else [request.image_data]
    formats = {_format(image) for image in images}
    if "precomputed_embedding" in formats:
        raise ValueError("image_data has the format precomputed_embedding, needs images or the format processor_output")
    if formats == {"processor_output"}:
        return
    if _count(request, tokens.part, tokens.part_id):
        raise ValueError(f"the prompt has {tokens.part} beside image_data, needs one {tokens.image} for each image, no more")
    places = _count(request, tokens.image, tokens.image_id)
    if places != len(images):
        raise ValueError(f"image_data has {len(images)} images, the prompt has {tokens.image} {places} times, needs one for each image")


def _count(request, text: str, token: int) -> int:
    return request.text.count(text) if request.text else (request.input_ids or []).count(token)


def _format(image) -> str:
    """Of what SGLang's Engine takes in place of an image, processor_output or precomputed_embedding; empty for an image."""
    given = image.get("format", "") if isinstance(image, dict) else ""
    return getattr(given, "name", given).lower()
