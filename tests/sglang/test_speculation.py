"""Speculative decoding and CUDA graphs in the real engine, on the CPU by way of engine_standins.py: greedy tokens and logprobs are those of
transformers, whatever is drafted and whether a step is replayed."""

import json
import shutil
from pathlib import Path

import engine_standins
import pytest
import torch
from engine import Answer, Server, ask, ask_at_once, assert_agrees, llama4_server, prompt
from preloaded import import_once
from recorded_graph import REPLAYED, REPLAYED_SEGMENTS
from safetensors.torch import save_file

from llama4_kernels.cli.checkpoint import CHUNK, SHARED, VOCABULARY

STEPS = 3
NEW_TOKENS = 24
LENGTHS = (5, CHUNK - 4, CHUNK - 2, CHUNK - 1, CHUNK, 2 * CHUNK - 2, 3 * CHUNK - 2)
AUX_LAYERS = (0, 1, 2)  # an EAGLE3 draft gets the outputs of these
DRAFT = {
    "model_type": "llama", "hidden_size": SHARED["hidden_size"], "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def make_draft(path: Path, target: Path, eagle3: bool) -> Path:
    """A random Llama of one layer, with the target's tokenizer: whole, or as an EAGLE3 head of 64 tokens."""
    path.mkdir()
    width, vocabulary = SHARED["hidden_size"], 64 if eagle3 else VOCABULARY
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    layer, inputs = ("midlayer", 2 * width) if eagle3 else ("model.layers.0", width)
    tensors = {f"{layer}.self_attn.{name}_proj.weight": weight(rows, inputs) for name, rows in (("q", 128), ("k", 64), ("v", 64))}
    tensors |= {
        f"{layer}.self_attn.o_proj.weight": weight(width, 128),
        f"{layer}.mlp.gate_proj.weight": weight(64, width),
        f"{layer}.mlp.up_proj.weight": weight(64, width),
        f"{layer}.mlp.down_proj.weight": weight(width, 64),
        f"{layer}.input_layernorm.weight": torch.ones(width),
        f"{layer}.post_attention_layernorm.weight": torch.ones(width),
        "lm_head.weight": weight(vocabulary, width),
    }
    config = {"architectures": ["LlamaForCausalLMEagle3" if eagle3 else "LlamaForCausalLM"]} | DRAFT
    if eagle3:
        config |= {"draft_vocab_size": vocabulary, "eagle_config": {"eagle_aux_hidden_state_layer_ids": AUX_LAYERS}}
        tensors |= {
            "fc.weight": weight(width, 3 * width),
            "norm.weight": torch.ones(width),
            f"{layer}.hidden_norm.weight": torch.ones(width),
            "d2t": torch.zeros(vocabulary, dtype=torch.int64),
        }
    else:
        tensors |= {"model.embed_tokens.weight": weight(VOCABULARY, width), "model.norm.weight": torch.ones(width)}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for file in target.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def speculation(algorithm: str, draft: Path) -> tuple[str, ...]:
    return (
        f"--speculative-algorithm={algorithm}",
        f"--speculative-draft-model-path={draft}",
        "--speculative-draft-attention-backend=torch_native",
        "--speculative-eagle-topk=1",
        f"--speculative-num-steps={STEPS}",
        f"--speculative-num-draft-tokens={STEPS + 1}",
    )


def check_speculation(server: Server, folder: Path, oracle) -> dict[str, Answer]:
    """Requests at once. Every second is drafted its answer with every fifth token wrong, the others what the random draft model says."""
    assert engine_standins.INSTALLED in server.log.read_text()
    prompts = {f"request-{i}": prompt(length, seed=3) for i, length in enumerate(LENGTHS)}
    planted = {}
    for rid, ids in list(prompts.items())[::2]:
        answer = oracle.greedy(ids, NEW_TOKENS)
        planted[rid] = ids + [(token + 1) % VOCABULARY if i % 5 == 4 else token for i, token in enumerate(answer)]
    (folder / "answers.json").write_text(json.dumps(planted))
    answers = dict(zip(prompts, ask_at_once(server, list(prompts.values()), NEW_TOKENS, whole=False, rids=list(prompts))))
    for rid, answer in answers.items():
        assert_agrees(answer, oracle)
        accepted = answer.meta_info["spec_correct_drafts_histogram"]  # accepted[n]: steps in which n drafts were
        if rid in planted:
            assert len(accepted) == STEPS + 1 and accepted[STEPS] > 0 and sum(accepted[:STEPS]) > 0
        else:
            assert accepted[0] > NEW_TOKENS / 2
    again = ask(server, prompts["request-5"], NEW_TOKENS, whole=False)
    assert again.cached_tokens > CHUNK
    assert_agrees(again, oracle)
    return answers


def test_verification_in_graphs_with_pages_of_16(make, oracle, tmp_path):
    path, folder = make("scout"), tmp_path / "standins"
    flags = (
        *speculation("STANDALONE", make_draft(tmp_path / "draft", path, eagle3=False)),
        "--page-size=16",
        "--attention-backend=triton",  # ours takes its place; with torch_native SGLang turns graphs off
        "--cuda-graph-backend-decode=full",
        *("--cuda-graph-bs-decode", "1", "4", "8"),
    )
    with llama4_server(path, *flags, log=tmp_path / "log", environment=engine_standins.environment(folder), popen=import_once) as server:
        check_speculation(server, folder, oracle(path))
        log = server.log.read_text()
    assert all(REPLAYED.format(mode="TARGET_VERIFY", requests=requests, size=size) in log for requests, size in ((1, 1), (3, 4), (7, 8)))


@pytest.mark.parametrize("prefill, tp, backends, replayed", [
    ("breakable", 1, ("--attention-backend=fa3",), REPLAYED_SEGMENTS.format(breaks=SHARED["num_hidden_layers"])),
    ("full", 2, ("--prefill-attention-backend=fa3", "--decode-attention-backend=triton"), REPLAYED.format(mode="EXTEND", requests=1, size=160)),
])  # fmt: skip
def test_prefill_and_decode_in_graphs(prefill, tp, backends, replayed, make, oracle, tmp_path):
    """Prefill in graphs with a break at every attention, as SGLang has it on GPUs, or in one piece, with two ranks and where prefill and
    decode are given different backends."""
    path, folder = make("scout"), tmp_path / "standins"
    flags = (
        *backends,
        "--cuda-graph-backend-decode=full",
        *("--cuda-graph-bs-decode", "1", "4", "8"),
        f"--cuda-graph-backend-prefill={prefill}",
        *("--cuda-graph-bs-prefill", "64", "160"),
        "--chunked-prefill-size=160",
    )
    environment = engine_standins.environment(folder)
    with llama4_server(path, *flags, log=tmp_path / "log", tp=tp, environment=environment) as server:
        assert engine_standins.INSTALLED in server.log.read_text()
        for answer in ask_at_once(server, [prompt(length, seed=4) for length in LENGTHS]):
            assert_agrees(answer, oracle(path))
        again = ask(server, prompt(LENGTHS[-1], seed=4), whole=False)
        assert again.cached_tokens > CHUNK
        assert_agrees(again, oracle(path))
        assert_agrees(ask(server, prompt(CHUNK + 9, seed=5)), oracle(path))
        log = server.log.read_text()
    assert replayed in log
    assert all(REPLAYED.format(mode="DECODE", requests=requests, size=size) in log for requests, size in ((1, 1), (7, 8)))


def test_eagle3_gets_the_hidden_states_it_asks_for(make, oracle, tmp_path):
    path, folder = make("scout"), tmp_path / "standins"
    flags = speculation("EAGLE3", make_draft(tmp_path / "draft", path, eagle3=True))
    with llama4_server(path, *flags, log=tmp_path / "log", environment=engine_standins.environment(folder), popen=import_once) as server:
        answers = check_speculation(server, folder, oracle(path))
    got = [entry for entry in torch.load(folder / "hidden.pt") if entry[0] in answers]
    assert len(got) > len(answers) * NEW_TOKENS / (STEPS + 1)
    for rid, answer in answers.items():
        with torch.inference_mode():
            ids = torch.tensor([answer.prompt + answer.generated])
            states = oracle(path).model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        want = torch.cat([states[layer + 1][0] for layer in AUX_LAYERS], dim=-1)
        for _, start, hidden in (entry for entry in got if entry[0] == rid):
            torch.testing.assert_close(hidden[: len(want) - start], want[start : start + len(hidden)], rtol=1e-4, atol=1e-4)
