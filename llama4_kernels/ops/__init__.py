"""What each op computes: contract, argument checks, torch.library registration, and the choice of backend.

Ops compute forwards only: a backward pass through one raises RuntimeError. Indices have one dtype where one party makes them: what ops
return themselves (Routing) or read for every row or page (offsets, rows, page_table, seq_lens, query_start_loc) is int32, the slots that
rope_qk_norm writes are int64. What callers hold in either is taken as it is: positions, slot_map and page_table_rows.
"""

from llama4_kernels.ops.attention import chunked_attention
from llama4_kernels.ops.grouped_gemm import grouped_gemm
from llama4_kernels.ops.moe import fused_moe, moe_down, moe_gate_up
from llama4_kernels.ops.quantization import quantize_per_token
from llama4_kernels.ops.rope import rope_qk_norm
from llama4_kernels.ops.routing import route_top1
from llama4_kernels.ops.types import Linear, MoEWeights, Quantized, Routing

__all__ = [
    "Linear",
    "MoEWeights",
    "Quantized",
    "Routing",
    "chunked_attention",
    "fused_moe",
    "grouped_gemm",
    "moe_down",
    "moe_gate_up",
    "quantize_per_token",
    "rope_qk_norm",
    "route_top1",
]
