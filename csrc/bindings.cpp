#include "attention.h"
#include "fields.h"
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

// A field of S, the struct at hand.
#define FIELD(name) fields::Member<&S::name>::field(#name)

PYBIND11_MODULE(_C, module) {
    using fields::def_launcher, fields::def_struct;
    module.doc() = "Launchers of the CUDA kernels. Tensors are device addresses, streams are CUDA stream handles.";

    py::enum_<Dtype>(module, "Dtype", py::module_local())
        .value("bfloat16", Dtype::bfloat16)
        .value("float32", Dtype::float32)
        .value("float8_e4m3fn", Dtype::float8_e4m3fn);
    py::class_<Indices>(module, "Indices", py::module_local())
        .def(py::init([](uintptr_t values, bool is_int64) { return Indices{reinterpret_cast<const void*>(values), is_int64}; }),
             py::arg("values"), py::arg("is_int64"));

    {
        using S = QuantizeArguments;
        def_launcher(module, "quantize_per_token", &quantize_per_token, FIELD(x), FIELD(dtype), FIELD(rows), FIELD(columns), FIELD(codes),
                     FIELD(scale));
    }
    {
        using S = QuantizeStaticArguments;
        def_launcher(module, "quantize_static", &quantize_static, FIELD(x), FIELD(dtype), FIELD(elements), FIELD(scale), FIELD(codes));
    }

    module.attr("GEMM_ROW_ALIGNMENT") = GEMM_ROW_ALIGNMENT;
    module.attr("MAX_GEMM_GROUPS") = MAX_GEMM_GROUPS;
    {
        using S = GroupedGemmArguments;
        def_launcher(module, "grouped_gemm", &grouped_gemm, FIELD(a), FIELD(b), FIELD(dtype), FIELD(out), FIELD(out_dtype), FIELD(a_rows),
                     FIELD(m), FIELD(n), FIELD(k), FIELD(groups), FIELD(offsets), FIELD(rows), FIELD(a_scale), FIELD(a_scale_dimensions),
                     FIELD(b_scale), FIELD(b_scale_dimensions));
    }

    module.attr("MAX_ROPE_HEAD_DIM") = MAX_ROPE_HEAD_DIM;
    {
        using S = RopeArguments;
        def_launcher(module, "rope_qk_norm", &rope_qk_norm, FIELD(qkv), FIELD(dtype), FIELD(q), FIELD(k), FIELD(v), FIELD(kv_dtype),
                     FIELD(tokens), FIELD(num_heads), FIELD(num_kv_heads), FIELD(head_dim), FIELD(positions), FIELD(cos_sin),
                     FIELD(interleaved), FIELD(qk_norm_eps), FIELD(attn_scale), FIELD(floor_scale), FIELD(slots), FIELD(slot_map),
                     FIELD(k_scale), FIELD(v_scale));
    }

    module.attr("ATTENTION_TILE") = ATTENTION_TILE;
    module.attr("ATTENTION_MAX_REQUESTS") = ATTENTION_MAX_REQUESTS;
    module.attr("ATTENTION_NO_CHUNK") = ATTENTION_NO_CHUNK;
    module.attr("ATTENTION_FEW_QUERIES") = ATTENTION_FEW_QUERIES;
    module.attr("ATTENTION_FEW_SPLIT_TILES") = ATTENTION_FEW_SPLIT_TILES;
    module.attr("ATTENTION_FEW_MAX_SPLITS") = ATTENTION_FEW_MAX_SPLITS;
    module.attr("ATTENTION_FEW_PARTS") = ATTENTION_FEW_PARTS;
    module.attr("ATTENTION_MANY_ROWS") = ATTENTION_MANY_ROWS;
    module.attr("ATTENTION_MANY_SPLIT_TILES") = ATTENTION_MANY_SPLIT_TILES;
    module.attr("ATTENTION_MANY_MAX_SPLITS") = ATTENTION_MANY_MAX_SPLITS;
    {
        using S = AttentionArguments;
        def_launcher(module, "chunked_attention", &chunked_attention, FIELD(q), FIELD(k_cache), FIELD(v_cache), FIELD(kv_dtype), FIELD(out),
                     FIELD(tokens), FIELD(num_heads), FIELD(num_kv_heads), FIELD(head_dim), FIELD(slots), FIELD(page_size),
                     FIELD(holds_slots), FIELD(page_table), FIELD(page_table_stride), FIELD(requests), FIELD(page_table_rows),
                     FIELD(slot_map), FIELD(seq_lens), FIELD(query_start_loc), FIELD(chunk_size), FIELD(scale), FIELD(k_scale),
                     FIELD(v_scale), FIELD(few_partial), FIELD(few_lse), FIELD(few_tickets), FIELD(few_max_splits), FIELD(many_partial),
                     FIELD(many_lse), FIELD(many_tickets), FIELD(many_max_splits), FIELD(drawn));
    }

    module.attr("ROUTE_MAX_EXPERTS") = ROUTE_MAX_EXPERTS;
    module.attr("ROUTE_MAX_HIDDEN") = ROUTE_MAX_HIDDEN;
    module.attr("ROUTE_FEW_TOKENS") = ROUTE_FEW_TOKENS;
    module.def("route_slices", &route_slices, py::arg("experts"));
    {
        using S = RouteArguments;
        def_launcher(module, "route_top1", &route_top1, FIELD(x), FIELD(x_dtype), FIELD(router), FIELD(router_dtype), FIELD(tokens),
                     FIELD(hidden), FIELD(experts), FIELD(expert_ids), FIELD(scores), FIELD(order), FIELD(offsets), FIELD(codes),
                     FIELD(scale), FIELD(best), FIELD(tickets), FIELD(dependent));
    }

    py::enum_<MoeConversion>(module, "MoeConversion", py::module_local())
        .value("none", MoeConversion::none)
        .value("fixed", MoeConversion::fixed)
        .value("per_block", MoeConversion::per_block);
    {
        using S = MoeOperand;
        def_struct<S>(module, "MoeOperand", FIELD(values), FIELD(scale), FIELD(scale_row_stride), FIELD(scale_step_stride), FIELD(factors),
                      FIELD(conversion));
    }
    {
        using S = MoeWeight;
        def_struct<S>(module, "MoeWeight", FIELD(values), FIELD(dtype), FIELD(scale), FIELD(scale_dimensions));
    }
    {
        using S = MoeSharing;
        def_struct<S>(module, "MoeSharing", FIELD(blocks), FIELD(parts), FIELD(tickets));
    }
    {
        using S = MoeRouting;
        def_struct<S>(module, "MoeRouting", FIELD(order), FIELD(offsets));
    }
    {
        using S = MoeHidden;
        def_struct<S>(module, "MoeHidden", FIELD(values), FIELD(dtype), FIELD(scale), FIELD(is_static), FIELD(width));
    }
    module.attr("MAX_MOE_EXPERTS") = MAX_MOE_EXPERTS;
    module.attr("MOE_GATE_UP_COLUMNS") = MOE_GATE_UP_COLUMNS;
    module.attr("MOE_MIN_RUN") = MOE_MIN_RUN;
    module.attr("MOE_MANY_ROUNDS") = MOE_MANY_ROUNDS;
    module.def("moe_multiprocessors", &moe_multiprocessors);
    module.def("moe_tile_tokens", &moe_tile_tokens, py::arg("tokens"));
    module.def("moe_gate_up_part", &moe_gate_up_part, py::arg("tokens"));
    module.def("moe_down_part", &moe_down_part, py::arg("tokens"));
    module.def("moe_down_columns", &moe_down_columns, py::arg("tokens"));
    {
        using S = MoeGateUpArguments;
        def_launcher(module, "moe_gate_up", &moe_gate_up, FIELD(x_shared), FIELD(x_routed), FIELD(w_shared), FIELD(w_routed),
                     FIELD(h_shared), FIELD(h_routed), FIELD(routing), FIELD(tokens), FIELD(hidden), FIELD(experts), FIELD(sharing),
                     FIELD(prefetch_w_shared), FIELD(prefetch_address), FIELD(prefetch_bytes), FIELD(dependent));
    }
    {
        using S = MoeDownArguments;
        def_launcher(module, "moe_down", &moe_down, FIELD(h_shared), FIELD(h_routed), FIELD(w_shared), FIELD(w_routed), FIELD(k_shared),
                     FIELD(k_routed), FIELD(routing), FIELD(tokens), FIELD(hidden), FIELD(experts), FIELD(out), FIELD(sharing),
                     FIELD(dependent));
    }

#ifdef LLAMA4_KERNELS_EMULATION
    module.def("moe_run_begins", &moe_run_begins, "The first stage of each block's run, and the end of the last.", py::arg("stages"),
               py::arg("grid"));
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
               "From now on wgmma's sums of e4m3 products keep so many bits of the mantissa; 0: all of fp32's, as without this.",
               py::arg("bits"));
    module.def("run_together", [](unsigned clusters) { emulation::clusters_together = clusters; },
               "From now on so many clusters of a grid, or blocks where it has none, take turns; 1 without this.", py::arg("clusters"));
#endif
}
