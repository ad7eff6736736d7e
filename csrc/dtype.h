#pragma once

namespace llama4_kernels {

enum class Dtype { bfloat16, float32 };

}  // namespace llama4_kernels
