// float16 and bfloat16 as storage: 16 bits, converted from and to float. Kernels do their arithmetic in
// float.
//
// The CUDA headers for these types are not used: they need a further header package (cccl) that a compiler
// installed by pip can lack, and g++ could not compile them where no CUDA headers are installed.
#pragma once

#include <cstdint>
#include <cstring>

#include "options.h"
#include "portability.h"

namespace fused_ops {

struct float16 {
    uint16_t bits;
};

struct bfloat16 {
    uint16_t bits;
};

#if defined(__CUDA_ARCH__)

FUSED_OPS_DEVICE float to_float(float16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

FUSED_OPS_DEVICE float to_float(bfloat16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

template <typename T>
FUSED_OPS_DEVICE T from_float(float value);

template <>
FUSED_OPS_DEVICE float16 from_float<float16>(float value) {
    float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <>
FUSED_OPS_DEVICE bfloat16 from_float<bfloat16>(float value) {
    bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

#else

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(bfloat16 value) {
    return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t exponent = (value.bits >> 10) & 0x1fu;
    const uint32_t mantissa = value.bits & 0x3ffu;
    if (exponent == 0) {
        // Zero or subnormal: an integer multiple of 2^-24, exact in float.
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign != 0 ? -magnitude : magnitude;
    }
    if (exponent == 31) {
        return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    }
    return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <typename T>
T from_float(float value);

// Round to nearest, ties to even, as the GPU's conversion does.
template <>
inline bfloat16 from_float<bfloat16>(float value) {
    const uint32_t bits = float_bits(value);
    if (value != value) {
        return {0x7fff};
    }
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline float16 from_float<float16>(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {0x7fff};
    }
    if (magnitude >= 0x477ff000u) {
        return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {
        // Below the smallest normal: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded by the
        // addition.
        const uint32_t rounded = float_bits(bits_to_float(magnitude) + 0.5f) - float_bits(0.5f);
        return {static_cast<uint16_t>(sign | rounded)};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

#endif

FUSED_OPS_HOST_DEVICE float to_float(float value) {
    return value;
}

template <>
FUSED_OPS_HOST_DEVICE float from_float<float>(float value) {
    return value;
}

}  // namespace fused_ops
