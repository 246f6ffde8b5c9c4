// Choices that cross the line between kernels and their callers. Plain C++: no CUDA, no torch.
// fused_ops/core/native.py has the same numbers; a test compares the two.
#pragma once

#include <cstdint>

namespace fused_ops {

enum class ScalarType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

enum class Activation : int32_t {
    none = 0,
    relu = 1,
    relu6 = 2,
    silu = 3,
    gelu = 4,
    gelu_tanh = 5,
    hardswish = 6
};

}  // namespace fused_ops
