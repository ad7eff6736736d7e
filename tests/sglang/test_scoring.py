"""/v1/score: probabilities of labels after each item, and after each mark within one, against transformers."""

import pytest
import torch
from engine import TOLERANCE, llama4_server, prompt

LABELS = [5, 17, 250]
MARK = "<|reserved_special_token_3|>"


@pytest.mark.parametrize("text_only", [False, True])
def test_labels_after_items_and_after_marks(text_only, make, oracle, tmp_path):
    path = make("scout", text_only=text_only)

    def probabilities(ids, end):
        return [oracle(path).logprobs([*ids[:end], label])[0][-1].exp() for label in LABELS]

    flags = ("--disable-radix-cache", "--chunked-prefill-size=-1", "--mem-fraction-static=0.5")  # as SGLang asks where marks are scored
    with llama4_server(path, *flags, log=tmp_path / "log") as server:
        (mark,) = server.post("/tokenize", {"prompt": MARK, "add_special_tokens": False})["tokens"]
        query, items = prompt(70), [[*prompt(3, seed=1), mark], [*prompt(9, seed=2), mark, *prompt(60, seed=2), mark, 7]]
        question = {"model": "tiny", "query": query, "items": items, "label_token_ids": LABELS}

        after_items = server.post("/v1/score", question)["scores"]
        want = [probabilities(query + item, len(query + item)) for item in items]
        torch.testing.assert_close(torch.tensor(after_items), torch.tensor(want), atol=TOLERANCE, rtol=0)

        after_marks = server.post("/v1/score", question | {"score_extraction_token": MARK})["scores"]
        for item, found in zip(items, after_marks, strict=True):
            ids = query + item
            want = [probabilities(ids, end) for end, token in enumerate(ids, start=1) if token == mark]
            torch.testing.assert_close(torch.tensor(found), torch.tensor(want), atol=TOLERANCE, rtol=0)
