"""The plugin's hooks one by one: what they leave to SGLang, and what they hand on."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from sglang.srt.session.session_controller import Session, SessionReqNode

from llama4_kernels.sglang import plugin, updates


def of(model_impl, is_draft_model=False):
    return SimpleNamespace(model_impl=model_impl, is_draft_model=is_draft_model)


STOCK = SimpleNamespace(model_config=of("auto"))


@pytest.mark.parametrize("hook, arguments, options", [
    (plugin._get_model_architecture, [STOCK.model_config], {}),
    (plugin._get_quant_config, [STOCK.model_config], {}),
    (plugin._build_attention_backend, [], {"model_runner": STOCK}),
    (plugin._update_weights_from_disk, [STOCK, "path"], {"load_format": "auto"}),
    (plugin._update_weights_from_tensor, [STOCK, []], {}),
    (plugin._deserialize_own_rank, [SimpleNamespace(model_runner=STOCK), []], {}),
    (plugin._adjust_config_on_cpu, [STOCK.model_config, None, 2], {}),
    (plugin._read_request, ["no request"], {}),
    (plugin._init_request_state, [STOCK, "no request", None], {}),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_what_other_servers_compute_is_left_to_sglang(hook, arguments, options):
    original = Mock()
    result = hook(original, *arguments, **options)
    original.assert_called_once_with(*arguments, **options)
    assert result is original.return_value


def test_what_other_servers_are_asked_is_left_to_sglang():
    for hook in (plugin._derive_layers, plugin._hook_routes):
        hook(None, STOCK if hook is plugin._hook_routes else STOCK.model_config)
    plugin._check_request(None, STOCK, "no request", [])
    plugin._check_types("no request", STOCK)
    plugin._check_samples(None, "no request")
    plugin._check_control_request(Mock(side_effect=ValueError), STOCK)
    plugin._bound_stop_patterns(None, STOCK)
    plugin._forget_replaced_requests("no session", SimpleNamespace(session_params=None))
    plugin._free_rows_ruled_out(None, "no mask", "no logits")
    plugin._blame_min_new_tokens(None, "no processor")


@pytest.mark.parametrize("is_draft, update", [(False, "update_from_disk"), (True, "update_draft_from_disk")])
def test_weights_of_the_draft_model_are_updated_as_sglang_does(is_draft, update, monkeypatch):
    monkeypatch.setattr(updates, update, lambda original, updater, *args: (update, *args))
    updater = SimpleNamespace(model_config=of(plugin.MODEL_IMPL, is_draft))
    assert plugin._update_weights_from_disk(None, updater, "path") == (update, "path")


def test_what_ends_an_answer():
    tokenizer = SimpleNamespace(eos_token_id=2, additional_stop_token_ids={3})
    assert plugin._end_tokens(SimpleNamespace(hf_eos_token_id={1}), tokenizer) == {1, 2, 3}
    assert plugin._end_tokens(SimpleNamespace(hf_eos_token_id={1}), None) == {1}
    tokenizer = SimpleNamespace(eos_token_id=None, additional_stop_token_ids=None)
    assert plugin._end_tokens(SimpleNamespace(hf_eos_token_id=None), tokenizer) == frozenset()


@pytest.mark.parametrize("turn, streaming, left", [
    ({"replace": True}, False, []),
    ({"replace": True, "rid": "a"}, False, ["a", "b", "c"]),
    ({}, False, ["a", "b", "c"]),
    ({"replace": True}, True, ["a", "b", "c"]),
], ids=str)  # fmt: skip
def test_a_session_is_cleared_where_a_request_replaces_all_of_it(turn, streaming, left, monkeypatch):
    monkeypatch.setattr(plugin, "_is_served", lambda: True)
    session = Session(1000, streaming=streaming)
    for rid, parent in (("a", None), ("b", "a"), ("c", None)):
        session.req_nodes[rid] = SessionReqNode(SimpleNamespace(rid=rid, finished_reason="stop"), session.req_nodes.get(parent))
    request = SimpleNamespace(session_params=SimpleNamespace(**{"replace": False, "rid": None} | turn))
    plugin._forget_replaced_requests(session, request)
    assert list(session.req_nodes) == left
