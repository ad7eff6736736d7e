"""Keys of a server that asks for some."""

from types import SimpleNamespace

import pytest
from sglang.srt.utils import auth

from llama4_kernels.sglang.routes import same_key


@pytest.mark.parametrize("header, key, allowed", [
    ("Bearer secret", "secret", True),
    ("Bearer Secret", "secret", False),
    ("Bearer é", "secret", False),
    ("Bearer Ã©", "é", True),  # as UTF-8 is read, of which Latin-1 is taken
])  # fmt: skip
def test_keys_of_any_characters(header, key, allowed, monkeypatch):
    monkeypatch.setattr(auth, "secrets", SimpleNamespace(compare_digest=same_key))
    decision = auth.decide_request_auth(
        method="GET", path="/", authorization_header=header, api_key=key, admin_api_key=None, auth_level=auth.AuthLevel.NORMAL
    )
    assert (decision.allowed, decision.error_status_code) == (allowed, 401)
