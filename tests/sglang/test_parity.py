"""The served model against transformers: lengths around the chunk, prefixes, batches, page sizes, pools, configs, TP."""

import re

import engine_standins
import preloaded
import pytest
import torch
from engine import LENGTHS, NEW_TOKENS, ask, ask_at_once, assert_agrees, differences, llama4_server, prompt
from recorded_graph import REPLAYED

from llama4_kernels.cli.oracle import Oracle

CHUNK = 64


def check_all(server, oracle):
    """Alone, again with what the radix cache holds of it, and eight at once."""
    for length in LENGTHS:
        assert_agrees(ask(server, prompt(length)), oracle)
    longest = ask(server, prompt(LENGTHS[-1]), whole=False)
    assert longest.cached_tokens > 2 * CHUNK
    assert_agrees(longest, oracle)
    check_eight_at_once(server, oracle)


def check_eight_at_once(server, oracle):
    for answer in ask_at_once(server, [prompt(length, seed=1) for length in (3, 40, CHUNK, 70, 100, 2 * CHUNK, 150, 250)]):
        assert_agrees(answer, oracle)


def test_scout_with_prefill_in_pieces_smaller_than_the_chunk(make, oracle, tmp_path):
    path = make("scout")
    with llama4_server(path, "--chunked-prefill-size=24", log=tmp_path / "log") as server:
        check_all(server, oracle(path))


def test_maverick_with_pages_of_16_and_one_pool(make, oracle, tmp_path):
    path = make("maverick")
    with llama4_server(path, "--page-size=16", "--disable-hybrid-swa-memory", log=tmp_path / "log") as server:
        check_all(server, oracle(path))


def test_scout_with_pages_of_16_and_mixed_batches(make, oracle, tmp_path):
    path = make("scout")
    flags = ("--page-size=16", "--chunked-prefill-size=48", "--enable-mixed-chunk")
    with llama4_server(path, *flags, log=tmp_path / "log") as server:
        check_all(server, oracle(path))


@pytest.mark.parametrize("like", ["scout", "maverick"])
def test_bfloat16_is_no_further_from_float32_than_transformers(like, make, oracle, tmp_path):
    """Of all tokens the median and the error that one in ten exceeds; a near tie of two experts may go either way."""
    path = make(like, dtype="bfloat16")
    rounded = Oracle(path, dtype=torch.bfloat16)
    with llama4_server(path, log=tmp_path / "log", dtype="bfloat16") as server:
        answers = [ask(server, prompt(length)) for length in LENGTHS]
    errors, theirs = differences(answers, oracle(path), rounded)
    assert (errors.quantile(torch.tensor([0.5, 0.9])) <= theirs.quantile(torch.tensor([0.5, 0.9]))).all()


def test_a_pool_so_small_that_slots_are_used_again(make, oracle, tmp_path):
    """By chunks of 64 tokens; Llama 4 reads no sliding_window."""
    path = make("scout", sliding_window=8)
    with llama4_server(path, "--max-total-tokens=400", "--swa-full-tokens-ratio=0.6", log=tmp_path / "log") as server:
        for seed in range(6):
            for answer in ask_at_once(server, [prompt(150, seed), prompt(90, seed)], new_tokens=40):
                assert_agrees(answer, oracle(path))


def test_requests_that_are_retracted(make, oracle, tmp_path):
    """As for want of memory, every third step, by a variable of SGLang's: also before the scheduler has read what their prefill gave. They are
    prefilled again, with what they have generated."""
    path, environment = make("scout"), {"SGLANG_TEST_RETRACT": "1"}
    with llama4_server(path, log=tmp_path / "log", environment=environment, popen=preloaded.import_once) as server:
        answers = []
        for new_tokens in 3 * (2, 3, 4):  # so that every third step is each of a request's
            answers += ask_at_once(server, [prompt(length, new_tokens) for length in (176, 44)], new_tokens)
    assert "#retracted_reqs: 1, #new_tokens_gained: 176" in (tmp_path / "log").read_text(), "before its first token was read"
    for answer in answers:
        assert_agrees(answer, oracle(path))


def test_text_only_with_a_config_of_its_own(make, oracle, tmp_path):
    path = make(
        text_only=True,
        num_hidden_layers=5,
        no_rope_layers=[0, 1, 1, 0, 1],
        layer_types=["chunked_attention", "full_attention", "chunked_attention", "full_attention", "chunked_attention"],
        moe_layers=[1, 2, 4],
        attention_chunk_size=48,
        use_qk_norm=False,
    )
    with llama4_server(path, "--page-size=16", log=tmp_path / "log") as server:
        assert server.serving() == "Llama4ForCausalLM"
        check_all(server, oracle(path))


@pytest.mark.parametrize(
    ("chunk_size", "experts"),
    [
        (None, {"interleave_moe_layer_step": 3}),
        (4096, {"moe_layers": [], "interleave_moe_layer_step": 0, "num_local_experts": 0, "num_experts_per_tok": 0}),
    ],
    ids=["no chunk", "dense"],
)
def test_no_chunk_within_the_context_and_no_temperature(chunk_size, experts, make, oracle, tmp_path):
    """transformers takes no config without a chunk size: its oracle has one as large as all of the KV cache."""
    options = {"attn_temperature_tuning": False, **experts}
    with llama4_server(make(attention_chunk_size=chunk_size, **options), log=tmp_path / "log") as server:
        check_all(server, oracle(make(attention_chunk_size=4096, **options)))


@pytest.mark.parametrize("like", ["scout", "maverick"])
def test_two_ranks(like, make, oracle, tmp_path):
    path = make(like)
    with llama4_server(path, log=tmp_path / "log", tp=2) as server:
        for length in LENGTHS:
            assert_agrees(ask(server, prompt(length), NEW_TOKENS), oracle(path))


def test_attention_in_data_parallel(make, oracle, tmp_path):
    """Each of two ranks attends for its own requests, with all of the heads, which need not be shared among the two; both compute the layers
    between, also where a rank has no request. SGLang sums what they compute by an all-reduce in prefill, and by a reduce-scatter in decode,
    which is in graphs for up to two requests a rank and without for more."""
    path, environment = make("maverick", num_attention_heads=5, num_key_value_heads=1), engine_standins.environment(tmp_path / "standins")
    flags = ("--enable-dp-attention", "--dp-size=2", "--attention-backend=triton")  # ours; with torch_native SGLang turns graphs off
    flags += ("--cuda-graph-backend-decode=full", "--cuda-graph-bs-decode", "1", "2")
    with llama4_server(path, *flags, log=tmp_path / "log", tp=2, environment=environment) as server:
        for length in LENGTHS:
            assert_agrees(ask(server, prompt(length)), oracle(path))
        for answer in ask_at_once(server, [prompt(length, seed=2) for length in (5, CHUNK, 90)]):
            assert_agrees(answer, oracle(path))
        check_eight_at_once(server, oracle(path))
        log = server.log.read_text()
    assert set(re.findall(r"(DP\d) TP\d.*\] Prefill batch", log)) == {"DP0", "DP1"}
    assert all(REPLAYED.format(mode="DECODE", requests=requests, size=size) in log for requests, size in ((1, 1), (1, 2), (2, 2)))


def test_two_ranks_with_one_kv_head_and_odd_sizes(make, oracle, tmp_path):
    path = make(
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=1,
        num_local_experts=3,
        intermediate_size=84,
        intermediate_size_mlp=72,
        attention_chunk_size=48,
        interleave_moe_layer_step=2,
    )
    with llama4_server(path, log=tmp_path / "log", tp=2) as server:
        for answer in ask_at_once(server, [prompt(length) for length in LENGTHS]):
            assert_agrees(answer, oracle(path))
