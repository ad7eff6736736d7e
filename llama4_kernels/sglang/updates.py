"""Weights loaded into a model that serves. SGLang ends the server where loading fails: it lets the error of tensors pass, and goes back
from a checkpoint that does not fit by loading the same again. Here a checkpoint is checked before any of it is loaded, and failures are
answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader
from sglang.srt.runtime_context import get_parallel

from llama4_kernels.sglang.checkpoint import without_data
from llama4_kernels.sglang.model import Llama4ForConditionalGeneration

logger = logging.getLogger("llama4_kernels")

Outcome = tuple[bool, str]
UNTOUCHED = "None of them was loaded, those before are served on."
IN_PART = "The weights may now be new ones in part: load all of them before more is asked."


def update_from_disk(
    original: Callable[..., Outcome],
    updater: WeightUpdater,
    model_path: str,
    load_format: str,
    weight_name_filter: Callable[[str], bool] | None = None,
    **kwargs,
) -> Outcome:
    """WeightUpdater.update_weights_from_disk, `original`, for our model: (whether it was done, message).

    Without `weight_name_filter` the checkpoint has to bring every weight. The headers of safetensors files are checked on every rank before
    any weight is written.
    """
    config, model = updater.model_config, updater.get_model()
    served = config.model_path
    config.model_path = model.source = model_path
    outcome = _on_all_ranks(lambda: _check(updater, load_format, weight_name_filter), UNTOUCHED)
    if outcome[0]:
        model.expects_all = weight_name_filter is None
        with _loaded_once(model):
            outcome = _on_all_ranks(lambda: original(updater, model_path, load_format, weight_name_filter, **kwargs), IN_PART)
        model.expects_all = False
    if not outcome[0]:
        config.model_path = model.source = served
    return outcome


def update_draft_from_disk(original: Callable[..., Outcome], updater: WeightUpdater, *args, **kwargs) -> Outcome:
    """WeightUpdater.update_weights_from_disk, `original`, for the draft model, which SGLang loads the same checkpoint into."""
    return _on_all_ranks(lambda: original(updater, *args, **kwargs), IN_PART)


def update_from_tensors(original: Callable[..., Outcome], updater: WeightUpdater, named_tensors: object, *args, **kwargs) -> Outcome:
    """WeightUpdater.update_weights_from_tensor, `original`, of the model or its draft: (whether it was done, message).

    named_tensors: what `original` takes, or the exception that came of reading them.
    """

    def update() -> Outcome:
        if isinstance(named_tensors, Exception):
            raise named_tensors
        return original(updater, named_tensors, *args, **kwargs)

    return _on_all_ranks(update, UNTOUCHED if isinstance(named_tensors, Exception) else IN_PART)


def _check(updater: WeightUpdater, load_format: str, weight_name_filter: Callable[[str], bool] | None) -> Outcome:
    """Raises for what `updater` cannot load; what SGLang itself refuses before it loads is left to it."""
    model: Llama4ForConditionalGeneration = updater.get_model()
    loader = get_model_loader(LoadConfig(load_format=load_format), updater.model_config)
    refused = any(getattr(module, "_derived_weight_cache_error", None) for module in model.modules())
    if isinstance(loader, DefaultModelLoader) and not refused:
        for source in loader.resolve_model_weights(updater.model_config, model):
            if source.use_safetensors:
                weights = without_data(source.weight_files)
                if weight_name_filter is not None:
                    weights = (weight for weight in weights if weight_name_filter(weight[0]))
                for _ in model.checked(weights, source.hf_folder, complete=weight_name_filter is None):
                    pass
    return True, ""


@contextmanager
def _loaded_once(model: Llama4ForConditionalGeneration) -> Iterator[None]:
    """Within it a load that has failed fails again at once: SGLang loads the same checkpoint anew in order to go back."""
    load_weights, errors = model.load_weights, []

    def load(weights) -> None:
        if errors:
            raise errors[0]
        try:
            load_weights(weights)
        except Exception as error:
            errors.append(error)
            raise

    model.load_weights = load
    try:
        yield
    finally:
        del model.load_weights


def _on_all_ranks(step: Callable[[], Outcome], after_error: str) -> Outcome:
    """What came of `step`, the same on every rank: a failure where there was one, for the ranks' answers are not compared later."""
    try:
        outcome = step()
    except Exception as error:
        logger.exception("llama4_kernels: weights are not updated")
        outcome = False, f"Failed to update weights: {type(error).__name__}: {error}\n{after_error}"
    outcomes = get_parallel().tp_group.all_gather_object(outcome)
    return next((found for found in outcomes if not found[0]), outcome)
