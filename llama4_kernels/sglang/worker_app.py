"""SGLang's HTTP app for the processes of --tokenizer-worker-num, which import it by name: with plugins loaded before it serves."""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402

from llama4_kernels.sglang.routes import hook_routes  # noqa: E402

hook_routes()

__all__ = ["app"]
