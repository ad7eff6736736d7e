// Probes of every layout that csrc/hopper/layout.cuh assumes: each kernel lets one unit of the hardware, or of the emulation, move or
// multiply known numbers, and gives back the raw bytes. layouts.py knows what they should be.

#include <cstring>
#include <utility>

#include <cuda_bf16.h>

#include "device.h"
#include "hopper/cluster.cuh"
#include "hopper/matrix.cuh"
#include "hopper/cp_async.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace {

using namespace llama4_kernels;
using namespace llama4_kernels::hopper;

constexpr int SHARED_BYTES = 128 << 10;
constexpr int BARRIER_AT = SHARED_BYTES - 64;

__device__ inline void copy_to_shared(uint8_t* to, const uint8_t* from, int bytes) {
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
}

__global__ void load_box(const __grid_constant__ TensorMap map, int x, int y, int box_bytes, uint8_t* out) {
    uint8_t* shared = shared_memory<uint8_t>();
    Barrier& barrier = *reinterpret_cast<Barrier*>(shared + BARRIER_AT);
    if (threadIdx.x == 0) {
        barrier.init(1);
        fence_barrier_init();
        barrier.arrive_expect(box_bytes);
        tma_load(shared, map, barrier, x, y);
    }
    __syncthreads();
    barrier.wait(0);
    for (int i = threadIdx.x; i < box_bytes; i += blockDim.x) out[i] = shared[i];
}

// Each of two blocks loads one of two boxes, one below the other, for both.
__global__ void multicast_boxes(const __grid_constant__ TensorMap map, int x, int y, int box_rows, int box_bytes, uint8_t* out) {
    uint8_t* shared = shared_memory<uint8_t>();
    Barrier& barrier = *reinterpret_cast<Barrier*>(shared + BARRIER_AT);
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        barrier.init(1);
        fence_barrier_init();
        barrier.arrive_expect(2 * box_bytes);
    }
    cluster_sync();
    if (threadIdx.x == 0) tma_load_multicast(shared + rank * box_bytes, map, barrier, 0b11, x, y + rank * box_rows);
    __syncwarp();
    barrier.wait(0);
    for (int i = threadIdx.x; i < 2 * box_bytes; i += blockDim.x) out[rank * 2 * box_bytes + i] = shared[i];
    cluster_sync();
}

__global__ void store_box(const __grid_constant__ TensorMap map, int x, int y, int box_bytes, const uint8_t* in) {
    uint8_t* shared = shared_memory<uint8_t>();
    copy_to_shared(shared, in, box_bytes);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store(map, shared, x, y);
        bulk_commit();
        bulk_wait<0>();
    }
}

// Image of one operand in shared memory, and how its descriptor walks it.
struct Operand {
    const uint8_t* image;
    int bytes;
    int leading, stride;  // 0: as k_major and mn_major have them
    int step;             // bytes from one K step to the next
};

struct Product {
    Operand a, b;
    const uint32_t* a_registers;  // [128, steps, 4], or null
    int swizzle, steps;
    float* out;  // [128, N / 2]
};

__device__ inline uint64_t descriptor(const uint8_t* tile, const Operand& operand, Swizzle swizzle, bool mn) {
    if (operand.stride) return matrix_descriptor(shared_address(tile), swizzle, operand.leading, operand.stride);
    return mn ? mn_major(tile, swizzle, operand.leading) : k_major(tile, swizzle);
}

template <int N, bool FP8, Major A, Major B>
__global__ void __launch_bounds__(128) multiply(const Product p) {
    uint8_t* a = shared_memory<uint8_t>();
    uint8_t* b = a + SHARED_BYTES / 4;
    copy_to_shared(a, p.a.image, p.a.bytes);
    copy_to_shared(b, p.b.image, p.b.bytes);
    fence_async_proxy();
    __syncthreads();
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = 0.0f;
    for (int step = 0; step < p.steps; ++step) {
        const uint64_t a_tile = descriptor(a + step * p.a.step, p.a, Swizzle(p.swizzle), A == Major::mn);
        const uint64_t b_tile = descriptor(b + step * p.b.step, p.b, Swizzle(p.swizzle), B == Major::mn);
        uint32_t registers[4] = {};
        if (p.a_registers) {
#pragma unroll
            for (int i = 0; i < 4; ++i) registers[i] = p.a_registers[(threadIdx.x * p.steps + step) * 4 + i];
        }
        wgmma_fence();
        if constexpr (FP8) {
            if (p.a_registers) wgmma_e4m3<N>(sums, registers, b_tile, true);
            else wgmma_e4m3<N>(sums, a_tile, b_tile, true);
        } else {
            if (p.a_registers) wgmma_bf16<N, B>(sums, registers, b_tile, true);
            else wgmma_bf16<N, A, B>(sums, a_tile, b_tile, true);
        }
        wgmma_commit();
        wgmma_wait<0>();
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) p.out[threadIdx.x * (N / 2) + i] = sums[i];
}

template <bool TRANSPOSED>
__global__ void move_matrices(const uint8_t* in, uint32_t* loaded, uint8_t* stored) {
    uint8_t* shared = shared_memory<uint8_t>();
    copy_to_shared(shared, in, 512);
    __syncthreads();
    uint32_t registers[4];
    load_matrices<TRANSPOSED>(registers, shared + threadIdx.x * 16);
    for (int i = 0; i < 4; ++i) loaded[threadIdx.x * 4 + i] = registers[i];
    for (int i = 0; i < 4; ++i) registers[i] = threadIdx.x * 8 + i * 2 + ((threadIdx.x * 8 + i * 2 + 1) << 16);
    store_matrices<TRANSPOSED>(shared + 1024 + threadIdx.x * 16, registers);
    __syncthreads();
    for (int i = threadIdx.x; i < 512; i += blockDim.x) stored[i] = shared[1024 + i];
}

LaunchConfig config(int threads) { return {"layouts", dim3(1), dim3(threads), SHARED_BYTES, nullptr}; }

template <int N>
void launch_multiply(bool fp8, int a, int b, const Product& product) {
    auto kernel = &multiply<N, true, Major::k, Major::k>;
    if (!fp8) {
        kernel = a   ? b ? &multiply<N, false, Major::mn, Major::mn> : &multiply<N, false, Major::mn, Major::k>
                 : b ? &multiply<N, false, Major::k, Major::mn>
                     : &multiply<N, false, Major::k, Major::k>;
    }
    launch(config(128), kernel, product);
}

template <int... N>
void launch_multiply(std::integer_sequence<int, N...>, int n, bool fp8, int a, int b, const Product& product) {
    if (!(... || (n == N && (launch_multiply<N>(fp8, a, b, product), true)))) throw std::invalid_argument("no such N");
}

using Columns = std::integer_sequence<int, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256>;

std::string error;

template <class Function>
const char* report(Function function) {
    error.clear();
    try {
        function();
    } catch (const std::exception& caught) {
        error = caught.what();
    }
    return error.c_str();
}

TensorMap map_of(const void* tensor, int element, int rows, int columns, int box_rows, int box_columns, int swizzle) {
    const auto type = element == 1 ? ElementType::uint8 : element == 2 ? ElementType::bfloat16 : ElementType::float32;
    return make_tensor_map<2>({"tensor",
                               tensor,
                               type,
                               {uint64_t(columns), uint64_t(rows)},
                               {uint64_t(columns) * element},
                               {uint32_t(box_columns), uint32_t(box_rows)},
                               Swizzle(swizzle)});
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

// Each gives "" or an error. Pointers are device addresses.

EXPORT probe_load(const void* tensor, int element, int rows, int columns, int box_rows, int box_columns, int swizzle, int x, int y,
                  void* out) {
    return report([&] {
        const TensorMap map = map_of(tensor, element, rows, columns, box_rows, box_columns, swizzle);
        launch(config(32), &load_box, map, x, y, box_rows * box_columns * element, static_cast<uint8_t*>(out));
    });
}

EXPORT probe_multicast(const void* tensor, int element, int rows, int columns, int box_rows, int box_columns, int swizzle, int x, int y,
                       void* out) {
    return report([&] {
        const TensorMap map = map_of(tensor, element, rows, columns, box_rows, box_columns, swizzle);
        const LaunchConfig two{"layouts", dim3(2), dim3(32), SHARED_BYTES, nullptr, 2};
        launch(two, &multicast_boxes, map, x, y, box_rows, box_rows * box_columns * element, static_cast<uint8_t*>(out));
    });
}

EXPORT probe_store(void* tensor, int element, int rows, int columns, int box_rows, int box_columns, int swizzle, int x, int y,
                   const void* in) {
    return report([&] {
        const TensorMap map = map_of(tensor, element, rows, columns, box_rows, box_columns, swizzle);
        launch(config(32), &store_box, map, x, y, box_rows * box_columns * element, static_cast<const uint8_t*>(in));
    });
}

EXPORT probe_wgmma(int n, int fp8, int a_major, int b_major, int swizzle, int steps, const void* a, int a_bytes, int a_leading,
                   int a_stride, int a_step, const void* b, int b_bytes, int b_leading, int b_stride, int b_step, const void* a_registers,
                   void* out) {
    return report([&] {
        const Operand operand_a{static_cast<const uint8_t*>(a), a_bytes, a_leading, a_stride, a_step};
        const Operand operand_b{static_cast<const uint8_t*>(b), b_bytes, b_leading, b_stride, b_step};
        const Product product{operand_a, operand_b, static_cast<const uint32_t*>(a_registers), swizzle, steps, static_cast<float*>(out)};
        launch_multiply(Columns(), n, fp8, a_major, b_major, product);
    });
}

EXPORT probe_matrices(int transposed, const void* in, void* loaded, void* stored) {
    return report([&] {
        const auto kernel = transposed ? &move_matrices<true> : &move_matrices<false>;
        launch(config(32), kernel, static_cast<const uint8_t*>(in), static_cast<uint32_t*>(loaded), static_cast<uint8_t*>(stored));
    });
}
