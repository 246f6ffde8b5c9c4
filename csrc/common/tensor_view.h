// Tensors as callers have them, and the checks of sizes and layouts that every operator makes. The same for
// the torch library and the emulator's Python module; no torch type.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "options.h"

namespace fused_ops {

// A tensor's address, sizes and strides; data is null where there is none.
struct TensorView {
    void* data = nullptr;
    ScalarType type = ScalarType::float32;
    int dimensions = 0;
    int64_t sizes[4] = {};
    int64_t strides[4] = {};

    bool given() const { return dimensions != 0; }
};

inline void require(bool condition, const char* name, const std::string& what) {
    if (!condition) {
        throw std::invalid_argument(std::string(name) + " " + what);
    }
}

inline float* floats_of(const TensorView& view, int64_t count, const char* name) {
    if (!view.given()) {
        return nullptr;
    }
    int64_t elements = 1;
    for (int i = view.dimensions - 1; i >= 0; --i) {
        require(view.strides[i] == elements || view.sizes[i] == 1, name, "must be contiguous");
        elements *= view.sizes[i];
    }
    require(view.type == ScalarType::float32 && elements == count, name,
            "must be float32 with " + std::to_string(count) + " elements");
    return static_cast<float*>(view.data);
}

template <typename Enumeration>
Enumeration enumeration(int64_t value, Enumeration last, const char* name) {
    require(value >= 0 && value <= static_cast<int64_t>(last), name,
            "has no meaning for " + std::to_string(value));
    return static_cast<Enumeration>(value);
}

}  // namespace fused_ops
