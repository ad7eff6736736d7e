// How stages of a tile of the MoE layer are filled: weights by TMA; rows of activations gathered by cp.async, or made into codes on the
// way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "e4m3.cuh"
#include "floats.cuh"
#include "hopper/cp_async.cuh"
#include "moe_tile.cuh"

namespace llama4_kernels {

// The loader warpgroup's end of the ring.
template <class Shape>
class StageLoader {
public:
    __device__ explicit StageLoader(MoeStages<Shape>& stages) : stages_(stages) {}

    // Ask for weights of the ring's first stages, before load() is called, which then goes on from there. begin and end: as of the first
    // load().
    __device__ void load_weights_ahead(const MoePath& path, const hopper::TensorMap& weights, const Segment& segment, int begin, int end) {
        if (thread() != 0) return;
        for (int step = begin; step < end && ahead_ < Shape::STAGES; ++step, ++ahead_) load_weights(path, weights, segment, step, ahead_);
    }

    // rows: source row of each position, or null where it is the position.
    __device__ void load(const MoePath& path, const hopper::TensorMap& weights, const Segment& segment, const int* rows, int begin,
                         int end) {
        int source[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; ++i) source[i] = source_row(segment, rows, row_of(i));
        const int scaled_row = thread() < Shape::TOKENS ? source_row(segment, rows, thread()) : -1;
        const float factor = path.x.factors && scaled_row >= 0 ? path.x.factors[scaled_row] : 1.0f;
        float scale = scale_of(path, scaled_row, begin);
        prefetch_channel_scales(path, segment);

        for (int step = begin; step < end; ++step, at_.advance()) {
            stages_.pipeline.wait_until_empty(at_);
            if (thread() == 0) {
                if (ahead_ > 0) {
                    --ahead_;
                } else {
                    load_weights(path, weights, segment, step, at_.stage);
                }
            }
            if (path.x.conversion == MoeConversion::none) {
                copy_rows(path, source, step);
                if (thread() < Shape::TOKENS) stages_.token_scales[at_.stage][thread()] = scale * factor;
                if (step + 1 < end) scale = scale_of(path, scaled_row, step + 1);  // under way until the next stage is empty
            } else {
                convert_rows(path, segment, rows, step);
            }
            arrive();
        }
    }

private:
    static constexpr int CHUNKS = Shape::ROW_BYTES / 16;
    static constexpr int ROWS_AT_ONCE = Shape::LOADERS / CHUNKS;
    static constexpr int SHARE = Shape::TOKENS / ROWS_AT_ONCE;

    static __device__ int thread() { return int(threadIdx.x) % Shape::LOADERS; }
    static __device__ int row_of(int i) { return thread() / CHUNKS + i * ROWS_AT_ONCE; }

    // -1 for a row of the tile that is not the segment's.
    static __device__ int source_row(const Segment& segment, const int* rows, int row) {
        const int position = segment.tile_row + row;
        if (position < segment.first_row || position >= segment.end_row) return -1;
        return rows ? rows[position] : position;
    }

    // What the codes of a row, or of -1, are scaled by in a step, where they are not made here.
    static __device__ float scale_of(const MoePath& path, int row, int step) {
        if (!path.x.scale || row < 0 || path.x.conversion != MoeConversion::none) return 1.0f;
        return path.x.scale[int64_t(row) * path.x.scale_row_stride + step * path.x.scale_step_stride];
    }

    // The consumers wait for them at the segment's first step, which is stages away.
    __device__ void prefetch_channel_scales(const MoePath& path, const Segment& segment) {
        constexpr int LINE = 32, LINES = Shape::SET_CHANNELS / LINE;
        if (path.form != ScaleForm::per_row || thread() >= Shape::SETS * LINES) return;
        const int channel = segment.first_channel + thread() / LINES * segment.set_stride + thread() % LINES * LINE;
        hopper::prefetch_l2(path.w.scale + int64_t(segment.group) * path.n + min(channel, path.n - 1));
    }

    __device__ void load_weights(const MoePath& path, const hopper::TensorMap& weights, const Segment& segment, int step, int stage) {
        hopper::Barrier& full = stages_.pipeline.full[stage];
        full.arrive_expect(Shape::SETS * Shape::SET_BYTES);
#pragma unroll
        for (int set = 0; set < Shape::SETS; ++set) {
            const int channel = segment.first_channel + set * segment.set_stride;
            hopper::tma_load(stages_.weights[stage][set], weights, full, step * path.stage_k(), channel, segment.group);
        }
    }

    __device__ uint8_t* chunk_at(int i) const {
        return stages_.tokens[at_.stage] + hopper::swizzled(Shape::SWIZZLE, row_of(i) * Shape::ROW_BYTES + thread() % CHUNKS * 16);
    }

    __device__ void copy_rows(const MoePath& path, const int (&source)[SHARE], int step) {
        const int64_t row_bytes = int64_t(path.k) * (path.fp8 ? 1 : 2), byte = int64_t(step) * Shape::ROW_BYTES + thread() % CHUNKS * 16;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const bool valid = source[i] >= 0 && byte < row_bytes;
            const auto* from = static_cast<const uint8_t*>(path.x.values) + source[i] * row_bytes + byte;
            hopper::cp_async_16(chunk_at(i), valid ? from : nullptr, valid);
        }
    }

    // bf16 rows become e4m3 codes on the way in: with the static scale, of factor · x, or with one scale per row and 128 columns.
    __device__ void convert_rows(const MoePath& path, const Segment& segment, const int* rows, int step) {
        const int column = step * 128 + thread() % CHUNKS * 16;
#pragma unroll 1
        for (int i = 0; i < SHARE; ++i) {
            const int source = source_row(segment, rows, row_of(i));
            const bool valid = source >= 0 && column < path.k;
            float values[16] = {};
            if (valid) {
                const auto* from = static_cast<const __nv_bfloat16*>(path.x.values) + int64_t(source) * path.k + column;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 words = reinterpret_cast<const uint4*>(from)[half];
                    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        values[half * 8 + j * 2] = __uint_as_float(pairs[j] << 16);
                        values[half * 8 + j * 2 + 1] = __uint_as_float(pairs[j] & 0xffff0000u);
                    }
                }
            }
            const float factor = path.x.factors && source >= 0 ? path.x.factors[source] : 1.0f;
            float scale, token_scale;
            if (path.x.conversion == MoeConversion::fixed) {
                scale = token_scale = *path.x.scale;
#pragma unroll
                for (float& value : values) value *= factor;
            } else {
                unsigned largest = 0;
#pragma unroll
                for (float value : values) largest = max(largest, magnitude(value));
                for (int lanes = 1; lanes < CHUNKS; lanes *= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
                scale = __uint_as_float(largest) / E4M3_MAX;
                token_scale = scale * factor;
            }
            uint32_t codes[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                codes[j] = 0;
#pragma unroll
                for (int byte = 0; byte < 4; ++byte) {
                    codes[j] |= uint32_t(from_float<__nv_fp8_storage_t>(divide(values[j * 4 + byte], scale))) << byte * 8;
                }
            }
            *reinterpret_cast<uint4*>(chunk_at(i)) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
            if (thread() % CHUNKS == 0) stages_.token_scales[at_.stage][row_of(i)] = token_scale;
        }
    }

    // Copies arrive by themselves once they have landed, and the loaders go on, or end: the consumers wait for every stage. That says
    // nothing of plain stores, of scales and of codes: who stores them arrives once more.
    __device__ void arrive() {
        hopper::Barrier& full = stages_.pipeline.full[at_.stage];
        __syncwarp();  // so that a warp's lanes arrive at once, not one after the other
        hopper::cp_async_arrive(full);
        full.arrive();
    }

    MoeStages<Shape>& stages_;
    PipelinePosition<Shape::STAGES> at_;
    int ahead_ = 0;  // stages whose weights are asked for already; of the thread that asks
};

}  // namespace llama4_kernels
