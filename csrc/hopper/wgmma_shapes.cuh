// The text of wgmma.mma_async for each number of columns N. Inline assembly numbers its operands, so each N spells out its own: N / 2
// accumulators, then A (one descriptor or four registers), B, whether to accumulate, and which operands are MN-major.
#pragma once

#include "hopper/layout.cuh"

namespace llama4_kernels::hopper {

template <int N>
struct WgmmaShape;

#define WGMMA_LIST_4 "%0, %1, %2, %3"
#define WGMMA_LIST_8 WGMMA_LIST_4 ", %4, %5, %6, %7"
#define WGMMA_LIST_12 WGMMA_LIST_8 ", %8, %9, %10, %11"
#define WGMMA_LIST_16 WGMMA_LIST_12 ", %12, %13, %14, %15"
#define WGMMA_LIST_20 WGMMA_LIST_16 ", %16, %17, %18, %19"
#define WGMMA_LIST_24 WGMMA_LIST_20 ", %20, %21, %22, %23"
#define WGMMA_LIST_28 WGMMA_LIST_24 ", %24, %25, %26, %27"
#define WGMMA_LIST_32 WGMMA_LIST_28 ", %28, %29, %30, %31"
#define WGMMA_LIST_40 WGMMA_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_LIST_48 WGMMA_LIST_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_LIST_56 WGMMA_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_LIST_64 WGMMA_LIST_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_LIST_72 WGMMA_LIST_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_LIST_80 WGMMA_LIST_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_LIST_88 WGMMA_LIST_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_LIST_96 WGMMA_LIST_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_LIST_104 WGMMA_LIST_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_LIST_112 WGMMA_LIST_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_LIST_120 WGMMA_LIST_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_LIST_128 WGMMA_LIST_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_8(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 4)
#define WGMMA_OPERANDS_4(d) WGMMA_4(d, 0)
#define WGMMA_OPERANDS_8(d) WGMMA_OPERANDS_4(d), WGMMA_4(d, 4)
#define WGMMA_OPERANDS_12(d) WGMMA_OPERANDS_8(d), WGMMA_4(d, 8)
#define WGMMA_OPERANDS_16(d) WGMMA_OPERANDS_12(d), WGMMA_4(d, 12)
#define WGMMA_OPERANDS_20(d) WGMMA_OPERANDS_16(d), WGMMA_4(d, 16)
#define WGMMA_OPERANDS_24(d) WGMMA_OPERANDS_20(d), WGMMA_4(d, 20)
#define WGMMA_OPERANDS_28(d) WGMMA_OPERANDS_24(d), WGMMA_4(d, 24)
#define WGMMA_OPERANDS_32(d) WGMMA_OPERANDS_28(d), WGMMA_4(d, 28)
#define WGMMA_OPERANDS_40(d) WGMMA_OPERANDS_32(d), WGMMA_8(d, 32)
#define WGMMA_OPERANDS_48(d) WGMMA_OPERANDS_40(d), WGMMA_8(d, 40)
#define WGMMA_OPERANDS_56(d) WGMMA_OPERANDS_48(d), WGMMA_8(d, 48)
#define WGMMA_OPERANDS_64(d) WGMMA_OPERANDS_56(d), WGMMA_8(d, 56)
#define WGMMA_OPERANDS_72(d) WGMMA_OPERANDS_64(d), WGMMA_8(d, 64)
#define WGMMA_OPERANDS_80(d) WGMMA_OPERANDS_72(d), WGMMA_8(d, 72)
#define WGMMA_OPERANDS_88(d) WGMMA_OPERANDS_80(d), WGMMA_8(d, 80)
#define WGMMA_OPERANDS_96(d) WGMMA_OPERANDS_88(d), WGMMA_8(d, 88)
#define WGMMA_OPERANDS_104(d) WGMMA_OPERANDS_96(d), WGMMA_8(d, 96)
#define WGMMA_OPERANDS_112(d) WGMMA_OPERANDS_104(d), WGMMA_8(d, 104)
#define WGMMA_OPERANDS_120(d) WGMMA_OPERANDS_112(d), WGMMA_8(d, 112)
#define WGMMA_OPERANDS_128(d) WGMMA_OPERANDS_120(d), WGMMA_8(d, 120)

#define WGMMA_TEXT(shape, types, list, a, b, accumulate, rest)               \
    "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #accumulate ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #shape types " {" list "}, " a ", %" #b ", accumulate, 1, 1" rest ";\n}"

// n: N / 2, o1 … o6: n + 1 … n + 6.
#define WGMMA_SHAPE(N, n, o1, o2, o3, o4, o5, o6)                                                                                          \
    template <>                                                                                                                            \
    struct WgmmaShape<N> {                                                                                                                 \
        __device__ static void e4m3(float (&d)[n], uint64_t a, uint64_t b, int accumulate) {                                               \
            asm volatile(WGMMA_TEXT(N, "k32.f32.e4m3.e4m3", WGMMA_LIST_##n, "%" #n, o1, o2, "")                                            \
                         : WGMMA_OPERANDS_##n(d)                                                                                           \
                         : "l"(a), "l"(b), "r"(accumulate));                                                                               \
        }                                                                                                                                  \
        __device__ static void e4m3(float (&d)[n], const uint32_t (&a)[4], uint64_t b, int accumulate) {                                   \
            asm volatile(WGMMA_TEXT(N, "k32.f32.e4m3.e4m3", WGMMA_LIST_##n, "{%" #n ", %" #o1 ", %" #o2 ", %" #o3 "}", o4, o5, "")         \
                         : WGMMA_OPERANDS_##n(d)                                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                           \
        }                                                                                                                                  \
        template <Major A, Major B>                                                                                                        \
        __device__ static void bf16(float (&d)[n], uint64_t a, uint64_t b, int accumulate) {                                               \
            asm volatile(WGMMA_TEXT(N, "k16.f32.bf16.bf16", WGMMA_LIST_##n, "%" #n, o1, o2, ", %" #o3 ", %" #o4)                           \
                         : WGMMA_OPERANDS_##n(d)                                                                                           \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(int(A)), "n"(int(B)));                                                     \
        }                                                                                                                                  \
        template <Major B>                                                                                                                 \
        __device__ static void bf16(float (&d)[n], const uint32_t (&a)[4], uint64_t b, int accumulate) {                                   \
            asm volatile(WGMMA_TEXT(N, "k16.f32.bf16.bf16", WGMMA_LIST_##n, "{%" #n ", %" #o1 ", %" #o2 ", %" #o3 "}", o4, o5, ", %" #o6)  \
                         : WGMMA_OPERANDS_##n(d)                                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(B)));                              \
        }                                                                                                                                  \
    };

WGMMA_SHAPE(8, 4, 5, 6, 7, 8, 9, 10)
WGMMA_SHAPE(16, 8, 9, 10, 11, 12, 13, 14)
WGMMA_SHAPE(24, 12, 13, 14, 15, 16, 17, 18)
WGMMA_SHAPE(32, 16, 17, 18, 19, 20, 21, 22)
WGMMA_SHAPE(40, 20, 21, 22, 23, 24, 25, 26)
WGMMA_SHAPE(48, 24, 25, 26, 27, 28, 29, 30)
WGMMA_SHAPE(56, 28, 29, 30, 31, 32, 33, 34)
WGMMA_SHAPE(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA_SHAPE(80, 40, 41, 42, 43, 44, 45, 46)
WGMMA_SHAPE(96, 48, 49, 50, 51, 52, 53, 54)
WGMMA_SHAPE(112, 56, 57, 58, 59, 60, 61, 62)
WGMMA_SHAPE(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA_SHAPE(144, 72, 73, 74, 75, 76, 77, 78)
WGMMA_SHAPE(160, 80, 81, 82, 83, 84, 85, 86)
WGMMA_SHAPE(176, 88, 89, 90, 91, 92, 93, 94)
WGMMA_SHAPE(192, 96, 97, 98, 99, 100, 101, 102)
WGMMA_SHAPE(208, 104, 105, 106, 107, 108, 109, 110)
WGMMA_SHAPE(224, 112, 113, 114, 115, 116, 117, 118)
WGMMA_SHAPE(240, 120, 121, 122, 123, 124, 125, 126)
WGMMA_SHAPE(256, 128, 129, 130, 131, 132, 133, 134)

}  // namespace llama4_kernels::hopper
