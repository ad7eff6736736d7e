#pragma once

namespace llama4_kernels {

enum class Dtype { bfloat16, float32, float8_e4m3fn };

}  // namespace llama4_kernels
