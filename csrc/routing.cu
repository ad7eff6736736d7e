// route_top1: bfloat16 on the tensor cores, few tokens and many; what these cannot take on the fp32 units. Clusters of 8 blocks share the
// columns of some tokens; one block, in general the last of the grid to finish, sorts all of them.

#include "routing.h"

#include "routing_few.cuh"
#include "routing_fp32.cuh"
#include "routing_wgmma.cuh"

namespace llama4_kernels {
namespace {

using namespace routing;

template <class X, class W>
void launch_types(const RouteArguments& a, cudaStream_t stream) {
    const bool rows_aligned = a.hidden % 4 == 0 && is_aligned(a.x, sizeof(Four<X>)) && is_aligned(a.router, sizeof(Four<W>));
    const bool aligned = rows_aligned && is_aligned(a.codes, sizeof(Four<uint8_t>));
    if (a.tokens <= 1) return aligned ? launch_fp32<X, W, 1, true>(a, stream) : launch_fp32<X, W, 1, false>(a, stream);
    aligned ? launch_fp32<X, W, 8, true>(a, stream) : launch_fp32<X, W, 8, false>(a, stream);
}

template <class X>
void launch_x(const RouteArguments& a, cudaStream_t stream) {
    a.router_dtype == Dtype::bfloat16 ? launch_types<X, __nv_bfloat16>(a, stream) : launch_types<X, float>(a, stream);
}

void launch_many(const RouteArguments& a, cudaStream_t stream) {
    if (a.experts <= 16) return launch_wgmma<TileShape<16>>(a, stream);
    a.experts <= 128 ? launch_wgmma<TileShape<128>>(a, stream) : launch_wgmma<TileShape<256>>(a, stream);
}

}  // namespace

int route_slices(int experts) { return int(ceil_div(experts, SLICE_EXPERTS)); }

void route_top1(const RouteArguments& a, cudaStream_t stream) {
    if (takes_few(a)) return a.experts <= 16 ? launch_few<FewShape<16>>(a, stream) : launch_few<FewShape<32>>(a, stream);
    if (takes_wgmma(a)) return launch_many(a, stream);
    a.x_dtype == Dtype::bfloat16 ? launch_x<__nv_bfloat16>(a, stream) : launch_x<float>(a, stream);
}

}  // namespace llama4_kernels
