"""Llama 4 for SGLang, computed by the ops of llama4_kernels.

Embedding, norms, projections, the vision tower, sharding and the all-reduces between stages are SGLang's own; attention with RoPE and the
KV-cache write, and the MoE layer with its routing, are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layer_boundary import append_stages, declare_attn, declare_ffn
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.utils import RoutingMethodType
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.models import llama4, mllama4
from sglang.srt.models.llama import LlamaMLP
from sglang.srt.runtime_context import get_mm, get_model, get_parallel, get_spec
from sglang.srt.utils import add_prefix, make_layers
from torch import Tensor, nn
from transformers import Llama4Config, Llama4TextConfig

from llama4_kernels import ops
from llama4_kernels.ops import backend
from llama4_kernels.ops.types import SCALE_BLOCK
from llama4_kernels.sglang.attention import layer_cache
from llama4_kernels.sglang.checkpoint import CheckedWeights, CheckpointError
from llama4_kernels.sglang.config import LayerConfig, check_sharding, cos_sin_cache, layer_config, rope_positions
from llama4_kernels.sglang.server_modes import check_graphs, check_server
from llama4_kernels.sglang.vision import vision_tensors
from llama4_kernels.sglang.weights import adapt_text_only, adopt, moe_is_fp8, moe_weights

logger = logging.getLogger("llama4_kernels")


class Llama4Norm(RMSNorm):
    """SGLang's RMSNorm, in float32 too: on a GPU its kernel for a norm without a residual takes 16 bits only."""

    def forward_cuda(self, x: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor]:
        forward = self.forward_native if x.dtype == torch.float32 else super().forward_cuda
        return forward(x, *args, **kwargs)


class Llama4MoE(nn.Module):
    """Routed experts, top-1, and the shared expert; the output is this rank's part of the sum."""

    def __init__(self, config: Llama4TextConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.router = ReplicatedLinear(
            config.hidden_size, config.num_local_experts, bias=False, quant_config=None, prefix=add_prefix("router", prefix)
        )
        self.experts = FusedMoE(
            num_experts=config.num_local_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layer_id=layer_id,
            reduce_results=False,
            quant_config=quant_config,
            apply_router_weight_on_input=True,
            routing_method_type=RoutingMethodType.Llama4,
            prefix=add_prefix("experts", prefix),
        )
        self.shared_expert = LlamaMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act="silu",
            quant_config=quant_config,
            prefix=add_prefix("shared_expert", prefix),
            reduce_results=False,
        )

    def forward(self, hidden_states: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """[T, H] of hidden_states [T, H], before the all-reduce over ranks."""
        return ops.fused_moe(hidden_states, moe_weights(self.router, self.experts, self.shared_expert))


class Llama4Attention(nn.Module):
    """qkv projection, RoPE or temperature with the KV-cache write, attention, output projection."""

    def __init__(
        self,
        config: Llama4TextConfig,
        layer: LayerConfig,
        layer_id: int,
        cos_sin: Tensor,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.layer = layer
        self.register_buffer("cos_sin_cache", cos_sin if layer.use_rope else None, persistent=False)
        self.qkv_proj = QKVParallelLinear(
            hidden_size=config.hidden_size,
            head_size=config.head_dim,
            total_num_heads=config.num_attention_heads,
            total_num_kv_heads=config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
            parallel_group="attn_tp",
        )
        self.o_proj = RowParallelLinear(
            input_size=config.num_attention_heads * config.head_dim,
            output_size=config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
            parallel_group="attn_tp",
            reduce_results=False,
        )
        tp_size = get_parallel().attn_tp_size
        self.attn = RadixAttention(
            config.num_attention_heads // tp_size,
            config.head_dim,
            scaling=config.head_dim**-0.5,
            num_kv_heads=max(1, config.num_key_value_heads // tp_size),
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """[T, H] of hidden_states [T, H] at positions [T] int64, before the all-reduce over the ranks that share heads; writes K and V."""
        qkv, _ = self.qkv_proj(hidden_states)
        q = self._rotate_and_store(qkv, positions, forward_batch.out_cache_loc)
        attended = self.attn(q.flatten(1), None, None, forward_batch, save_kv_cache=False, chunk_size=self.layer.chunk_size)
        output, _ = self.o_proj(attended)
        return output

    @torch.compiler.disable(reason="K and V are halves of one allocation: compiled, a write to both copies the whole cache of the layer")
    def _rotate_and_store(self, qkv: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """q [T, query heads, head_dim] of qkv; writes K and V into the layer's cache."""
        cache = layer_cache(get_token_to_kv_pool(), self.attn)
        return ops.rope_qk_norm(
            qkv,
            positions,
            num_heads=self.attn.tp_q_head_num,
            num_kv_heads=self.attn.tp_k_head_num,
            head_dim=self.attn.head_dim,
            cos_sin=self.cos_sin_cache,
            qk_norm_eps=self.layer.qk_norm_eps,
            temperature=self.layer.temperature,
            k_cache=cache.k,
            v_cache=cache.v,
            slots=slots,
            slot_map=cache.slot_map,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )


class Llama4DecoderLayer(llama4.Llama4DecoderLayer):
    """SGLang's order of stages, with our attention and MoE in them."""

    def __init__(self, config: Llama4TextConfig, layer_id: int, cos_sin: Tensor, quant_config: QuantizationConfig | None, prefix: str):
        nn.Module.__init__(self)
        layer = layer_config(config, layer_id)
        self.self_attn = Llama4Attention(config, layer, layer_id, cos_sin, quant_config, add_prefix("self_attn", prefix))
        prefix = add_prefix("feed_forward", prefix)
        if layer.is_moe:
            self.feed_forward = Llama4MoE(config, layer_id, quant_config, prefix)
        else:
            self.feed_forward = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size_mlp,
                hidden_act="silu",
                quant_config=quant_config,
                prefix=prefix,
                reduce_results=False,
            )
        self.input_layernorm = Llama4Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Llama4Norm(config.hidden_size, eps=config.rms_norm_eps)
        feed_forward = declare_ffn(sparse=layer.is_moe, next_layer_sparse=layer_id + 1 in config.moe_layers)
        self.attn_boundary, self.ffn_boundary = append_stages(
            (declare_attn(), self.input_layernorm), (feed_forward, self.post_attention_layernorm)
        )


class Llama4Model(llama4.Llama4Model):
    """Embedding, decoder layers and final norm, run in SGLang's order."""

    def __init__(self, config: Llama4TextConfig, quant_config: QuantizationConfig | None, prefix: str):
        nn.Module.__init__(self)
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("embed_tokens", prefix),
            use_attn_tp_group=is_dp_attention_enabled(),
        )
        spec = get_spec()
        positions = rope_positions(config.context_len, spec.speculative_num_steps or 0, spec.speculative_num_draft_tokens or 0)
        cos_sin = cos_sin_cache(config, positions)
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: Llama4DecoderLayer(config, idx, cos_sin, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.norm = Llama4Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers_to_capture = []


class _LanguageModel(llama4.Llama4ForCausalLM):
    def _init_model(self, config: Llama4TextConfig, quant_config: QuantizationConfig | None = None, prefix: str = "") -> Llama4Model:
        return Llama4Model(config, quant_config, prefix)

    def forward(self, input_ids: Tensor | None, positions: Tensor, forward_batch: ForwardBatch, *args, **kwargs):
        """SGLang's, with the tokens of the batch where only their embeddings are given: scoring asks the logits processor for their device."""
        return super().forward(forward_batch.input_ids if input_ids is None else input_ids, positions, forward_batch, *args, **kwargs)


class Llama4ForConditionalGeneration(mllama4.Llama4ForConditionalGeneration):
    """Llama 4 with SGLang's vision tower, where the checkpoint has one and the server has multimodal input enabled."""

    def __init__(self, config: Llama4Config | Llama4TextConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        nn.Module.__init__(self)
        check_server()
        self.config = config
        self.quant_config = quant_config
        text_config = config.get_text_config()
        text_config.context_len = config.context_len  # which SGLang derives, and gives to the whole config only
        check_sharding(text_config, get_parallel().tp_size, get_parallel().attn_tp_size)
        self.has_vision = bool(get_mm().enable_multimodal)
        self.vision_model = self.multi_modal_projector = None
        if self.has_vision:
            is_quantised = self._is_vision_quantised()  # refuses a checkpoint without a vision tower
            self.vision_model = mllama4.Llama4VisionModel(
                config.vision_config,
                quant_config=quant_config if is_quantised else None,
                prefix=add_prefix("vision_model", prefix),
            )
            rotary = self.vision_model.rotary_embedding
            rotations = rotary.freqs_ci
            del rotary.freqs_ci
            rotary.register_buffer("freqs_ci", rotations, persistent=False)  # which SGLang keeps while the weights' memory is released
            self.multi_modal_projector = mllama4.Llama4MultiModalProjector(config)
        is_text_only = text_config is config  # whose checkpoint, and so its quantisation, has names without the prefix
        if is_text_only:
            adapt_text_only(quant_config)
        self.language_model = _LanguageModel(text_config, quant_config, prefix if is_text_only else add_prefix("language_model", prefix))
        self.logits_processor = LogitsProcessor(text_config)
        self.source = getattr(config, "_name_or_path", "")
        self.expects_all = True
        adopt(self)
        logger.info("llama4_kernels: serving %s", type(self).__name__)
        embedding = self.language_model.model.embed_tokens.weight
        device = embedding.device
        for choice in backend.choices(device, embedding.dtype):
            logger.info("llama4_kernels: %s -> %s (%s)", choice.op, choice.backend, choice.why)
        cache = getattr(quant_config, "kv_cache_quant_algo", None)  # SGLang's choice where --kv-cache-dtype is auto
        check_graphs(device, is_fp8=moe_is_fp8(self), checkpoint_cache=str(cache).lower())

    def _is_vision_quantised(self) -> bool:
        """Whether the checkpoint has scales for its vision tower, whatever it says of modules that it ignores, in whichever words."""
        model = get_model()
        if model.load_format == "dummy" and hasattr(self.config, "vision_config"):
            return False
        return any("_scale" in name for name in vision_tensors(self.config._name_or_path, model.revision, model.download_dir))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the checkpoint at `self.source`, all of it where `self.expects_all`, else a part; CheckpointError names the tensor that is
        missing, unknown, cut off or of the wrong shape or dtype. The next load may bring a part."""
        checked = self.checked(weights, self.source, self.expects_all)
        try:
            super().load_weights(checked)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"checkpoint tensor {checked.current} does not fit this model: {error!r}") from error
        self.expects_all = False

    def post_load_weights(self) -> None:
        """SGLang calls it where the model has got its weights without load_weights: --load-format dummy, whose random scales may be negative,
        which the ops do not take."""
        if self.expects_all:
            for name, parameter in self.named_parameters():
                if "_scale" in name:
                    parameter.data.abs_()
        self.expects_all = False

    def checked(self, weights: Iterable[tuple[str, Tensor]], path: str, complete: bool) -> CheckedWeights:
        """`weights` of the checkpoint at `path`, checked against this model as they are iterated over."""
        parameters = {name: parameter.dtype for name, parameter in self.named_parameters()}
        return CheckedWeights(weights, self.config, parameters, path=path, complete=complete)

    def permute_qk_weight_for_rotary(self, name: str, loaded_weight: Tensor) -> tuple[str, Tensor]:
        """SGLang's permutation of the rows of q and k, from RoPE's interleaved to its half-split form, for scales per row too. CheckpointError
        where it would take rows into blocks of other scales."""
        config = self.language_model.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        is_scale = name.endswith((".weight_scale", ".weight_scale_inv"))
        if heads is None or not is_scale or loaded_weight.shape[:1] != (heads * config.head_dim,):
            if heads and is_scale and loaded_weight.dim() == 2 and len(loaded_weight) > 1 and SCALE_BLOCK % config.head_dim:
                needs = f"a head_dim that divides {SCALE_BLOCK} where q and k have scales per block of {SCALE_BLOCK} rows"
                raise CheckpointError(f"config.json: head_dim is {config.head_dim}, {name} needs {needs}")
            return super().permute_qk_weight_for_rotary(name, loaded_weight)
        return name, loaded_weight.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(loaded_weight.shape)

    def _handle_scale_remapping(self, name: str, params_dict: dict) -> bool:
        """Names are remapped by CheckedWeights; SGLang's own remapping drops the scale that it has remapped."""
        return False


class Llama4ForCausalLM(Llama4ForConditionalGeneration):
    """A text-only checkpoint: the same, with a text config and no vision tower."""
