// Arguments of the HR chain's launch sequences: plain structs, 64-bit strides counted in elements, no torch
// type.
#pragma once

#include <cstdint>

#include "../depthwise/params.h"

namespace fused_ops {

// A fully connected layer's weight in the element type of the maps, rows side by side; null data for none.
struct LayerWeight {
    void* data;
    ScalarType type;
};

// What both directions have in common: the definition of fused_ops/hr_chain/reference.py, for channels_last
// maps.
struct HRChainProblem {
    int64_t batch, height, width, channels, hidden;
    int64_t low_height, low_width;
    ScalarType type;  // of every map: float16 or bfloat16
    bool batch_stats;
    float eps;
    Activation activation;
    bool identity;

    Map x;
    DepthwiseWeight high_weight, low_weight;
    ChannelValues high_bias, fc1_bias, fc2_bias, norm_weight, norm_bias;
    // With batch_stats float32: written by the forward's statistics stage, and read by everything after it.
    ChannelValues mean, var;
    ChannelValues drop_path;  // one factor per image
    LayerWeight fc1, fc2;     // (hidden, channels) and (channels, hidden)

    int32_t stages;  // DepthwiseStages
    float* workspace;
};

struct HRChainForwardParams {
    HRChainProblem problem;
    Map out;
    Map low;              // the strided convolution's output, written where not null
    float* unbiased_var;  // (channels), with batch_stats
};

// Gradients with null data are not computed.
struct HRChainBackwardParams {
    HRChainProblem problem;
    Map grad, low;
    // Gradient of the norm's output, memory of the caller: dense, needed where anything before the norm is.
    Map low_grad;
    Map x_grad;
    DepthwiseWeight high_weight_grad, low_weight_grad;
    LayerWeight fc1_weight_grad, fc2_weight_grad;
    ChannelValues high_bias_grad, fc1_bias_grad, fc2_bias_grad, norm_weight_grad, norm_bias_grad;
    // (2, channels): sum of the gradient of the norm's output, and of its product with the normalised value.
    // Null: kept in the workspace, which is enough where both stages run in one call.
    float* sums;
};

// As the depthwise operator's.
const char* hr_chain_forward_workspace(const HRChainForwardParams& params, int64_t& floats);
const char* launch_hr_chain_forward(const HRChainForwardParams& params, void* stream);
const char* hr_chain_backward_workspace(const HRChainBackwardParams& params, int64_t& floats);
const char* launch_hr_chain_backward(const HRChainBackwardParams& params, void* stream);

}  // namespace fused_ops
