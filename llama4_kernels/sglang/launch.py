"""What the process that launches a server sees to before it starts others: that the plugin comes into each of them."""

from __future__ import annotations

from sglang.srt.environ import envs

WORKER_APP = "llama4_kernels.sglang.worker_app:app"


def prepare_launch(arguments) -> None:
    """Have the HTTP processes of --tokenizer-worker-num, in which SGLang loads no plugins, load them.

    arguments: SGLang's, resolved. ValueError for --use-ray, whose processes cannot be told to, for an HTTP app of the user's own in place
        of ours, and for keys, which SGLang checks in a single HTTP process only.
    """
    if arguments.use_ray:
        raise ValueError(
            "--model-impl llama4_kernels does not serve Llama 4 with --use-ray, whose processes load no plugins: needs a launch without it"
        )
    if arguments.tokenizer_worker_num == 1:
        return
    for name in ("api_key", "admin_api_key"):
        if getattr(arguments, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is given with --tokenizer-worker-num {arguments.tokenizer_worker_num}, "
                "whose processes check no keys: needs --tokenizer-worker-num 1, or no key"
            )
    app = envs.SGLANG_HTTP_SERVER_APP_PATH
    if app.is_set() and app.get() != WORKER_APP:
        raise ValueError(
            f"SGLANG_HTTP_SERVER_APP_PATH is {app.get()}, --model-impl llama4_kernels with --tokenizer-worker-num "
            f"{arguments.tokenizer_worker_num} needs {WORKER_APP}, which loads plugins, or --tokenizer-worker-num 1"
        )
    app.set(WORKER_APP)
