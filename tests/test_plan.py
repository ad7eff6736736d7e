"""The planner: parameter counts, the guide's figures, answers to what does not fit, and wrong questions. None of it loads SGLang."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama4_kernels.cli.main import app
from llama4_kernels.cli.plan import memory, model
from llama4_kernels.cli.plan.planner import MARGIN, Question, plan

# The settings of the SGLang release that the guide's figures were written for: 81 % static at 8 ranks, one KV pool, graphs up to 160
WHEN_WRITTEN = {"one_pool": True, "mem_fraction_static": 0.81, "max_running_requests": 2048, "cuda_graph_max_bs": 160}


def answer(name="scout", gpu="h100", **options):
    return plan(Question(**{"model": name, "gpu": gpu, "gpus": 8, "tp": 8} | options))


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def as_json(*arguments):
    result = invoke(*arguments, "--json")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name, parameters", [("scout", 108_641_793_536), ("maverick", 401_583_781_376)])
def test_parameters_are_those_that_are_published(name, parameters):
    assert sum(model.load(name, "bf16").weight_bytes(tp=1, vision=True).values()) == 2 * parameters


def test_a_published_repository_is_known_by_its_name():
    assert model.load("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", None) == model.load("maverick", "fp8")


@pytest.mark.parametrize("gpu, recommended", [("h100", 1_000_000), ("h200", 2_500_000)])
def test_the_guides_figure_for_scout_is_the_limit_rounded_down(gpu, recommended):
    """What limits it is the table of slots by request, which grows with the context outside of the static part."""
    largest = answer(gpu=gpu, **WHEN_WRITTEN).largest_context
    assert recommended <= largest < 1.3 * recommended
    beyond = answer(gpu=gpu, context=largest + 10_000, **WHEN_WRITTEN)
    assert "beside the static part" in beyond.fit.problem and "for the request table" in beyond.fit.problem


@pytest.mark.parametrize("gpu, recommended", [("h100", 5_000_000), ("h200", 10_000_000)])
def test_the_guides_figure_for_scout_with_two_pools(gpu, recommended):
    assert recommended <= answer(gpu=gpu).largest_context < 1.3 * recommended


def test_maverick_needs_no_limit_on_8_h200():
    found = answer("maverick", "h200")
    assert found.context == found.largest_context == found.case.model.max_context == 1_048_576
    assert found.fit.problem is None and found.default_problem is None


@pytest.mark.parametrize("gpu, context, starts", [("h100", 1_000_000, True), ("h200", 1_000_000, True), ("h200", 2_500_000, False)])
def test_the_guides_launch_lines_as_they_stand(gpu, context, starts):
    """With nothing but --context-length, 2.5M on H200 leaves too little beside SGLang's present default of the static part."""
    found = answer(gpu=gpu, context=context)
    assert (found.default_problem is None) == starts
    assert found.fit.problem is None


def test_the_serving_guide_says_what_the_planner_says():
    text = "".join((Path(__file__).parents[1] / "docs" / page).read_text() for page in ("serving.md", "memory.md"))
    one_pool = [answer(gpu=gpu, **WHEN_WRITTEN).largest_context / 1e6 for gpu in ("h100", "h200")]
    two_pools = [answer(gpu=gpu).largest_context for gpu in ("h100", "h200")]
    assert f"answer {one_pool[0]:.2f}M and {one_pool[1]:.2f}M" in text
    assert f"{two_pools[0] / 1e6:.2f}M tokens on 8×H100" in text and f"{two_pools[1]:,}, on 8×H200" in text
    found = answer(gpu="h200", context=2_500_000)
    assert f"the default fraction on H200 is higher, {found.fit.flags.mem_fraction_static}" in text
    assert f"--max-running-requests {found.fit.flags.max_running_requests} " in text
    assert "19.1 GiB for the request table, and 14.7 GiB are left there" in found.default_problem
    as_written = answer(gpu="h200", context=2_500_000, requests=1, max_running_requests=864, swa_full_tokens_ratio=memory.SWA_RATIO)
    assert as_written.fit.problem is None
    of_maverick = answer("maverick", weights="fp8", context=1_048_576).default_problem
    assert "hold 685,231 and" in of_maverick and "some 685,000 tokens" in text
    weights = sum(model.load("maverick", None).weight_bytes(tp=8).values())
    assert f"its {weights / 2**30:.1f} GiB of weights" in text


def test_maverick_in_bf16_on_8_h100_is_answered_with_what_would_do():
    found = as_json("--model", "maverick", "--gpu", "h100")
    assert not found["fits"] and "weights (93.3 GiB)" in found["problem"] and found["launch"] is None
    assert set(found["nearest"]) == {"--weights fp8", "--gpu h200"}
    for change in found["nearest"]:
        assert as_json("--model", "maverick", *("--gpu h100 " + change).split())["fits"]


def test_two_changes_where_one_is_not_enough():
    nearest = answer("maverick", gpus=4, tp=4).nearest
    assert nearest and all(len(shlex.split(change)) >= 4 for change in nearest)
    assert all(near.fit.problem is None for near in nearest.values())


def test_what_the_plugin_would_refuse_is_not_named_as_near():
    nearest = answer(gpu="a100", gpus=2, tp=2).nearest
    assert set(nearest) == {"--gpus 4 --tp 4", "--gpu h200"}
    two = answer("maverick", gpu="a100", gpus=4, tp=4).nearest
    assert two and all("fp8" not in change or "--gpu" in shlex.split(change) for change in two)
    assert "--gpus 4 --tp 4" in answer("maverick", gpus=2, tp=2, weights="int4").nearest, "refused with and without the change"


@pytest.mark.parametrize("name", ["scout", "maverick"])
@pytest.mark.parametrize(
    "gpu, options", [("h100", {}), ("h200", {}), ("h200", {"tp": 4, "gpus": 4}), ("h100", {"weights": "fp8", "page_size": 64})]
)
@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
def test_what_fits_fits_and_a_little_more_does_not(name, gpu, options, kv_dtype):
    found = answer(name, gpu, kv_dtype=kv_dtype, **options)
    if found.largest_context is None:
        assert found.fit.problem
        return
    assert found.fit.problem is None and found.fit.memory.spare >= MARGIN
    static = sum(found.fit.memory.static.values())
    assert static <= found.fit.memory.budget + 2 * found.fit.flags.page_size * sum(found.fit.memory.pools.token_bytes)
    assert found.fit.memory.pools.tokens >= found.requests * found.context
    if found.largest_context < found.case.model.max_context:
        assert answer(name, gpu, kv_dtype=kv_dtype, context=found.largest_context + 256, **options).fit.problem
    more = answer(name, gpu, kv_dtype=kv_dtype, context=found.context, requests=found.largest_requests + 1, **options)
    assert more.fit.problem and more.nearest


def test_the_static_part_is_never_larger_than_sglangs_own():
    for gpu in ("h100", "h200"):
        for requests in (1, 4, 64, 1024):
            found = answer(gpu=gpu, requests=requests)
            assert (
                found.fit.flags.mem_fraction_static
                <= memory.default_mem_fraction(found.case.gpu, found.fit.flags, min(requests, 512), None) + 1e-9
            )


def test_the_static_part_is_smaller_where_all_rows_of_the_request_table_are_asked_for():
    found = answer(gpu="h200", context=2_500_000, max_running_requests=2048)
    assert found.fit.problem is None and "for the request table" in found.default_problem
    assert 0 <= found.fit.memory.spare - MARGIN < 0.002 * found.case.gpu.free  # the fraction has three digits
    assert found.fit.flags.mem_fraction_static < answer(gpu="h200").fit.flags.mem_fraction_static


def test_more_of_anything_needs_more_memory():
    def needs(**options):
        return sum(answer(context=500_000, requests=1, **options).fit.memory.static.values())

    assert needs(kv_dtype="fp8") == pytest.approx(needs(), rel=1e-6)  # the pools take what is there,
    assert answer(context=500_000, kv_dtype="fp8").largest_requests > answer(context=500_000).largest_requests  # and hold more
    assert answer(weights="fp8").fit.memory.static["experts"] == pytest.approx(answer().fit.memory.static["experts"] / 2, rel=0.01)
    assert answer(tp=4, gpus=4, gpu="h200").fit.memory.static["experts"] == 2 * answer(gpu="h200").fit.memory.static["experts"]
    assert answer(ep=8).fit.memory.static == answer().fit.memory.static
    kv_one_pool, kv_two_pools = (sum(memory.token_bytes(p.case.model, p.fit.flags)) for p in (answer(one_pool=True), answer()))
    assert kv_one_pool == kv_two_pools == 48 * 2 * 128 * 2


def test_many_requests_get_a_row_each_and_no_more():
    found = answer(gpu="h200", requests=5000)
    assert found.fit.flags.max_running_requests == found.fit.memory.requests == 5000
    assert found.largest_requests >= 5000


def test_as_many_requests_as_fit_are_at_most_at_once():
    found = answer(gpu="h200", context=1, requests=100_000)
    assert found.fit.problem is None and found.largest_requests >= 100_000
    assert (
        "most at once of 1: 100000 or more"
        in invoke("--model", "scout", "--gpu", "h200", "--context", "1", "--concurrency", "100000").output
    )
    assert "or more" not in invoke("--model", "scout", "--gpu", "h200", "--context", "1000000").output


def test_one_pool_holds_every_token_in_every_layer():
    found = answer(gpu="h100", one_pool=True, context=1_000_000, requests=6)
    assert "the KV cache must hold 6,000,000 tokens, 137.3 GiB" in found.fit.problem
    assert found.largest_requests == 1 and set(found.nearest) >= {"--concurrency 1"}


def test_rope_table_takes_512_bytes_a_position():
    found = model.load("scout", None)
    assert memory.rope_table_bytes(found, 1001) - memory.rope_table_bytes(found, 1000) == 512


def test_the_launch_line_has_every_flag():
    launch = as_json("--model", "scout", "--gpu", "h200", "--context", "2500000", "--kv-dtype", "fp8", "--concurrency", "4")["launch"]
    flags = dict(zip(launch[3::2], launch[4::2]))
    assert launch[:3] == ["python3", "-m", "sglang.launch_server"]
    assert flags["--model-path"] == "meta-llama/Llama-4-Scout-17B-16E-Instruct" and flags["--model-impl"] == "llama4_kernels"
    assert flags["--context-length"] == "2500000" and flags["--tp-size"] == "8" and flags["--chat-template"] == "llama-4"
    assert flags["--kv-cache-dtype"] == "fp8_e4m3" and flags["--page-size"] == "1" and flags["--chunked-prefill-size"] == "8192"
    assert 0 < float(flags["--swa-full-tokens-ratio"]) <= 0.8 and 0.5 < float(flags["--mem-fraction-static"]) < 0.95


@pytest.mark.parametrize(
    "options, says",
    [
        (["--weights", "int4"], "does not serve int4 weights"),
        (["--ep", "2"], "does not serve --ep-size 2"),
        (["--gpu", "a100", "--weights", "fp8"], "serves FP8 from compute capability 8.9 on"),
        (["--gpu", "a100", "--kv-dtype", "fp8"], "serves FP8 from compute capability 8.9 on"),
    ],
)
def test_what_the_plugin_does_not_serve_gets_no_launch_line(options, says):
    found = as_json("--model", "scout", *options)
    assert found["fits"] and found["launch"] is None and any(says in note for note in found["notes"])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "scout", "--gpu", "h300"], "--gpu h300 is not known: give one of a100, h100"),
        (["--model", "behemoth"], "--model behemoth is not a folder: give that of a checkpoint, or one of scout, maverick, meta-llama/"),
        (
            ["--model", "scout", "--gpus", "3"],
            "--gpus 3 as the number of ranks does not divide the 40 query and 8 KV heads: give --tp, one of 1, 2, 4, 8, 40",
        ),
        (["--model", "scout", "--gpus", "16"], "--gpus 16 as the number of ranks does not divide"),
        (
            ["--model", "scout", "--gpus", "16", "--tp", "16"],
            "--tp 16 does not divide the 40 query and 8 KV heads: give one of 1, 2, 4, 8, 40",
        ),
        (["--model", "scout", "--tp", "5", "--gpus", "8"], "--tp 5 does not divide --gpus 8"),
        (["--model", "scout", "--ep", "3"], "--ep 3 must divide the 8 ranks and the 16 experts"),
        (["--model", "scout", "--page-size", "48"], "--page-size 48 does not divide the attention chunk of 8192 tokens"),
        (
            ["--model", "scout", "--chunked-prefill-size", "1000", "--page-size", "16"],
            "--page-size 16 does not divide --chunked-prefill-size of 1000",
        ),
        (["--model", "maverick", "--context", "2000000"], "--context 2000000 is more than the 1048576 positions"),
        (["--model", "scout", "--one-pool", "--swa-full-tokens-ratio", "0.5"], "leave it or --one-pool out"),
        (["--model", "scout", "--gpu", "2GiB"], "--gpu 2GiB: 3 GiB are taken before a model loads"),
        (["--model", "scout", "--plot", "plan.nonsense"], "--plot plan.nonsense"),
        (["--model", "scout", "--plot", "/nowhere/plan.png"], "--plot /nowhere/plan.png"),
    ],
)
def test_a_wrong_question_gets_one_line(arguments, says):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("llama4-kernels plan: ") and says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "holds no config.json"),
        ("{", "is not JSON"),
        ('{"architectures": ["LlamaForCausalLM"]}', "give a Llama 4 checkpoint"),
        ('{"architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 4}', "config.json lacks hidden_size"),
        ('{"architectures": ["Llama4ForCausalLM"], "quantization_config": {"quant_method": "awq"}}', "is not fp8"),
    ],
)
def test_a_folder_that_is_no_checkpoint_gets_one_line(content, says, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    result = invoke("--model", str(tmp_path))
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1


def test_a_checkpoint_with_a_pattern_of_its_own_is_read_as_transformers_reads_it(tmp_path):
    pytest.importorskip("sglang")
    from transformers import AutoConfig

    from llama4_kernels.cli import checkpoint
    from llama4_kernels.sglang.config import layer_config

    own = {"no_rope_layers": [0, 1, 1, 0, 1], "moe_layers": [1, 2, 4], "num_hidden_layers": 5}
    for name, like, options in (
        ("scout", "scout", {}),
        ("maverick", "maverick", {}),
        ("own", "scout", own),
        ("none", "scout", {"attention_chunk_size": None}),
    ):
        path = checkpoint.make(tmp_path / name, like, **options)
        config = AutoConfig.from_pretrained(path).get_text_config()
        layers = [layer_config(config, i) for i in range(config.num_hidden_layers)]
        found = model.load(str(path), None).layers
        assert [(layer.is_local, layer.is_moe) for layer in found] == [(layer.chunk_size is not None, layer.is_moe) for layer in layers]


def test_weights_that_sglang_quantises_must_fit_before_it_does(tmp_path):
    config = {"architectures": ["Llama4ForConditionalGeneration"], "torch_dtype": "bfloat16", "text_config": model.PRESETS["maverick"].text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ("--model", str(tmp_path), "--weights", "fp8", "--gpu")
    small, large = invoke(*asked, "h100"), invoke(*asked, "h200")
    assert small.exit_code == 1 and "does not fit" in small.stdout and "quantised after loading, and take 93.3 GiB before" in small.stdout
    assert large.exit_code == 0 and "--quantization fp8" in large.stdout


def test_the_picture_and_the_table(tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke("--model", "scout", "--gpu", "h100", "--context", "1000000", "--plot", str(tmp_path / "plan.png"))
    assert result.exit_code == 0 and "1,000,000" in result.stdout and "--context-length 1000000" in result.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_it_runs_without_sglang_and_transformers():
    code = "import sys; sys.modules.update(sglang=None, transformers=None); from llama4_kernels.cli.main import app; app()"
    done = subprocess.run([sys.executable, "-c", code, "plan", "--model", "scout", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["fits"]
