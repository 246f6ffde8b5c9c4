// Arguments of the depthwise operator's launch sequences: plain structs, 64-bit strides counted in elements,
// no torch type.
#pragma once

#include <cstdint>

#include "../common/options.h"

namespace fused_ops {

enum class NormPlacement : int32_t { none = 0, pre = 1, post = 2 };

// Where the residual is added: before the activation, or after it.
enum class ResidualMode : int32_t { none = 0, before = 1, after = 2 };

// Strides of a feature map in which channels are neighbours in memory (c is 1), or columns are (w is 1); a
// dimension of one element has stride 0.
struct MapStrides {
    int64_t n, c, h, w;
};

// A feature map; data is null where there is none.
struct Map {
    void* data;
    MapStrides strides;
};

// One value per channel; data is null where the model has none.
struct ChannelValues {
    void* data;
    ScalarType type;
    int64_t stride;
};

struct DepthwiseWeight {
    void* data;
    ScalarType type;
    int64_t c_stride, h_stride, w_stride;
};

// The launcher's choices; 0 leaves each to it.
struct DepthwiseTile {
    int32_t vector;   // neighbouring channels per thread, or columns of planes, at most
    int32_t columns;  // neighbouring columns per thread, of the output or its gradient; not of planes
    int32_t rows;     // rows per strip or tile of a plane, of the same maps
};

// Which part of a sequence runs. Statistics of several processes are exchanged between the two.
enum DepthwiseStages : int32_t { STATISTICS_STAGE = 1, RESULT_STAGE = 2 };

// What both directions have in common: out = epilogue(conv(norm(x))), the definition of
// fused_ops/depthwise/reference.py, for dilation 1.
struct DepthwiseProblem {
    int64_t batch, height, width, channels;
    int64_t out_height, out_width;
    int32_t kernel, stride;  // 3, 5 or 7; 1 or 2
    int64_t pad_h, pad_w;
    ScalarType type;  // of every map
    bool planes;      // in every map columns are neighbours (NCHW), else channels (channels_last)

    NormPlacement norm;
    bool batch_stats;
    float eps;
    Activation activation;
    ResidualMode residual_mode;
    bool identity;  // the residual is x; `residual` is null then

    Map x;
    Map residual;
    DepthwiseWeight weight;
    ChannelValues bias, norm_weight, norm_bias;
    // With batch_stats float32: written by the forward's statistics stage, and read by everything after it.
    ChannelValues mean, var;

    DepthwiseTile tile;
    int32_t stages;
    float* workspace;
};

struct DepthwiseForwardParams {
    DepthwiseProblem problem;
    Map out;
    // The convolution's own output, written where not null. With batch statistics after it, the convolution
    // runs twice where it is null.
    Map raw;
    float* unbiased_var;  // (channels), with batch_stats
};

// Gradients with null data are not computed.
struct DepthwiseBackwardParams {
    DepthwiseProblem problem;
    Map grad;
    Map raw;  // null where neither the norm nor the activation needs it
    Map x_grad;
    Map residual_grad;
    DepthwiseWeight weight_grad;
    ChannelValues bias_grad, norm_weight_grad, norm_bias_grad;
    // (2, channels): sum of the gradient after the norm, and of its product with the normalised value. Null:
    // kept in the workspace, which is enough where both stages run in one call.
    float* sums;
};

// Each returns null, or one sentence about what is wrong. The workspace is counted in floats and is 4-byte
// aligned; its content need not survive between calls. Nothing is launched for an empty batch.
const char* depthwise_forward_workspace(const DepthwiseForwardParams& params, int64_t& floats);
const char* launch_depthwise_forward(const DepthwiseForwardParams& params, void* stream);
const char* depthwise_backward_workspace(const DepthwiseBackwardParams& params, int64_t& floats);
const char* launch_depthwise_backward(const DepthwiseBackwardParams& params, void* stream);

}  // namespace fused_ops
