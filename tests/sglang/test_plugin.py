"""The plugin's hooks one by one: what they leave to SGLang, and what they hand on."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.session.session_controller import Session, SessionReqNode

from llama4_kernels.sglang import plugin, request_hooks, updates


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
    (request_hooks._read_request, ["no request"], {}),
    (request_hooks._load_image, ["no image"], {}),
    (request_hooks._init_request_state, [STOCK, "no request", None], {}),
    (plugin._abort_one, [STOCK, SimpleNamespace(abort_all=False, rid="a")], {}),
    (plugin._tell_workers_apart, ["no detokenizer", SimpleNamespace(http_worker_ipcs=["a"])], {}),
    (plugin._start_profile_once, [SimpleNamespace(profile_in_progress=True)], {}),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_what_other_servers_compute_is_left_to_sglang(hook, arguments, options):
    original = Mock()
    result = hook(original, *arguments, **options)
    original.assert_called_once_with(*arguments, **options)
    assert result is original.return_value


def test_what_other_servers_are_asked_is_left_to_sglang():
    for hook in (plugin._derive_layers, plugin._hook_requests):
        hook(None, STOCK if hook is plugin._hook_requests else STOCK.model_config)
    request_hooks._check_request(None, STOCK, "no request", [])
    request_hooks._check_tokenized("no request", STOCK)
    request_hooks._check_samples(None, "no request")
    request_hooks._check_control_request(Mock(side_effect=ValueError), STOCK)
    plugin._hook_scheduler(None, STOCK)
    plugin._forget_replaced_requests("no session", SimpleNamespace(session_params=None))
    plugin._refuse_lost_images("no request", SimpleNamespace(streaming=True), "no request", None, 0)
    plugin._let_requests_end("no controller", "no session")
    request_hooks._nest_images("no request")
    request_hooks._check_image_file("/dev/zero")
    plugin._free_rows_ruled_out(None, "no mask", "no logits")
    plugin._blame_min_new_tokens(None, "no processor")


@pytest.mark.parametrize("is_draft, update", [(False, "update_from_disk"), (True, "update_draft_from_disk")])
def test_weights_of_the_draft_model_are_updated_as_sglang_does(is_draft, update, monkeypatch):
    monkeypatch.setattr(updates, update, lambda original, updater, *args: (update, *args))
    updater = SimpleNamespace(model_config=of(plugin.MODEL_IMPL, is_draft))
    assert plugin._update_weights_from_disk(None, updater, "path") == (update, "path")


def test_what_ends_an_answer():
    tokenizer = SimpleNamespace(eos_token_id=2, additional_stop_token_ids={3})
    assert request_hooks._end_tokens(SimpleNamespace(hf_eos_token_id={1}), tokenizer) == {1, 2, 3}
    assert request_hooks._end_tokens(SimpleNamespace(hf_eos_token_id={1}), None) == {1}
    tokenizer = SimpleNamespace(eos_token_id=None, additional_stop_token_ids=None)
    assert request_hooks._end_tokens(SimpleNamespace(hf_eos_token_id=None), tokenizer) == frozenset()


@pytest.mark.parametrize("turn, streaming, left", [
    ({"replace": True}, False, ""),
    ({"replace": True, "rid": "a"}, False, "ac"),
    ({"replace": True, "rid": "c"}, False, "abc"),
    ({"replace": True, "rid": "unknown"}, False, "abc"),
    ({}, False, "abc"),
    ({"replace": True}, True, "abc"),
], ids=str)  # fmt: skip
def test_what_a_request_replaces_of_a_session_is_cleared(turn, streaming, left, monkeypatch):
    session = session_of(("a", None), ("b", "a"), ("c", None), streaming=streaming)
    replace(session, turn, monkeypatch)
    assert list(session.req_nodes) == list(left)


def test_turns_that_took_over_a_rid_are_cleared(monkeypatch):
    for turn, left in (({"rid": "a"}, ["a"]), ({}, [])):
        session = session_of(("a", None), ("b", "a"), ("b", "a"), ("c", "b"), ("c", "c"))
        replace(session, {"replace": True} | turn, monkeypatch)
        assert list(session.req_nodes) == left and not any(node.children for node in session.req_nodes.values())


def test_many_turns_are_cleared_and_the_one_that_runs_aborted(monkeypatch):
    """More of them than Python calls go within each other."""
    for turn, left in (({"rid": "0"}, ["0"]), ({}, [])):
        session = session_of(*((str(i), str(i - 1) if i else None) for i in range(2000)))
        last = session.req_nodes["1999"].req
        last.finished_reason = None
        replace(session, {"replace": True} | turn, monkeypatch)
        assert list(session.req_nodes) == left and isinstance(last.to_finish, FINISH_ABORT)


def session_of(*turns, streaming=False):
    """Of turns (rid, rid of the one before) that have ended."""
    session = Session(1000, streaming=streaming)
    for rid, parent in turns:
        session.req_nodes[rid] = SessionReqNode(SimpleNamespace(rid=rid, finished_reason="stop"), session.req_nodes.get(parent))
    return session


def replace(session, turn, monkeypatch):
    monkeypatch.setattr(plugin, "server_has_flag", lambda: True)
    plugin._forget_replaced_requests(session, SimpleNamespace(session_params=SimpleNamespace(**{"replace": False, "rid": None} | turn)))


def test_an_abort_spares_requests_whose_rids_begin_with_its_own():
    requests = {rid: SimpleNamespace(rid=rid) for rid in ("a", "ab", "abc", "b", "ac", "job_0", "job_12", "job_x")}
    a, ab, abc, b, ac, *jobs = requests.values()
    scheduler = SimpleNamespace(
        waiting_queue=[a, ab, *jobs], grammar_manager=SimpleNamespace(grammar_queue=[abc]), collect_inflight_reqs=lambda: [ab, b], chunked_req=ac,
        model_config=of(plugin.MODEL_IMPL),
    )  # fmt: skip

    def aborted(rid, abort_all=False, fails=False):
        def original(scheduler, request):
            found = [name for name, each in requests.items() if request.abort_all or each.rid.startswith(request.rid)]
            if fails:
                raise RuntimeError
            return found

        result = plugin._abort_one(original, scheduler, SimpleNamespace(rid=rid, abort_all=abort_all))
        assert all(each.rid == name for name, each in requests.items())
        return result

    assert aborted("job") == ["job_0", "job_12"], "a batch's"
    assert aborted("a") == ["a"] and aborted("ab") == ["ab"] and aborted("") == aborted("", abort_all=True) == list(requests)
    with pytest.raises(RuntimeError):
        aborted("a", fails=True)
    assert [each.rid for each in requests.values()] == list(requests)


def test_a_profile_is_started_once(monkeypatch):
    monkeypatch.setattr(plugin, "server_has_flag", lambda: True)
    original = Mock()
    refused = plugin._start_profile_once(original, SimpleNamespace(profile_in_progress=True))
    assert not refused.success and "already in progress" in refused.message and not original.called
    assert plugin._start_profile_once(original, SimpleNamespace(profile_in_progress=False)) is original.return_value


def test_a_model_is_not_built_with_a_part_of_the_hooks(monkeypatch):
    """SGLang logs a hook that it cannot apply, and goes on."""
    monkeypatch.setattr(plugin, "_registered", ["sglang.gone.Class.method"])
    with pytest.raises(RuntimeError, match="--model-impl llama4_kernels hooks sglang.gone.Class.method, which SGLang could not apply"):
        plugin._get_model_architecture(Mock(), of(plugin.MODEL_IMPL))
