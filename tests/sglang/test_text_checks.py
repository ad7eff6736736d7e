"""Texts that are too long for any prompt; test_bad_requests.py asks a server."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama4_kernels.sglang.text_checks import check_length, longest_token

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPLIT = pre_tokenizers.Split(Regex(r"\s+"), "isolated")


def tokenizer(alphabet=BYTES, *, steps=(SPLIT, pre_tokenizers.ByteLevel(use_regex=False)), normalizer=None, added="<|long|>"):
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([added])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def manager(**changes):
    return SimpleNamespace(**{"allow_auto_truncate": False, "tokenizer": tokenizer(), "context_len": 16} | changes)


def test_no_more_characters_than_a_prompts_tokens_have():
    longest = "<|long|>" * 16
    assert longest_token(tokenizer()) == len("<|long|>") and len(tokenizer()(longest).input_ids) == 16
    for texts in (None, longest, ["a", longest], [["a" * 1000, "of another route"]]):
        check_length("text", texts, manager())
    for texts in (longest + "a", ["a", longest + "a"]):
        with pytest.raises(ValueError, match="text has 129 characters, needs at most 128"):
            check_length("text", texts, manager())


@pytest.mark.parametrize("tokens", [
    tokenizer(BYTES[1:]),
    tokenizer(normalizer=normalizers.Strip()),
    tokenizer(steps=[pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]),
    tokenizer(steps=[pre_tokenizers.Whitespace()]),
    tokenizer(added=AddedToken("<|long|>", lstrip=True)),
    Mock(spec=["get_vocab"]),
])  # fmt: skip
def test_tokenizers_whose_tokens_may_stand_for_more_characters(tokens):
    assert longest_token.__wrapped__(tokens) is None
    check_length("text", "a" * 1000, manager(tokenizer=tokens))


def test_servers_that_cut_long_texts_off_or_take_none():
    for changes in ({"allow_auto_truncate": True}, {"tokenizer": None}):
        check_length("text", "a" * 1000, manager(**changes))
