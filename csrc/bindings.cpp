#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "grouped_gemm.h"
#include "moe.h"
#include "quantization.h"
#include "rope.h"
#include "routing.h"

#ifdef LLAMA4_KERNELS_EMULATION
#include "device.h"
#include "hopper/wgmma.cuh"
#include "moe_runs.cuh"
#endif

namespace py = pybind11;
using namespace llama4_kernels;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

#ifdef LLAMA4_KERNELS_EMULATION

std::vector<int64_t> moe_run_begins(int stages, int grid) {
    const StageRuns runs = StageRuns::of(stages, grid);
    std::vector<int64_t> begins;
    for (int block = 0; block <= grid; ++block) begins.push_back(runs.begin(block));
    return begins;
}

std::vector<py::dict> launches_of(const py::function& call, int multiprocessors) {
    emulation::Recording recording{multiprocessors, {}};
    emulation::recording = &recording;
    try {
        call();
    } catch (...) {
        emulation::recording = nullptr;
        throw;
    }
    emulation::recording = nullptr;
    const auto sizes = [](dim3 of) { return std::vector<unsigned>{of.x, of.y, of.z}; };
    std::vector<py::dict> launches;
    for (const auto& each : recording.launches) {
        launches.push_back(py::dict(py::arg("op") = each.op, py::arg("grid") = sizes(each.grid), py::arg("threads") = each.block.x,
                                    py::arg("cluster") = each.cluster_blocks, py::arg("shared_bytes") = each.shared_bytes));
    }
    return launches;
}

#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Launchers of the CUDA kernels. Tensors are device addresses, streams are CUDA stream handles.";

    py::enum_<Dtype>(module, "Dtype", py::module_local())
        .value("bfloat16", Dtype::bfloat16)
        .value("float32", Dtype::float32)
        .value("float8_e4m3fn", Dtype::float8_e4m3fn);
    py::class_<Indices>(module, "Indices", py::module_local())
        .def(py::init([](uintptr_t values, bool is_int64) { return Indices{pointer<void>(values), is_int64}; }), py::arg("values"),
             py::arg("is_int64"));

    module.def(
        "quantize_per_token",
        [](uintptr_t x, Dtype dtype, int64_t rows, int64_t columns, uintptr_t codes, uintptr_t scale, uintptr_t stream) {
            quantize_per_token(pointer<void>(x), dtype, rows, columns, pointer<uint8_t>(codes), pointer<float>(scale), pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("codes"), py::arg("scale"), py::arg("stream"));

    module.def(
        "quantize_static",
        [](uintptr_t x, Dtype dtype, int64_t elements, uintptr_t scale, uintptr_t codes, uintptr_t stream) {
            quantize_static(pointer<void>(x), dtype, elements, pointer<float>(scale), pointer<uint8_t>(codes), pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("elements"), py::arg("scale"), py::arg("codes"), py::arg("stream"));

    module.attr("GEMM_ROW_ALIGNMENT") = GEMM_ROW_ALIGNMENT;
    module.attr("MAX_GEMM_GROUPS") = MAX_GEMM_GROUPS;
    module.def(
        "grouped_gemm",
        [](uintptr_t a, uintptr_t b, Dtype dtype, uintptr_t out, Dtype out_dtype, int64_t a_rows, int64_t m, int64_t n, int64_t k, int groups,
           uintptr_t offsets, uintptr_t rows, uintptr_t a_scale, int a_scale_dimensions, uintptr_t b_scale, int b_scale_dimensions, uintptr_t stream) {
            const GroupedGemmArguments arguments{
                pointer<void>(a), pointer<void>(b), dtype, pointer<void>(out), out_dtype, a_rows, m, n, k, groups, pointer<int>(offsets),
                pointer<int>(rows), pointer<float>(a_scale), a_scale_dimensions, pointer<float>(b_scale), b_scale_dimensions};
            grouped_gemm(arguments, pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("a"), py::arg("b"), py::arg("dtype"), py::arg("out"), py::arg("out_dtype"), py::arg("a_rows"), py::arg("m"),
        py::arg("n"), py::arg("k"), py::arg("groups"), py::arg("offsets"), py::arg("rows"), py::arg("a_scale"), py::arg("a_scale_dimensions"),
        py::arg("b_scale"), py::arg("b_scale_dimensions"), py::arg("stream"));

    module.attr("MAX_ROPE_HEAD_DIM") = MAX_ROPE_HEAD_DIM;
    module.def(
        "rope_qk_norm",
        [](uintptr_t qkv, Dtype dtype, uintptr_t q, uintptr_t k, uintptr_t v, Dtype kv_dtype, int tokens, int num_heads, int num_kv_heads, int head_dim,
           Indices positions, uintptr_t cos_sin, bool interleaved, std::optional<float> qk_norm_eps, float attn_scale, int64_t floor_scale,
           uintptr_t slots, Indices slot_map, uintptr_t k_scale, uintptr_t v_scale, uintptr_t stream) {
            const RopeArguments arguments{
                pointer<void>(qkv), dtype, pointer<void>(q), pointer<void>(k), pointer<void>(v), kv_dtype, tokens, num_heads, num_kv_heads, head_dim,
                positions, pointer<float>(cos_sin), interleaved, qk_norm_eps.has_value(), qk_norm_eps.value_or(0.0f), attn_scale, floor_scale,
                pointer<int64_t>(slots), slot_map, pointer<float>(k_scale), pointer<float>(v_scale)};
            rope_qk_norm(arguments, pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("qkv"), py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("kv_dtype"), py::arg("tokens"),
        py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("positions"), py::arg("cos_sin"), py::arg("interleaved"),
        py::arg("qk_norm_eps"), py::arg("attn_scale"), py::arg("floor_scale"), py::arg("slots"), py::arg("slot_map"), py::arg("k_scale"),
        py::arg("v_scale"), py::arg("stream"));

    module.attr("ATTENTION_TILE") = ATTENTION_TILE;
    module.attr("ATTENTION_FEW_SPLIT_TILES") = ATTENTION_FEW_SPLIT_TILES;
    module.attr("ATTENTION_FEW_MAX_SPLITS") = ATTENTION_FEW_MAX_SPLITS;
    module.attr("ATTENTION_FEW_PARTS") = ATTENTION_FEW_PARTS;
    module.attr("ATTENTION_MANY_ROWS") = ATTENTION_MANY_ROWS;
    module.attr("ATTENTION_MANY_SPLIT_TILES") = ATTENTION_MANY_SPLIT_TILES;
    module.attr("ATTENTION_MANY_MAX_SPLITS") = ATTENTION_MANY_MAX_SPLITS;
    module.attr("ATTENTION_FEW_QUERIES") = ATTENTION_FEW_QUERIES;
    module.attr("ATTENTION_MAX_REQUESTS") = ATTENTION_MAX_REQUESTS;
    module.attr("ATTENTION_NO_CHUNK") = ATTENTION_NO_CHUNK;
    module.def(
        "chunked_attention",
        [](uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, Dtype kv_dtype, uintptr_t out, int tokens, int num_heads, int num_kv_heads, int head_dim,
           int64_t slots, int page_size, bool holds_slots, uintptr_t page_table, int64_t page_table_stride, int requests, Indices page_table_rows,
           Indices slot_map, uintptr_t seq_lens, uintptr_t query_start_loc, int chunk_size, float scale, uintptr_t k_scale, uintptr_t v_scale,
           uintptr_t few_partial, uintptr_t few_lse, uintptr_t few_tickets, int few_max_splits, uintptr_t many_partial, uintptr_t many_lse,
           uintptr_t many_tickets, int many_max_splits, uintptr_t drawn, uintptr_t stream) {
            const AttentionArguments arguments{
                pointer<void>(q), pointer<void>(k_cache), pointer<void>(v_cache), kv_dtype, pointer<void>(out), tokens, num_heads, num_kv_heads,
                head_dim, slots, page_size, holds_slots, pointer<int>(page_table), page_table_stride, requests, page_table_rows, slot_map,
                pointer<int>(seq_lens), pointer<int>(query_start_loc), chunk_size, scale, pointer<float>(k_scale), pointer<float>(v_scale),
                pointer<float>(few_partial), pointer<float>(few_lse), pointer<unsigned>(few_tickets), few_max_splits, pointer<float>(many_partial),
                pointer<float>(many_lse), pointer<unsigned>(many_tickets), many_max_splits, pointer<unsigned>(drawn)};
            chunked_attention(arguments, pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("kv_dtype"), py::arg("out"), py::arg("tokens"),
        py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("slots"), py::arg("page_size"), py::arg("holds_slots"),
        py::arg("page_table"), py::arg("page_table_stride"), py::arg("requests"), py::arg("page_table_rows"), py::arg("slot_map"), py::arg("seq_lens"),
        py::arg("query_start_loc"), py::arg("chunk_size"), py::arg("scale"), py::arg("k_scale"), py::arg("v_scale"), py::arg("few_partial"),
        py::arg("few_lse"), py::arg("few_tickets"), py::arg("few_max_splits"), py::arg("many_partial"), py::arg("many_lse"), py::arg("many_tickets"),
        py::arg("many_max_splits"), py::arg("drawn"), py::arg("stream"));

    module.attr("ROUTE_MAX_EXPERTS") = ROUTE_MAX_EXPERTS;
    module.attr("ROUTE_MAX_HIDDEN") = ROUTE_MAX_HIDDEN;
    module.attr("ROUTE_FEW_TOKENS") = ROUTE_FEW_TOKENS;
    module.def("route_slices", &route_slices, py::arg("experts"));
    module.def(
        "route_top1",
        [](uintptr_t x, Dtype x_dtype, uintptr_t router, Dtype router_dtype, int tokens, int hidden, int experts, uintptr_t expert_ids, uintptr_t scores,
           uintptr_t order, uintptr_t offsets, uintptr_t codes, uintptr_t scale, uintptr_t best, uintptr_t tickets, bool dependent, uintptr_t stream) {
            const RouteArguments arguments{
                pointer<void>(x), x_dtype, pointer<void>(router), router_dtype, tokens, hidden, experts, pointer<int>(expert_ids),
                pointer<float>(scores), pointer<int>(order), pointer<int>(offsets), pointer<uint8_t>(codes), pointer<float>(scale),
                pointer<unsigned long long>(best), pointer<unsigned>(tickets), dependent};
            route_top1(arguments, pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("x_dtype"), py::arg("router"), py::arg("router_dtype"), py::arg("tokens"), py::arg("hidden"),
        py::arg("experts"), py::arg("expert_ids"), py::arg("scores"), py::arg("order"), py::arg("offsets"), py::arg("codes"), py::arg("scale"),
        py::arg("best"), py::arg("tickets"), py::arg("dependent"), py::arg("stream"));

    py::enum_<MoeConversion>(module, "MoeConversion", py::module_local())
        .value("none", MoeConversion::none)
        .value("fixed", MoeConversion::fixed)
        .value("per_block", MoeConversion::per_block);
    py::class_<MoeOperand>(module, "MoeOperand", py::module_local())
        .def(py::init([](uintptr_t values, uintptr_t scale, int64_t scale_row_stride, int64_t scale_step_stride, uintptr_t factors, MoeConversion conversion) {
                 return MoeOperand{pointer<void>(values), pointer<float>(scale), scale_row_stride, scale_step_stride, pointer<float>(factors), conversion};
             }),
             py::kw_only(), py::arg("values"), py::arg("scale"), py::arg("scale_row_stride"), py::arg("scale_step_stride"), py::arg("factors"),
             py::arg("conversion"));
    py::class_<MoeWeight>(module, "MoeWeight", py::module_local())
        .def(py::init([](uintptr_t values, Dtype dtype, uintptr_t scale, int scale_dimensions) {
                 return MoeWeight{pointer<void>(values), dtype, pointer<float>(scale), scale_dimensions};
             }),
             py::kw_only(), py::arg("values"), py::arg("dtype"), py::arg("scale"), py::arg("scale_dimensions"));
    py::class_<MoeSharing>(module, "MoeSharing", py::module_local())
        .def(py::init([](int blocks, uintptr_t parts, uintptr_t tickets) { return MoeSharing{blocks, pointer<float>(parts), pointer<unsigned>(tickets)}; }),
             py::kw_only(), py::arg("blocks"), py::arg("parts"), py::arg("tickets"));
    py::class_<MoeRouting>(module, "MoeRouting", py::module_local())
        .def(py::init([](uintptr_t order, uintptr_t offsets) { return MoeRouting{pointer<int>(order), pointer<int>(offsets)}; }), py::kw_only(),
             py::arg("order"), py::arg("offsets"));
    py::class_<MoeHidden>(module, "MoeHidden", py::module_local())
        .def(py::init([](uintptr_t values, Dtype dtype, uintptr_t scale, bool is_static, int width) {
                 return MoeHidden{pointer<void>(values), dtype, pointer<float>(scale), is_static, width};
             }),
             py::kw_only(), py::arg("values"), py::arg("dtype"), py::arg("scale"), py::arg("is_static"), py::arg("width"));

    module.def("moe_multiprocessors", &moe_multiprocessors);
    module.attr("MOE_GATE_UP_COLUMNS") = MOE_GATE_UP_COLUMNS;
    module.attr("MOE_MIN_RUN") = MOE_MIN_RUN;
    module.attr("MOE_MANY_ROUNDS") = MOE_MANY_ROUNDS;
    module.def("moe_tile_tokens", &moe_tile_tokens, py::arg("tokens"));
    module.def("moe_gate_up_part", &moe_gate_up_part, py::arg("tokens"));
    module.def("moe_down_part", &moe_down_part, py::arg("tokens"));
    module.def("moe_down_columns", &moe_down_columns, py::arg("tokens"));
    module.def(
        "moe_gate_up",
        [](const MoeOperand& x_shared, const MoeOperand& x_routed, const MoeWeight& w_shared, const MoeWeight& w_routed, const MoeHidden& h_shared,
           const MoeHidden& h_routed, const MoeRouting& routing, int tokens, int hidden, int experts, const MoeSharing& sharing, bool prefetch_shared,
           uintptr_t prefetch, int64_t prefetch_bytes, bool dependent, uintptr_t stream) {
            moe_gate_up({x_shared, x_routed, w_shared, w_routed, h_shared, h_routed, routing, tokens, hidden, experts, sharing, prefetch_shared,
                         pointer<void>(prefetch), prefetch_bytes, dependent},
                        pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("x_shared"), py::arg("x_routed"), py::arg("w_shared"), py::arg("w_routed"), py::arg("h_shared"), py::arg("h_routed"),
        py::arg("routing"), py::arg("tokens"), py::arg("hidden"), py::arg("experts"), py::arg("sharing"), py::arg("prefetch_shared"), py::arg("prefetch"),
        py::arg("prefetch_bytes"), py::arg("dependent"), py::arg("stream"));
    module.def(
        "moe_down",
        [](const MoeOperand& h_shared, const MoeOperand& h_routed, const MoeWeight& w_shared, const MoeWeight& w_routed, int k_shared, int k_routed,
           const MoeRouting& routing, int tokens, int hidden, int experts, uintptr_t out, const MoeSharing& sharing, bool dependent, uintptr_t stream) {
            moe_down({h_shared, h_routed, w_shared, w_routed, k_shared, k_routed, routing, tokens, hidden, experts, pointer<void>(out), sharing, dependent},
                     pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("h_shared"), py::arg("h_routed"), py::arg("w_shared"), py::arg("w_routed"), py::arg("k_shared"), py::arg("k_routed"),
        py::arg("routing"), py::arg("tokens"), py::arg("hidden"), py::arg("experts"), py::arg("out"), py::arg("sharing"), py::arg("dependent"),
        py::arg("stream"));

#ifdef LLAMA4_KERNELS_EMULATION
    module.def("moe_run_begins", &moe_run_begins, "The first stage of each block's run, and the end of the last.", py::arg("stages"), py::arg("grid"));
    module.def("launches_of", &launches_of, "What `call` launches on a GPU of so many multiprocessors; no kernel runs.", py::arg("call"),
               py::arg("multiprocessors"));
    module.def(
        "grouped_gemm_tile",
        [](int64_t m, int64_t n, int groups, int multiprocessors) {
            const GemmTile tile = grouped_gemm_tile(m, n, groups, multiprocessors);
            return py::make_tuple(tile.tokens, tile.channels);
        },
        "(tokens, channels) of the tile that grouped_gemm takes.", py::kw_only(), py::arg("m"), py::arg("n"), py::arg("groups"),
        py::arg("multiprocessors"));
    module.def("hold_launches", [] { emulation::stream.hold(); },
               "From now on launches are held, to begin as early as programmatic dependent launch allows in run_held_launches.");
    module.def("run_held_launches", [] { emulation::stream.finish(); }, "All memory that they were given must still be there.");
    module.def("keep_e4m3_sum_bits", [](int bits) { emulation::e4m3_sum_bits = bits; },
               "From now on wgmma's sums of e4m3 products keep so many bits of the mantissa; 0: all of fp32's, as without this.", py::arg("bits"));
    module.def("run_together", [](unsigned clusters) { emulation::clusters_together = clusters; },
               "From now on so many clusters of a grid, or blocks where it has none, take turns; 1 without this.", py::arg("clusters"));
#endif
}
