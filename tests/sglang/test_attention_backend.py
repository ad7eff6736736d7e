"""SGLang's attention backend step by step, without an engine: what it makes of a batch in each mode, that it never looks at the device for
that, and what SGLang's own backend for the CPU computes past the chunk."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.eagle_info import EagleVerifyInput

from llama4_kernels import use_backend
from llama4_kernels.reference import attention as reference
from llama4_kernels.sglang import model
from llama4_kernels.sglang.attention import Llama4AttentionBackend
from llama4_kernels.sglang.config import LayerConfig

CHUNK, HEADS, KV_HEADS, HEAD_DIM, SLOTS, WIDTH = 64, 4, 2, 64, 512, 160
LAYER = SimpleNamespace(
    layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, head_dim=HEAD_DIM, qk_head_dim=HEAD_DIM, v_head_dim=HEAD_DIM,
    scaling=HEAD_DIM**-0.5, k_scale=None, v_scale=None, is_cross_attention=False, attn_type=None, sliding_window_size=-1,
)  # fmt: skip


def dtype_on(device: str) -> torch.dtype:
    """On a GPU what the CUDA kernel takes."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def runner(device: str = "cpu", page_size: int = 1, dtype: torch.dtype | None = None) -> SimpleNamespace:
    k, v = torch.randn(2, SLOTS, KV_HEADS, HEAD_DIM, device=device).to(dtype or dtype_on(device))
    pool = SimpleNamespace(page_size=page_size, get_key_buffer=lambda layer: k, get_value_buffer=lambda layer: v)
    rows = torch.randperm(SLOTS)[: 3 * WIDTH].view(3, WIDTH).int().to(device)
    return SimpleNamespace(device=device, token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=rows))


def batch(mode: ForwardMode, keys: list[int], queries: list[int], device: str = "cpu", topk: int = 1) -> SimpleNamespace:
    """A ForwardBatch of requests in rows 2, 0 and 1, as SGLang fills it in `mode`: a verified draft is not part of seq_lens yet."""
    new = torch.tensor(queries, device=device)
    seq_lens = torch.tensor(keys, device=device)
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(keys),
        req_pool_indices=torch.tensor([2, 0, 1][: len(keys)], device=device),
        seq_lens=seq_lens - new if mode.is_target_verify() else seq_lens,
        extend_seq_lens=new if mode.is_extend() and not mode.is_target_verify() else None,
        extend_prefix_lens=seq_lens - new,
        encoder_lens=None,
        out_cache_loc=None,
        spec_info=drafts(queries[0], topk) if mode.is_target_verify() else None,
    )


def drafts(count: int, topk: int) -> EagleVerifyInput:
    """What SGLang hands on of the drafts; the fields that its sampling reads are left out."""
    fields = [field for field in dataclasses.fields(EagleVerifyInput) if field.default is field.default_factory is dataclasses.MISSING]
    return EagleVerifyInput(**{field.name: None for field in fields} | dict(draft_token_num=count, topk=topk))


def attend(backend, q, forward_batch):
    backend.init_forward_metadata(forward_batch)
    return backend.forward_extend(q, None, None, LAYER, forward_batch, save_kv_cache=False, chunk_size=CHUNK)


def expected(run: SimpleNamespace, q, keys: list[int], queries: list[int], chunk_size: int | None = CHUNK):
    k, v = (buffer(0).view(-1, run.token_to_kv_pool.page_size, KV_HEADS, HEAD_DIM)
            for buffer in (run.token_to_kv_pool.get_key_buffer, run.token_to_kv_pool.get_value_buffer))  # fmt: skip
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    out = reference.chunked_attention(
        q, k, v, page_table=run.req_to_token_pool.req_to_token, page_table_rows=torch.tensor([2, 0, 1]), page_table_holds="slots",
        seq_lens=torch.tensor(keys).int(), query_start_loc=starts, chunk_size=chunk_size, scale=LAYER.scaling,
    )  # fmt: skip
    return out.flatten(1)


MODES = [
    (ForwardMode.DECODE, [1, 1, 1]),
    (ForwardMode.EXTEND, [40, 3, 70]),
    (ForwardMode.MIXED, [40, 1, 1]),
    *((ForwardMode.TARGET_VERIFY, [drafted] * 3) for drafted in range(1, 9)),
]


@pytest.mark.parametrize("mode, queries", MODES)
@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_each_mode(mode, queries, page_size):
    run, keys, q = runner(page_size=page_size), [67, 130, 70], torch.randn(sum(queries), HEADS, HEAD_DIM)
    got = attend(Llama4AttentionBackend(run), q, batch(mode, keys, queries))
    torch.testing.assert_close(got, expected(run, q, keys, queries))


def test_a_batch_padded_past_the_request_table():
    """As data-parallel attention pads one to a multiple of its ranks: with requests of one key in the row that no request has."""
    run, requests = runner(), 8
    padded = batch(ForwardMode.DECODE, [67, 130, 70], [1, 1, 1])
    padded.batch_size = requests
    padded.seq_lens = torch.nn.functional.pad(padded.seq_lens, (0, requests - 3), value=1)
    padded.req_pool_indices = torch.nn.functional.pad(padded.req_pool_indices, (0, requests - 3))
    q = torch.randn(requests, HEADS, HEAD_DIM)
    got = attend(Llama4AttentionBackend(run), q, padded)
    torch.testing.assert_close(got[:3], expected(run, q[:3], [67, 130, 70], [1, 1, 1]))


@pytest.mark.parametrize("mode, queries", [*MODES, (ForwardMode.IDLE, [])])
def test_a_step_reads_nothing_back(mode, queries):
    """Tensors on the meta device have no values: whatever reads one on the host fails."""
    backend = Llama4AttentionBackend(runner("meta"))
    with use_backend("reference"):
        backend.init_forward_metadata(batch(mode, [67, 130, 70][: len(queries)], queries, "meta"))
    metadata = backend.forward_metadata
    assert metadata.seq_lens.shape == (len(queries),) and metadata.query_start_loc.shape == (len(queries) + 1,)
    assert metadata.seq_lens.dtype == metadata.query_start_loc.dtype == torch.int32
    assert not backend.needs_cpu_seq_lens


class Attention(SimpleNamespace):
    """A RadixAttention with the backend that SGLang would ask for."""

    def __call__(self, q, k, v, forward_batch, **options):
        return self.backend.forward_extend(q, k, v, self, forward_batch, **options)


class Layer(SimpleNamespace):
    """A Llama4Attention that attends to everything, with neither projections nor RoPE."""

    forward = model.Llama4Attention.forward
    _rotate_and_store = model.Llama4Attention._rotate_and_store

    def __init__(self, run: SimpleNamespace, **scales):
        super().__init__(
            layer=LayerConfig(chunk_size=None, use_rope=False, qk_norm_eps=None, temperature=None, is_moe=True), cos_sin_cache=None,
            qkv_proj=lambda x: (x, None), attn=Attention(**vars(LAYER) | scales, backend=Llama4AttentionBackend(run)), o_proj=lambda x: (x, None),
        )  # fmt: skip


def prefill(run: SimpleNamespace, tokens: int, monkeypatch) -> SimpleNamespace:
    """The batch of one prompt, once its pool is SGLang's."""
    forward_batch = batch(ForwardMode.EXTEND, [tokens], [tokens])
    forward_batch.out_cache_loc = run.req_to_token_pool.req_to_token[2, :tokens].long()
    monkeypatch.setattr(model, "get_token_to_kv_pool", lambda: run.token_to_kv_pool)
    return forward_batch


def test_an_fp8_cache_is_written_and_read_by_its_scales(monkeypatch):
    """Where the codes are exact, a layer computes what it does over a cache without."""
    tokens, pools, outputs = 5, [], []
    hidden = torch.randint(-8, 9, (tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)).float()
    for dtype in (torch.float32, torch.float8_e4m3fn):
        run = runner(dtype=dtype)
        forward_batch, layer = prefill(run, tokens, monkeypatch), Layer(run, k_scale=torch.tensor(0.5), v_scale=torch.tensor(4.0))
        outputs.append(layer.forward(torch.arange(tokens), hidden, forward_batch))
        buffers = (run.token_to_kv_pool.get_key_buffer, run.token_to_kv_pool.get_value_buffer)
        pools.append([buffer(0)[forward_batch.out_cache_loc].float() for buffer in buffers])
    assert torch.equal(pools[0][0], pools[1][0] * 0.5) and torch.equal(pools[0][1], pools[1][1] * 4.0)
    torch.testing.assert_close(*outputs)


def test_a_compiled_layer_writes_the_cache_outside_of_its_graphs(monkeypatch):
    """In a graph, a write to two halves of one allocation copies all of it: a layer's whole cache at each step."""
    run, tokens, graphs = runner(), 5, []
    forward_batch, layer = prefill(run, tokens, monkeypatch), Layer(run)
    positions, hidden = torch.arange(tokens), torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)

    def collect(graph, examples):
        graphs.append(graph)
        return graph

    got = torch.compile(lambda hidden: layer.forward(positions, hidden * 2, forward_batch), backend=collect)(hidden)
    torch.testing.assert_close(got, layer.forward(positions, hidden * 2, forward_batch))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert called and not any("rope_qk_norm" in name for name in called)


@pytest.mark.gpu
@pytest.mark.parametrize("mode, queries", MODES)
def test_a_step_synchronises_with_nothing(mode, queries):
    backend, forward_batch = Llama4AttentionBackend(runner("cuda")), batch(mode, [67, 130, 70], queries, "cuda")
    q = torch.randn(sum(queries), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    want = attend(backend, q, forward_batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attend(backend, q, forward_batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("mode, queries", [mode for mode in MODES if mode[0] != ForwardMode.EXTEND])
def test_a_graph_serves_other_lengths(mode, queries):
    """Captured with one set of lengths and rows, replayed with another."""
    run = runner("cuda")
    backend = Llama4AttentionBackend(run)
    q = torch.randn(sum(queries), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    static = batch(mode, [max(9, new) for new in queries], queries, "cuda")
    attend(backend, q, static)
    graph = torch.cuda.CUDAGraph()
    backend.init_forward_metadata_out_graph(static, in_capture=True)
    with torch.cuda.graph(graph):
        backend.init_forward_metadata_in_graph(static)
        captured = backend.forward_extend(q, None, None, LAYER, static, save_kv_cache=False, chunk_size=CHUNK)
    live = batch(mode, [67, 130, 70], queries, "cuda")
    static.seq_lens.copy_(live.seq_lens)
    graph.replay()
    assert torch.equal(captured, attend(Llama4AttentionBackend(run), q, live))


def test_the_scheduler_waits_for_the_last_layer():
    """Each layer reads the scheduler's tables."""
    backend = Llama4AttentionBackend(runner())
    assert backend.shared_read_ends(ForwardMode.DECODE) == backend.shared_read_ends(ForwardMode.TARGET_VERIFY) == SharedReadEnds.POST_REPLAY
    assert backend.shared_read_ends(ForwardMode.EXTEND) == SharedReadEnds.UNKNOWN


def test_a_tree_of_drafts_is_refused():
    backend = Llama4AttentionBackend(runner())
    with pytest.raises(ValueError, match="verifies drafts that are one chain"):
        backend.init_forward_metadata(batch(ForwardMode.TARGET_VERIFY, [67], [4], topk=2))


@pytest.mark.parametrize("mode, queries", [(ForwardMode.DECODE, [1]), (ForwardMode.EXTEND, [10])])
def test_torch_native_attends_past_the_chunk(mode, queries):
    """SGLang's backend for the CPU, given a local layer: right up to the chunk's end; past it, it still sees the chunk before."""
    run, q = runner(), torch.randn(sum(queries), HEADS, HEAD_DIM)
    stock = TorchNativeAttnBackend(run)
    for keys, is_right in ([CHUNK], True), ([CHUNK + 10], False):
        forward_batch = batch(mode, keys, queries)
        stock.init_forward_metadata(forward_batch)
        compute = stock.forward_decode if mode.is_decode() else stock.forward_extend
        got = compute(q.flatten(1), None, None, LAYER, forward_batch, save_kv_cache=False).view(-1, HEADS * HEAD_DIM)
        torch.testing.assert_close(got, expected(run, q, keys, queries, chunk_size=None))
        error = (got - expected(run, q, keys, queries)).abs().amax()
        assert error < 1e-5 if is_right else error > 0.1
