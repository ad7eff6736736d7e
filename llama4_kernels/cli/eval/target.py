"""The server that is asked: one that runs already, or one started here for the length of a command."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llama4_kernels.cli import demo
from llama4_kernels.cli.server import Server, serve

START = 1800  # seconds that loading a checkpoint may take
INFO = 60  # seconds until a server says what it is
FACTS = (
    *("model_path", "revision", "weight_version", "load_format", "json_model_override_args", "lora_paths"),
    *("model_impl", "version", "device", "dtype", "quantization", "kv_cache_dtype"),
    *("attention_backend", "prefill_attention_backend", "decode_attention_backend", "moe_runner_backend", "fp8_gemm_runner_backend"),
    *("tp_size", "dp_size", "ep_size", "pp_size", "enable_dp_attention", "page_size", "chunked_prefill_size", "disable_hybrid_swa_memory"),
    *("speculative_algorithm", "enable_deterministic_inference", "enable_multimodal", "sampling_backend", "preferred_sampling_params"),
    *("chat_template", "reasoning_parser", "tool_call_parser"),
)  # in /server_info what answers depend on, and not addresses, logs or how many requests run at once


class EvalError(RuntimeError):
    """What stops an evaluation: one line that says what to change."""


@dataclass(frozen=True)
class Target:
    """url: of an OpenAI-compatible server, without a path. model: the name that it serves under. server: where it was started here."""

    url: str
    model: str
    server: Server | None = None

    def facts(self) -> dict[str, Any]:
        """What its answers depend on, as far as it says: FACTS of SGLang's /server_info, and where it was started here the version of this
        package and the backend of each op. Empty for a server that has no such route; EvalError where it does not answer."""
        import requests

        facts: dict[str, Any] = {}
        try:
            answer = requests.get(f"{self.url}/server_info", timeout=INFO)
        except requests.RequestException as error:
            raise EvalError(f"{self.url} does not answer /server_info ({type(error).__name__}): try again when it is less busy") from error
        with contextlib.suppress(ValueError, TypeError):
            said = answer.json() if answer.status_code == 200 else {}
            facts = {name: said[name] for name in FACTS if name in said}
        if self.server is not None:
            facts.pop("model_path", None)  # of a tiny model it is another one each time
            facts["llama4_kernels"] = importlib.metadata.version("llama4_kernels")
            facts["backends"] = {op: backend for op, (backend, _) in self.server.backends().items()}
        return facts


def reach(url: str) -> Target:
    """The running server at `url`; EvalError where none answers, or not as an OpenAI-compatible one does."""
    import requests

    url = url.rstrip("/").removesuffix("/v1")
    route = f"{url}/v1/models"
    try:
        answer = requests.get(route, timeout=10)
        return Target(url, answer.json()["data"][0]["id"])
    except requests.JSONDecodeError as error:
        raise EvalError(f"{route} answered {answer.status_code} without JSON: --url needs an OpenAI-compatible server") from error
    except (requests.RequestException, ValueError) as error:
        raise EvalError(f"no server answers at {url} ({type(error).__name__}): start it, or correct --url") from error
    except (KeyError, IndexError, TypeError) as error:
        raise EvalError(f"{route} names no model: --url needs an OpenAI-compatible server, such as http://127.0.0.1:30000") from error


@contextlib.contextmanager
def started(console: Console, model: str | Path, *flags: str, log: Path, tp: int = 1, stock: bool = False) -> Iterator[Target]:
    """A server of `model` with this plugin, or SGLang's own implementation where `stock`; gone after the block.

    Raises EvalError where sglang is not there, or where the plugin did not build the model; ServerError where it dies.
    """
    if importlib.util.find_spec("sglang") is None:
        raise EvalError('sglang is not installed: pip install "llama4_kernels[sglang]", or give --url of a running server')
    implementation = "auto" if stock else "llama4_kernels"
    flags = (f"--model-impl={implementation}", *flags)
    with demo.start_progress(console) as progress, serve(model, *flags, log=log, tp=tp, timeout=START, progress=progress) as server:
        progress(server.seconds_to_start, "")
        if not stock and server.serving() is None:
            raise EvalError(f"the server runs SGLang's own model, see {log}: `llama4-kernels doctor` says why")
        yield Target(server.url, reach(server.url).model, server)
        demo.print_backends(console, server)


def check_model(model: str | Path) -> Path:
    """The folder of the checkpoint `model`, a folder or a name in the Hugging Face cache; EvalError where it is neither, or not of Llama 4."""
    folder = Path(model) if Path(model).is_dir() else _cached(model)
    config = folder / "config.json"
    if not config.is_file():
        raise EvalError(f"{model} holds no config.json: give the folder of a checkpoint")
    try:
        architectures = json.loads(config.read_text()).get("architectures")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise EvalError(f"{config} is no JSON object ({error}): download the checkpoint again") from error
    if not any(str(name).startswith("Llama4") for name in architectures or []):
        raise EvalError(f"{model} is a checkpoint of {architectures}: give one of Llama 4")
    return folder


def chunk_size(model: str | Path) -> int | None:
    """The attention chunk of the checkpoint in the folder `model`."""
    config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
    return config.get("text_config", config).get("attention_chunk_size")


def _cached(model: str | Path) -> Path:
    """The folder in the Hugging Face cache of `model`, which is no folder itself; EvalError where there is none of that name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).exists():
        raise EvalError(f"{model} is a file: give the folder of a checkpoint")
    try:
        found = try_to_load_from_cache(str(model), "config.json")
    except HFValidationError as error:  # a path, which no model is named by
        raise EvalError(f"{model} does not exist: correct the path") from error
    if not isinstance(found, str):
        raise EvalError(
            f"{model} is neither a folder nor a model in the Hugging Face cache: correct the path, or run `hf download {model}`, "
            "after `hf auth login` where the model's licence has to be accepted"
        )
    return Path(found).parent
