"""The commands and their options; what they do stands in the module of their name."""

from __future__ import annotations

from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Optional

import typer

from llama4_kernels.cli.extras import needed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(version("llama4_kernels"))
        raise typer.Exit(0)


def _refuse_unused(context: typer.Context, *rules: tuple[bool, tuple[str, ...], str]) -> None:
    """BadParameter for an option on the command line that has no effect. A rule: whether that is so, parameters' names, and why."""
    for unused, names, why in rules:
        for parameter in context.command.params if unused else ():
            if parameter.name in names and context.get_parameter_source(parameter.name).name == "COMMANDLINE":
                raise typer.BadParameter(why, context, parameter)


@app.callback()
def main(
    wanted: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)] = False,
) -> None:
    """Llama 4 kernels for SGLang: show that the plugin works, and see why where it does not."""


class Like(str, Enum):
    scout = "scout"
    maverick = "maverick"


class Weights(str, Enum):
    bf16 = "bf16"
    fp8 = "fp8"
    int4 = "int4"


class KvDtype(str, Enum):
    bf16 = "bf16"
    fp8 = "fp8"


@app.command()
def demo(
    like: Annotated[Like, typer.Option(help="Scout (16 experts in every layer) or Maverick (128 in every second one).")] = Like.scout,
    fp8: Annotated[bool, typer.Option("--fp8", help="Routed experts in FP8, as Meta's Maverick-FP8 stores them.")] = False,
    vision: Annotated[bool, typer.Option("--vision", help="Keep the vision tower and ask about an image too.")] = False,
    tp: Annotated[int, typer.Option(min=1, max=2, help="Tensor-parallel ranks; the tiny model has 2 KV heads.")] = 1,
    keep: Annotated[Optional[Path], typer.Option(file_okay=False, help="Folder to keep the checkpoint and the server's log in.")] = None,
    port: Annotated[Optional[int], typer.Option(min=1, max=65535, help="Port of the server; a free one if not given.")] = None,
) -> None:
    """Serve a tiny random Llama 4 through the installed SGLang with this plugin and compare every logprob with transformers.

    Exits with 0 only if all agree.
    """
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise typer.BadParameter(f"{keep} is not empty", param_hint="--keep")
    from llama4_kernels.cli import demo

    raise typer.Exit(demo.run(like.value, fp8=fp8, vision=vision, tp=tp, keep=keep, port=port))


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what is installed, which backend each op would take and why, and whether this SGLang picks the plugin up.

    Exits with 1 where it would not, naming the cause.
    """
    from llama4_kernels.cli import doctor

    raise typer.Exit(doctor.run(as_json=json))


@app.command()
def tune(
    op: Annotated[
        Optional[list[str]],
        typer.Option(help="grouped_gemm, route_top1, moe_gate_up or moe_down; may be given several times. All of them if not given."),
    ] = None,
    workload: Annotated[list[str], typer.Option(help="A layer: scout or maverick, its ranks, bf16 or fp8; may be given several times.")] = [
        "scout-tp8-fp8",
        "maverick-tp8-fp8",
        "scout-tp8-bf16",
    ],
    tokens: Annotated[Optional[list[int]], typer.Option(min=1, help="Tokens in the batch; may be given several times.")] = None,
    out: Annotated[Optional[Path], typer.Option(dir_okay=False, help="Table to write; the installed one of this GPU if not given.")] = None,
) -> None:
    """Time launch configurations of the Triton kernels on this GPU and keep the fastest for each shape whose results are right."""
    with needed("tune", "bench"):
        from llama4_kernels.bench import tune

        raise typer.Exit(tune.run(op, workload, tokens, out))


@app.command()
def bench(
    context: typer.Context,
    op: Annotated[Optional[list[str]], typer.Option(help="Only these ops; may be given several times.")] = None,
    workload: Annotated[
        Optional[list[str]],
        typer.Option(
            help="A name such as fused_moe/fp8/scout/tp8/t64, or a pattern such as 'fused_moe/*/tp8/*'; a short list if not given."
        ),
    ] = None,
    backend: Annotated[Optional[list[str]], typer.Option(help="cuda, triton or reference; those that run here if not given.")] = None,
    peer: Annotated[Optional[list[str]], typer.Option(help="A peer by name, all, or none; all if no backend is given either.")] = None,
    peer_module: Annotated[Optional[list[str]], typer.Option(help="A module of yours that registers more peers.")] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(dir_okay=False, help="File that records are added to; bench/results/<gpu>/<date>-<commit>.json if not given."),
    ] = None,
    compare: Annotated[Optional[Path], typer.Option(exists=True, help="File or folder of earlier results to compare with.")] = None,
    measured: Annotated[Optional[Path], typer.Option(exists=True, help="Compare these results instead of measuring.")] = None,
    refcheck: Annotated[bool, typer.Option(help="Check each result against the reference.")] = True,
    rounds: Annotated[
        Optional[int], typer.Option(min=2, help="Samples for each row: 50 on a GPU, and at most 10 on a CPU, if not given.")
    ] = None,
    job_seconds: Annotated[float, typer.Option(min=1, help="The most that one row may take.")] = 600,
) -> None:
    """Measure workloads on our backends and on peers, each checked and set against its floor, and keep a record of each.

    Exits with 1 where one of our backends fails, is wrong, was asked for and cannot run, or is slower than what --compare names.
    """
    measuring = ("op", "workload", "backend", "peer", "peer_module", "out", "refcheck", "rounds", "job_seconds")
    _refuse_unused(
        context,
        (compare is None, ("measured",), "needs --compare, the results to compare with"),
        (measured is not None, measuring, "has no effect with --measured, which compares everything in it and measures nothing"),
    )
    with needed("bench", "bench"):
        from llama4_kernels.bench.measure import Options
        from llama4_kernels.cli import bench

        modules, options = peer_module or (), Options(refcheck, rounds)
        keep = {"out": out, "base": compare, "measured": measured}
        raise typer.Exit(bench.run(op, workload, backend, peer, peer_modules=modules, options=options, job_seconds=job_seconds, **keep))


@app.command()
def report(
    results: Annotated[
        Optional[list[Path]], typer.Argument(help="Files of results, or folders of them; bench/results if not given.")
    ] = None,
    out: Annotated[Optional[Path], typer.Option(file_okay=False, help="Folder to write the site into.")] = None,
    readme: Annotated[
        Optional[list[Path]],
        typer.Option(exists=True, dir_okay=False, help="Page whose performance table is rewritten: README.md, docs/performance.md."),
    ] = None,
    export: Annotated[
        Optional[list[str]],
        typer.Option(help="format=path: pytest (pytest-benchmark), oss (PyTorch OSS benchmark), action (github-action-benchmark)."),
    ] = None,
) -> None:
    """Make a static site of results, rewrite performance tables in Markdown pages, or write results in the formats of other tools.

    What cannot be read is named, and the rest is shown.
    """
    if not (out or readme or export):
        raise typer.BadParameter("give at least one of --out, --readme and --export")
    with needed("report", "bench"):
        from llama4_kernels.cli import report

        raise typer.Exit(report.run(results or [], out=out, pages=readme or (), exports=export or ()))


@app.command()
def profile(
    op: Annotated[str, typer.Argument(help="An op, such as fused_moe.")],
    workload: Annotated[str, typer.Argument(help="Its workload, such as fp8/scout/tp8/t64.")],
    backend: Annotated[
        Optional[str], typer.Option(help="cuda or triton; the one that runs here, or both without a GPU, if not given.")
    ] = None,
) -> None:
    """Show Nsight Compute's counters of a workload's kernels beside its floor; without ncu, the same kernels' static figures."""
    with needed("profile", "bench"):
        from llama4_kernels.cli import profile

        raise typer.Exit(profile.run(op, workload, backend))


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="scout, maverick, one of the names that an unknown one is answered with, or the folder of a checkpoint.")
    ],
    gpu: Annotated[str, typer.Option(help="a100, h100, h100-nvl, h20, h200, b200, or its memory, such as 96GiB.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all.")] = 8,
    tp: Annotated[Optional[int], typer.Option(min=1, help="Tensor-parallel ranks; all GPUs if not given.")] = None,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel groups; to compare: the plugin serves 1.")] = 1,
    weights: Annotated[
        Optional[Weights],
        typer.Option(
            help="Form of the weights: the checkpoint's own, or bf16, if not given; int4 to compare, the plugin does not serve it."
        ),
    ] = None,
    kv_dtype: Annotated[Optional[KvDtype], typer.Option(help="Form of the KV cache; that of the activations if not given.")] = None,
    context: Annotated[
        Optional[int], typer.Option(min=1, help="Tokens of a request, prompt and answer; the most that fit if not given.")
    ] = None,
    concurrency: Annotated[Optional[int], typer.Option(min=1, help="Requests of that many tokens at once; the most if not given.")] = None,
    mem_fraction_static: Annotated[Optional[float], typer.Option(min=0.01, max=0.99, help="SGLang's flag; chosen if not given.")] = None,
    swa_full_tokens_ratio: Annotated[Optional[float], typer.Option(min=0.0001, max=1, help="SGLang's flag; chosen if not given.")] = None,
    one_pool: Annotated[bool, typer.Option("--one-pool", help="Local layers hold everything too: --disable-hybrid-swa-memory.")] = False,
    chunked_prefill_size: Annotated[Optional[int], typer.Option(min=1, help="SGLang's flag; its default if not given.")] = None,
    page_size: Annotated[int, typer.Option(min=1, help="SGLang's flag.")] = 1,
    max_running_requests: Annotated[Optional[int], typer.Option(min=1, help="SGLang's flag; chosen if not given.")] = None,
    cuda_graph_max_bs: Annotated[
        Optional[int], typer.Option(min=1, help="SGLang's --cuda-graph-max-bs-decode; its default if not given.")
    ] = None,
    vision: Annotated[bool, typer.Option("--vision", help="With the vision tower: --enable-multimodal.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    plot: Annotated[
        Optional[Path], typer.Option(dir_okay=False, help="Image of memory against context to write; needs matplotlib.")
    ] = None,
) -> None:
    """Say what fits on which GPUs: memory of a rank by part, largest context and concurrency, and the command that starts the server.

    Exits with 0 where it fits, 1 where it does not, and 2 for a question that cannot be answered, with one line that says what to change.
    """
    from llama4_kernels.cli import plan
    from llama4_kernels.cli.plan.planner import Question

    question = Question(
        model=model,
        gpu=gpu,
        gpus=gpus,
        tp=tp,
        ep=ep,
        weights=weights and weights.value,
        kv_dtype=kv_dtype and kv_dtype.value,
        context=context,
        requests=concurrency,
        mem_fraction_static=mem_fraction_static,
        swa_full_tokens_ratio=swa_full_tokens_ratio,
        one_pool=one_pool,
        chunked_prefill_size=chunked_prefill_size,
        page_size=page_size,
        max_running_requests=max_running_requests,
        cuda_graph_max_bs=cuda_graph_max_bs,
        vision=vision,
    )
    raise typer.Exit(plan.run(question, as_json=json, picture=plot))


@app.command()
def guide(
    context: typer.Context,
    line: Annotated[Optional[list[str]], typer.Option(help="Only the lines of these names; may be given several times.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the lines with their names and start nothing.")] = False,
    keep: Annotated[Optional[Path], typer.Option(file_okay=False, help="Folder to keep the checkpoints and the logs in.")] = None,
) -> None:
    """Run the launch lines of SGLang's Llama 4 guide on tiny checkpoints and ask for what they promise through the openai client.

    Exits with 0 only if every line starts and chat, streaming, tool calls, structured output and images come as promised.
    """
    _refuse_unused(context, (show, ("line", "keep"), "has no effect with --list, which prints every line and starts nothing"))
    from llama4_kernels.cli import guide

    if unknown := set(line or ()) - set(guide.LINES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: give one of {', '.join(guide.LINES)}", param_hint="--line")
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise typer.BadParameter(f"{keep} is not empty", param_hint="--keep")
    if show:
        for name, text in guide.LINES.items():
            print(f"{name}: {text}")
        raise typer.Exit(0)
    raise typer.Exit(guide.run(line, keep))


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Against(str, Enum):
    transformers = "transformers"
    stock = "stock"


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: Annotated[Optional[str], typer.Argument(help="Checkpoint to serve: a folder, or a name in the Hugging Face cache.")] = None,
    url: Annotated[Optional[str], typer.Option(help="A running OpenAI-compatible server, such as http://127.0.0.1:30000.")] = None,
    tiny: Annotated[
        Optional[Like], typer.Option(help="Serve a tiny random checkpoint like this one: needs no weights, no network.")
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="With --tiny: routed experts in FP8.")] = False,
    needle: Annotated[bool, typer.Option("--needle", help="Hide a number in long texts and ask for it.")] = False,
    parity: Annotated[
        bool,
        typer.Option(
            "--parity",
            help="Compare the logprob of every token of a text with other implementations. transformers takes 4 bytes of memory a weight, "
            "for an FP8 checkpoint 4 bytes of disk (TMPDIR) too.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of results; the same run goes on from the answers in it.")] = Path(
        "llama4-eval"
    ),
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of the server.")] = 1,
    server_flag: Annotated[list[str], typer.Option(help="A further flag of sglang.launch_server; may be given several times.")] = [],
    task: Annotated[Optional[str], typer.Option(help="lm_eval's task: mmlu_pro if not given, own_questions with --tiny.")] = None,
    guide: Annotated[
        Optional[Like], typer.Option(help="Whose scores of the guide to compare with; by the model's name if not given.")
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Only so many questions of each subject.")] = None,
    max_gen_toks: Annotated[Optional[int], typer.Option(min=1, help="Tokens of an answer: 2048 if not given, 32 with --tiny.")] = None,
    concurrency: Annotated[Optional[int], typer.Option(min=2, help="Questions asked at a time: 128 if not given.")] = None,
    length: Annotated[list[int], typer.Option(min=64, help="--needle: tokens of the prompt; may be given several times.")] = [
        4096,
        10000,
        32768,
    ],
    depth: Annotated[list[float], typer.Option(min=0, max=1, help="--needle: place in the text, 0 to 1; may be given several times.")] = [
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    ],
    text: Annotated[
        Optional[Path], typer.Option(exists=True, dir_okay=False, help="--parity: a text file; prose of our own if not given.")
    ] = None,
    tokens: Annotated[
        Optional[int], typer.Option(min=2, help="--parity: at most so many tokens of it; past the first chunk if not given.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="--parity: of everything that is not FP8. CUDA's MoE and attention take bfloat16 only.")
    ] = Dtype.float32,
    against: Annotated[
        Optional[list[Against]],
        typer.Option(help="--parity: transformers, stock (SGLang's own model, on a GPU) or both; all that can run."),
    ] = None,
) -> None:
    """Score a served model on MMLU-Pro as SGLang's guide does; --parity compares logprobs, --needle asks for a number in a long text.

    Exits with 1 where the score is lower than the guide's by more than chance, a logprob over its bound, or a number not found.
    """
    if sum(given is not None for given in (model, url, tiny)) != 1:
        raise typer.BadParameter("give one of MODEL, --url and --tiny")
    if needle and parity:
        raise typer.BadParameter("--needle and --parity exclude each other")
    scored = ("task", "guide", "limit", "max_gen_toks", "concurrency")
    _refuse_unused(
        context,
        (parity, ("url",), "--parity reads the checkpoint's files: give MODEL or --tiny"),
        (tiny is None, ("fp8",), "only with --tiny; a checkpoint says by itself whether it is FP8"),
        (url is not None, ("tp", "server_flag"), "has no effect with --url, whose server runs already"),
        (needle or parity, scored, "has no effect with --needle and --parity, which ask none of lm_eval's questions"),
        (not needle, ("length", "depth"), "only with --needle"),
        (not parity, ("text", "tokens", "dtype", "against"), "only with --parity"),
    )
    from llama4_kernels.cli.eval import command

    options = command.Options(model, url, tiny.value if tiny else None, fp8, tp, tuple(server_flag), out)
    if parity:
        code = command.run_parity(options, text, tokens, dtype.value, [name.value for name in against or []])
    elif needle:
        code = command.run_needle(options, length, depth)
    else:
        code = command.run_accuracy(options, task, limit, max_gen_toks, concurrency, guide.value if guide else None)
    raise typer.Exit(code)
