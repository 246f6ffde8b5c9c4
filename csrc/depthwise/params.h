// Arguments of the depthwise kernels: plain structs, 64-bit strides counted in elements, no torch type.
#pragma once

#include <cstdint>

#include "../common/options.h"

namespace fused_ops {

enum class NormPlacement : int32_t { none = 0, pre = 1, post = 2 };

// Where the residual is added: before the activation, or after it.
enum class ResidualMode : int32_t { none = 0, before = 1, after = 2 };

// Strides of a feature map whose channels are neighbours in memory (channel stride 1).
struct MapStrides {
    int64_t n, h, w;
};

// One value per channel; data is null where the model has none.
struct ChannelValues {
    const void* data;
    ScalarType type;
    int64_t stride;
};

struct DepthwiseWeight {
    const void* data;
    ScalarType type;
    int64_t c_stride, h_stride, w_stride;
};

// out = epilogue(depthwise_conv3x3(norm(x))), the definition of fused_ops/depthwise/reference.py for a kernel
// of 3x3, stride 1, dilation 1 and running statistics.
struct DepthwiseForwardParams {
    int64_t batch, height, width, channels;
    int64_t out_height, out_width;
    int64_t pad_h, pad_w;
    ScalarType type;  // of x, residual and out

    const void* x;
    MapStrides x_strides;
    const void* residual;  // null: none, or the input itself (identity)
    MapStrides residual_strides;
    void* out;
    MapStrides out_strides;

    DepthwiseWeight weight;
    ChannelValues bias;
    ChannelValues norm_weight, norm_bias, mean, var;
    float eps;

    NormPlacement norm;
    Activation activation;
    ResidualMode residual_mode;
    bool identity;

    // The launcher's choices; 0 leaves them to it.
    int32_t vector_width;
    int32_t tile_columns;
    int32_t strip_rows;
};

// Both return null, or one sentence about what is wrong. Nothing is launched for an empty batch.
const char* check_depthwise_forward(const DepthwiseForwardParams& params);
const char* launch_depthwise_forward(const DepthwiseForwardParams& params, void* stream);

}  // namespace fused_ops
