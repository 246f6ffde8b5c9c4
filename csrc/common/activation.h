// Activations in float, with the same results as torch's for infinities and NaN.
#pragma once

#include <cmath>

#include "options.h"
#include "portability.h"

namespace fused_ops {

FUSED_OPS_DEVICE float sigmoid(float value) {
#if defined(__CUDA_ARCH__)
    // Within 2 units in the last place; the exact division is a subroutine.
    return __fdividef(1.0f, 1.0f + expf(-value));
#else
    return 1.0f / (1.0f + expf(-value));
#endif
}

template <Activation ACTIVATION>
FUSED_OPS_DEVICE float activate(float value) {
    if constexpr (ACTIVATION == Activation::relu) {
        // A comparison and not fmaxf: fmaxf would turn NaN into 0.
        return value < 0.0f ? 0.0f : value;
    } else if constexpr (ACTIVATION == Activation::relu6) {
        return value < 0.0f ? 0.0f : (value > 6.0f ? 6.0f : value);
    } else if constexpr (ACTIVATION == Activation::silu) {
        return value * sigmoid(value);
    } else if constexpr (ACTIVATION == Activation::gelu) {
        return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
    } else if constexpr (ACTIVATION == Activation::gelu_tanh) {
        // (1 + tanh(u)) / 2 is sigmoid(2u).
        return value * sigmoid(1.5957691216057308f * (value + 0.044715f * value * value * value));
    } else if constexpr (ACTIVATION == Activation::hardswish) {
        return value * fminf(fmaxf(value + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    } else {
        return value;
    }
}

template <Activation ACTIVATION, int COUNT>
FUSED_OPS_DEVICE void activate_each(float (&values)[COUNT]) {
    FUSED_OPS_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        values[i] = activate<ACTIVATION>(values[i]);
    }
}

// Applies one activation to COUNT values. The choice is made once per call, outside the loop over the values,
// so a kernel needs no instance per activation.
template <int COUNT>
FUSED_OPS_DEVICE void activate_all(float (&values)[COUNT], Activation activation) {
#define FUSED_OPS_ACTIVATE(NAME)                 \
    case Activation::NAME:                       \
        activate_each<Activation::NAME>(values); \
        break;
    switch (activation) {
        FUSED_OPS_ACTIVATE(relu)
        FUSED_OPS_ACTIVATE(relu6)
        FUSED_OPS_ACTIVATE(silu)
        FUSED_OPS_ACTIVATE(gelu)
        FUSED_OPS_ACTIVATE(gelu_tanh)
        FUSED_OPS_ACTIVATE(hardswish)
        case Activation::none:
            break;
    }
#undef FUSED_OPS_ACTIVATE
}

// What the gradient of activate(value) by value makes of the gradient `grad`.
template <Activation ACTIVATION>
FUSED_OPS_DEVICE float activation_gradient(float grad, float value) {
    if constexpr (ACTIVATION == Activation::relu) {
        return value <= 0.0f ? 0.0f : grad;
    } else if constexpr (ACTIVATION == Activation::relu6) {
        return value <= 0.0f || value >= 6.0f ? 0.0f : grad;
    } else if constexpr (ACTIVATION == Activation::silu) {
        const float s = sigmoid(value);
        return grad * (s * (1.0f + value * (1.0f - s)));
    } else if constexpr (ACTIVATION == Activation::gelu) {
        const float distribution = 0.5f * (1.0f + erff(value * 0.70710678118654752f));
        return grad * (distribution + value * 0.3989422804014327f * expf(-0.5f * value * value));
    } else if constexpr (ACTIVATION == Activation::gelu_tanh) {
        const float s = sigmoid(1.5957691216057308f * (value + 0.044715f * value * value * value));
        return grad * (s + value * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * value * value));
    } else if constexpr (ACTIVATION == Activation::hardswish) {
        const float slope = (2.0f * value + 3.0f) * (1.0f / 6.0f);
        return value > 3.0f ? grad : (value < -3.0f ? 0.0f : grad * slope);
    } else {
        return grad;
    }
}

template <Activation ACTIVATION, int COUNT>
FUSED_OPS_DEVICE void multiply_gradient_each(float (&grads)[COUNT], const float (&values)[COUNT]) {
    FUSED_OPS_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        grads[i] = activation_gradient<ACTIVATION>(grads[i], values[i]);
    }
}

// Turns COUNT gradients after the activation into those before it. `values` are the activation's inputs.
template <int COUNT>
FUSED_OPS_DEVICE void multiply_activation_gradient(float (&grads)[COUNT], const float (&values)[COUNT],
                                                   Activation activation) {
#define FUSED_OPS_MULTIPLY(NAME)                                 \
    case Activation::NAME:                                       \
        multiply_gradient_each<Activation::NAME>(grads, values); \
        break;
    switch (activation) {
        FUSED_OPS_MULTIPLY(relu)
        FUSED_OPS_MULTIPLY(relu6)
        FUSED_OPS_MULTIPLY(silu)
        FUSED_OPS_MULTIPLY(gelu)
        FUSED_OPS_MULTIPLY(gelu_tanh)
        FUSED_OPS_MULTIPLY(hardswish)
        case Activation::none:
            break;
    }
#undef FUSED_OPS_MULTIPLY
}

}  // namespace fused_ops
