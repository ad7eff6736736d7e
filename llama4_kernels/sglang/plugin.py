"""Entry point of the group `sglang.srt.plugins`: SGLang calls register() in each of its processes.

Every hook asks for `--model-impl llama4_kernels` before it does anything, so that without the flag nothing changes.
"""

from __future__ import annotations

import functools
import re
import sys

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

MODEL_IMPL = "llama4_kernels"

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_DETOKENIZER = "sglang.srt.managers.detokenizer_manager.DetokenizerManager"
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_PROFILER = "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager"
_RUNNER = "sglang.srt.model_executor.model_runner_components"
_SESSIONS = "sglang.srt.session.session_controller"

_registered: list[str] = []  # targets of hooks


def register() -> None:
    """Register the hooks; SGLang applies them when all plugins have registered."""
    if not _registered:
        _register(HOOKS)


def is_registered() -> bool:
    """Whether SGLang has called register() in this process."""
    return bool(_registered)


def missing_hooks() -> list[str]:
    """Targets of registered hooks that SGLang has not applied, which it logs as an error and then goes on."""
    return [target for target in dict.fromkeys(_registered) if target not in HookRegistry._patched]


def check_hooks() -> None:
    """RuntimeError unless SGLang has applied all registered hooks: without one of them the server may compute something else."""
    if missing := missing_hooks():
        needs = "install the release of SGLang that `llama4-kernels doctor` names, or leave the flag out"
        raise RuntimeError(f"--model-impl {MODEL_IMPL} hooks {', '.join(missing)}, which SGLang could not apply: {needs}")


def _register(hooks) -> None:
    for target, hook, kind in hooks:
        HookRegistry.register(target, hook, kind)
        _registered.append(target)


def is_our_model(model_config) -> bool:
    """Whether the server was started with --model-impl llama4_kernels. The draft model of speculative decoding is SGLang's own."""
    return _has_flag(model_config) and not model_config.is_draft_model


def _has_flag(model_config) -> bool:
    """Whether `model_config` is of a server started with --model-impl llama4_kernels: of its model or of the draft."""
    return str(model_config.model_impl).lower() == MODEL_IMPL


def server_has_flag() -> bool:
    """Whether this process is of a server started with --model-impl llama4_kernels: for hooks that are given no model_config."""
    from sglang.srt.runtime_context import get_context, get_model

    return get_context().is_config_namespace_published("model") and _has_flag(get_model())


def _prepare_launch(server_args) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    arguments = resolving_view(server_args)
    if _has_flag(arguments):
        from llama4_kernels.sglang.launch import prepare_launch

        prepare_launch(arguments)


def _derive_layers(result, model_config) -> None:
    """Refuse a model that is not Llama 4, and tell SGLang which layers keep one chunk of KV cache only: by the config's layer types,
    where SGLang assumes every fourth layer to be global and text-only checkpoints to have no local layers. Where no context is longer than a
    chunk there is nothing to free: a pool for local layers would only be a limit of its own."""
    if not is_our_model(model_config):
        return
    from llama4_kernels.sglang.config import ARCHITECTURES, apply_overrides, check_supported, local_and_global_layers

    architectures = model_config.hf_config.architectures or []
    if not set(architectures) & set(ARCHITECTURES):
        raise ValueError(f"--model-impl {MODEL_IMPL} serves Llama 4 ({' or '.join(ARCHITECTURES)}), this model is {architectures}")
    config = model_config.hf_text_config
    overrides = model_config.model_override_args
    apply_overrides(config, overrides if config is model_config.hf_config else overrides.get("text_config", {}))
    check_supported(config)
    local, full = local_and_global_layers(config)
    frees_slots = local and full and config.attention_chunk_size < model_config.context_len
    model_config.is_hybrid_swa = bool(frees_slots) and not model_config.disable_hybrid_swa_memory
    model_config.sliding_window_size = None  # of a field that Llama 4 does not read; SGLang would free keys by it within the chunk
    if model_config.is_hybrid_swa:
        model_config.swa_attention_layer_ids, model_config.full_attention_layer_ids = local, full
    else:
        model_config.swa_attention_layer_ids = model_config.full_attention_layer_ids = None


def _get_model_architecture(original, model_config):
    if not is_our_model(model_config):
        return original(model_config)
    check_hooks()
    from sglang.srt.configs.model_config import ModelImpl

    from llama4_kernels.sglang import model

    architecture = next(name for name in model_config.hf_config.architectures if hasattr(model, name))
    model_config._resolved_model_arch = architecture
    model_config._resolved_model_impl = ModelImpl.SGLANG
    return getattr(model, architecture), architecture


def _get_quant_config(original, model_config, *args, **kwargs):
    quant_config = original(model_config, *args, **kwargs)
    if quant_config is not None and is_our_model(model_config):
        from llama4_kernels.sglang.weights import adapt_quant_config

        adapt_quant_config(quant_config)
    return quant_config


def _build_attention_backend(original, *, model_runner, **kwargs):
    if not is_our_model(model_runner.model_config):
        return original(model_runner=model_runner, **kwargs)
    from llama4_kernels.sglang.attention import Llama4AttentionBackend

    # One for prefill and decode, whatever two names they are given: of two SGLang's wrapper keeps the end of a graph's warm-up to itself.
    return Llama4AttentionBackend(model_runner)


def _update_weights_from_disk(original, updater, *args, **kwargs):
    if not _has_flag(updater.model_config):
        return original(updater, *args, **kwargs)
    from llama4_kernels.sglang.updates import update_draft_from_disk, update_from_disk

    update = update_from_disk if is_our_model(updater.model_config) else update_draft_from_disk
    return update(original, updater, *args, **kwargs)


def _update_weights_from_tensor(original, updater, *args, **kwargs):
    if not _has_flag(updater.model_config):
        return original(updater, *args, **kwargs)
    from llama4_kernels.sglang.updates import update_from_tensors

    return update_from_tensors(original, updater, *args, **kwargs)


def _deserialize_own_rank(original, worker, serialized_named_tensors):
    """Have update_weights_from_tensor, which can answer, be given the error in place of the tensors."""
    if not _has_flag(worker.model_runner.model_config):
        return original(worker, serialized_named_tensors)
    try:
        return original(worker, serialized_named_tensors)
    except Exception as error:
        return error


def _hook_requests(result, manager) -> None:
    """Only of the process that takes requests: each hook takes SGLang's registry some 30 ms. Of them only one has routes, which the others would
    have to import."""
    if not is_our_model(manager.model_config):
        return
    register_request_hooks()
    if manager.model_config.is_multimodal:
        from llama4_kernels.sglang.images import bound_pixels

        register_image_hooks()
        bound_pixels()
    check_hooks()
    if "sglang.srt.entrypoints.http_server" in sys.modules:
        from llama4_kernels.sglang.patterns import bound_tool_calls
        from llama4_kernels.sglang.routes import hook_routes

        hook_routes()
        bound_tool_calls()


@functools.cache
def register_request_hooks() -> None:
    """Register and apply the hooks of the process that takes requests."""
    from llama4_kernels.sglang.request_hooks import REQUEST_HOOKS

    _register(REQUEST_HOOKS)
    HookRegistry.apply_hooks()


@functools.cache
def register_image_hooks() -> None:
    """Register and apply the hooks of the process that takes requests with images."""
    from llama4_kernels.sglang.request_hooks import IMAGE_HOOKS

    _register(IMAGE_HOOKS)
    HookRegistry.apply_hooks()


@functools.cache
def register_scheduler_hooks() -> None:
    """Register and apply the hooks of a process that schedules requests."""
    _register(SCHEDULER_HOOKS)
    HookRegistry.apply_hooks()


def _hook_scheduler(result, scheduler) -> None:
    """Before the scheduler makes what calls the functions hooked."""
    if is_our_model(scheduler.model_config):
        from llama4_kernels.sglang.patterns import bound_stop_patterns

        register_scheduler_hooks()
        bound_stop_patterns()


def _abort_one(original, scheduler, request):
    if request.abort_all or not request.rid or not is_our_model(scheduler.model_config):
        return original(scheduler, request)
    from llama4_kernels.sglang.aborts import spare_longer_rids

    with spare_longer_rids(scheduler, request.rid):
        return original(scheduler, request)


def _end_at_stop(original, request, *args, full_window_matched=True, **kwargs):
    """Where the tokens before the last one of a step cannot be searched in time, the answer ends with it, if it ends."""
    try:
        return original(request, *args, full_window_matched=full_window_matched, **kwargs)
    except re.error:
        return len(request.output_ids) if full_window_matched else None


def _forget_replaced_requests(session, req, *args, **kwargs) -> None:
    if server_has_flag():
        from llama4_kernels.sglang.sessions import forget_replaced_requests

        forget_replaced_requests(session, req.session_params)


def _refuse_lost_images(result, session, req, tokenizer, vocab_size, *args, **kwargs) -> None:
    node = None if session.streaming else session.req_nodes.get(result.rid)
    if node is not None and node.req is result and server_has_flag():
        from llama4_kernels.sglang.sessions import refuse_lost_images

        refuse_lost_images(session, result, len(req.input_ids), vocab_size)


def _let_requests_end(controller, session_id) -> None:
    if server_has_flag():
        from llama4_kernels.sglang.sessions import let_requests_end

        let_requests_end(controller.sessions[session_id])


def _leave_out_unread(processor, batch, result) -> None:
    if is_our_model(processor.model_config):
        from llama4_kernels.sglang.logprobs import leave_out_unread

        leave_out_unread(processor, batch, result)


def _tell_workers_apart(original, detokenizer, batch):
    """Requests of two HTTP processes may have one rid, by which SGLang keeps their texts: it is made unique by the process's address."""
    if not batch.http_worker_ipcs or not server_has_flag():
        return original(detokenizer, batch)
    rids = batch.rids
    batch.rids = [f"{rid} {ipc}" for rid, ipc in zip(rids, batch.http_worker_ipcs, strict=True)]
    try:
        return original(detokenizer, batch)
    finally:
        batch.rids = rids


def _start_profile_once(original, profiler, *args, **kwargs):
    """SGLang would start a second profile over the first."""
    if server_has_flag() and getattr(profiler, "profile_in_progress", False):
        from sglang.srt.managers.io_struct import ProfileReqOutput

        return ProfileReqOutput(success=False, message="Profiling is already in progress. Call /stop_profile first.")
    return original(profiler, *args, **kwargs)


def _free_rows_ruled_out(result, mask, logits) -> None:
    if server_has_flag():
        from llama4_kernels.sglang.sampling import free_rows_ruled_out

        free_rows_ruled_out(logits)


def _blame_min_new_tokens(result, processor, req=None, *args, **kwargs) -> None:
    if server_has_flag():
        from llama4_kernels.sglang.sampling import blame_min_new_tokens

        blame_min_new_tokens(req)


def _adjust_config_on_cpu(original, model_config, load_config, tp_size):
    """Leave the config as it is, where SGLang pads heads and intermediate sizes for its own CPU kernels: the ops ask for no alignment, and
    KV heads are replicated over ranks as on a GPU. SGLang's loader reads the head counts under the names of the padding."""
    if not is_our_model(model_config):
        return original(model_config, load_config, tp_size)
    for config in (model_config.hf_config, model_config.hf_text_config):
        config.original_num_attention_heads = model_config.num_attention_heads
        config.original_total_num_kv_heads = model_config.get_total_num_kv_heads()
    return model_config


HOOKS = (
    ("sglang.srt.server_args.ServerArgs.check_server_args", _prepare_launch, HookType.BEFORE),
    ("sglang.srt.configs.model_config.ModelConfig._derive_hybrid_model", _derive_layers, HookType.AFTER),
    ("sglang.srt.model_loader.utils.get_model_architecture", _get_model_architecture, HookType.AROUND),
    ("sglang.srt.model_loader.weight_utils.get_quant_config", _get_quant_config, HookType.AROUND),
    (f"{_RUNNER}.attention_backend_setup._build_resolved_backend", _build_attention_backend, HookType.AROUND),
    (f"{_RUNNER}.weight_updater.WeightUpdater.update_weights_from_disk", _update_weights_from_disk, HookType.AROUND),
    (f"{_RUNNER}.weight_updater.WeightUpdater.update_weights_from_tensor", _update_weights_from_tensor, HookType.AROUND),
    ("sglang.srt.managers.tp_worker.BaseTpWorker.deserialize_own_rank", _deserialize_own_rank, HookType.AROUND),
    (f"{_MANAGER}.init_model_config", _hook_requests, HookType.AFTER),
    ("sglang.srt.managers.scheduler.Scheduler.init_model_config", _hook_scheduler, HookType.AFTER),
    (f"{_DETOKENIZER}._decode_batch_token_id_output", _tell_workers_apart, HookType.AROUND),
    ("sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp", _adjust_config_on_cpu, HookType.AROUND),
)
SCHEDULER_HOOKS = (
    ("sglang.srt.managers.scheduler.Scheduler.abort_request", _abort_one, HookType.AROUND),
    ("sglang.srt.managers.schedule_batch.Req._locate_str_stop_finished_len", _end_at_stop, HookType.AROUND),
    (f"{_PROFILER}._start_profile", _start_profile_once, HookType.AROUND),
    (f"{_SESSIONS}.Session.create_req", _forget_replaced_requests, HookType.BEFORE),
    (f"{_SESSIONS}.Session.create_req", _refuse_lost_images, HookType.AFTER),
    (f"{_SESSIONS}.SessionController._close", _let_requests_end, HookType.BEFORE),
    ("sglang.srt.constrained.base_grammar_backend.GrammarMask.apply", _free_rows_ruled_out, HookType.AFTER),
    (f"{_RESULTS}.process_batch_result_prefill", _leave_out_unread, HookType.BEFORE),
    (f"{_RESULTS}._apply_prefill_grammar", _blame_min_new_tokens, HookType.AFTER),
    (f"{_RESULTS}._accept_grammar_tokens", _blame_min_new_tokens, HookType.AFTER),
)
