"""Texts that are too long for any prompt are refused before SGLang 0.5.23 counts their tokens: of tens of megabytes that takes a minute, in
which nobody is answered, and more than a hundred times their memory."""

from __future__ import annotations

import functools
import json

from tokenizers import models, pre_tokenizers


def check_length(name: str, texts: str | list | None, manager) -> None:
    """ValueError where a text, the argument `name`, has more characters than all tokens of a prompt can stand for.

    manager: SGLang's TokenizerManager.
    """
    if manager.allow_auto_truncate or manager.tokenizer is None:
        return
    for text in texts if isinstance(texts, list) else [texts]:
        if not isinstance(text, str) or len(text) <= manager.context_len:
            continue
        longest = longest_token(manager.tokenizer)
        if longest is not None and len(text) > (most := longest * manager.context_len):
            tokens = f"{longest} for each of the {manager.context_len} tokens of the context"
            raise ValueError(f"{name} has {len(text)} characters, needs at most {most}, {tokens}")


@functools.cache
def longest_token(tokenizer) -> int | None:
    """In characters. None where a token might stand for more, or some characters for no token, as they do not in BPE of bytes alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None or backend.truncation is not None or not isinstance(backend.model, models.BPE):
        return None
    vocabulary = tokenizer.get_vocab()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if not _on_bytes(backend.pre_tokenizer) or not alphabet <= vocabulary.keys():
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    return max(map(len, vocabulary))  # in bytes, of which each is a character there, and of tokens in plain text in characters


def _on_bytes(pre_tokenizer) -> bool:
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    types = {step["type"] for step in steps}
    return types <= {"ByteLevel", "Split"} and "ByteLevel" in types and all(step.get("behavior") != "Removed" for step in steps)
