// What launch sequences share: host code that plans launches and stops at the first one that fails.
#pragma once

#include <cstdint>

// Returns the text about what went wrong in CALL, if anything did.
#define FUSED_OPS_TRY(CALL)           \
    if (const char* error = (CALL)) { \
        return error;                 \
    }

namespace fused_ops {

// Of the tiles, pixels and parts that kernels count in 32 bits.
constexpr int64_t LARGEST_COUNT = 0x7fffffff;

inline uint32_t ceil_divide(int64_t a, int64_t b) {
    return static_cast<uint32_t>((a + b - 1) / b);
}

}  // namespace fused_ops
