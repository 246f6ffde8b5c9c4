// From tensors as callers have them to the parameters of the HR chain's launch sequences, with the checks of
// sizes and layouts. The same for the torch library and the emulator's Python module; no torch type.
#pragma once

#include <cstdint>

#include "../depthwise/arguments.h"
#include "params.h"

namespace fused_ops::hr_chain {

// What both directions are told, in the order of the operators' schemas.
struct InputTensors {
    TensorView x, high_weight, high_bias, low_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight,
        norm_bias, mean, var, drop_path;
};

struct Options {
    bool batch_stats;
    double eps;
    int64_t activation;
    bool identity;
    int64_t stages;
};

struct GradientTensors {
    TensorView x, high_weight, high_bias, low_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight,
        norm_bias;
};

inline LayerWeight layer_of(const TensorView& view, int64_t rows, int64_t columns, const char* name) {
    if (!view.given()) {
        return {};
    }
    require(view.dimensions == 2 && view.sizes[0] == rows && view.sizes[1] == columns, name,
            "must be (" + std::to_string(rows) + ", " + std::to_string(columns) + ")");
    require((view.strides[1] == 1 || columns == 1) && (view.strides[0] == columns || rows == 1), name,
            "must be contiguous");
    return {view.data, view.type};
}

inline Map channels_last_map(const TensorView& view, const HRChainProblem& p, int64_t height, int64_t width,
                             const char* name) {
    const Map map = depthwise::map_of(view, p.type, p.batch, p.channels, height, width, name);
    require(!view.given() || p.channels == 1 || map.strides.c == 1, name,
            "must have neighbouring channels (channels_last)");
    return map;
}

inline HRChainProblem problem_of(const InputTensors& t, const Options& options) {
    using depthwise::values_of;
    using depthwise::weight_of;
    HRChainProblem p{};
    require(t.x.dimensions == 4, "x", "must have 4 dimensions");
    require(t.fc1_weight.dimensions == 2, "fc1_weight", "must have 2 dimensions");
    p.type = t.x.type;
    p.batch = t.x.sizes[0];
    p.channels = t.x.sizes[1];
    p.height = t.x.sizes[2];
    p.width = t.x.sizes[3];
    p.hidden = t.fc1_weight.sizes[0];
    p.low_height = (p.height + 1) / 2;
    p.low_width = (p.width + 1) / 2;
    p.batch_stats = options.batch_stats;
    p.eps = static_cast<float>(options.eps);
    p.activation = enumeration(options.activation, Activation::hardswish, "activation");
    p.identity = options.identity;
    p.stages = static_cast<int32_t>(options.stages);
    p.x = channels_last_map(t.x, p, p.height, p.width, "x");
    p.high_weight = weight_of(t.high_weight, p.channels, 3, "high_weight");
    p.low_weight = weight_of(t.low_weight, p.channels, 3, "low_weight");
    p.high_bias = values_of(t.high_bias, p.channels, "high_bias");
    p.fc1 = layer_of(t.fc1_weight, p.hidden, p.channels, "fc1_weight");
    p.fc1_bias = values_of(t.fc1_bias, p.hidden, "fc1_bias");
    p.fc2 = layer_of(t.fc2_weight, p.channels, p.hidden, "fc2_weight");
    p.fc2_bias = values_of(t.fc2_bias, p.channels, "fc2_bias");
    p.norm_weight = values_of(t.norm_weight, p.channels, "norm_weight");
    p.norm_bias = values_of(t.norm_bias, p.channels, "norm_bias");
    p.mean = values_of(t.mean, p.channels, "mean");
    p.var = values_of(t.var, p.channels, "var");
    p.drop_path = values_of(t.drop_path, p.batch, "drop_path");
    return p;
}

// A low-resolution map as its operator makes it: (batch, height, width, channels), dense.
inline Map low_map(const TensorView& view, const HRChainProblem& p, const char* name) {
    if (!view.given()) {
        return {};
    }
    require(view.dimensions == 4, name, "must have 4 dimensions");
    TensorView channels_second = view;
    const int order[] = {0, 3, 1, 2};
    for (int i = 0; i < 4; ++i) {
        channels_second.sizes[i] = view.sizes[order[i]];
        channels_second.strides[i] = view.strides[order[i]];
    }
    return channels_last_map(channels_second, p, p.low_height, p.low_width, name);
}

inline HRChainForwardParams forward_params(const InputTensors& t, const TensorView& out,
                                           const TensorView& low, const TensorView& unbiased_var,
                                           const Options& options) {
    HRChainForwardParams params{};
    params.problem = problem_of(t, options);
    const HRChainProblem& p = params.problem;
    params.out = channels_last_map(out, p, p.height, p.width, "out");
    params.low = low_map(low, p, "low");
    params.unbiased_var = floats_of(unbiased_var, p.channels, "unbiased_var");
    return params;
}

inline HRChainBackwardParams backward_params(const TensorView& grad, const TensorView& low,
                                             const InputTensors& t, const GradientTensors& g,
                                             const TensorView& low_grad, const TensorView& sums,
                                             const Options& options) {
    using depthwise::values_of;
    using depthwise::weight_of;
    HRChainBackwardParams params{};
    params.problem = problem_of(t, options);
    const HRChainProblem& p = params.problem;
    params.grad = channels_last_map(grad, p, p.height, p.width, "grad");
    params.low = low_map(low, p, "low");
    params.low_grad = low_map(low_grad, p, "low_grad");
    params.x_grad = channels_last_map(g.x, p, p.height, p.width, "x_grad");
    params.high_weight_grad = weight_of(g.high_weight, p.channels, 3, "high_weight_grad");
    params.low_weight_grad = weight_of(g.low_weight, p.channels, 3, "low_weight_grad");
    params.fc1_weight_grad = layer_of(g.fc1_weight, p.hidden, p.channels, "fc1_weight_grad");
    params.fc2_weight_grad = layer_of(g.fc2_weight, p.channels, p.hidden, "fc2_weight_grad");
    params.high_bias_grad = values_of(g.high_bias, p.channels, "high_bias_grad");
    params.fc1_bias_grad = values_of(g.fc1_bias, p.hidden, "fc1_bias_grad");
    params.fc2_bias_grad = values_of(g.fc2_bias, p.channels, "fc2_bias_grad");
    params.norm_weight_grad = values_of(g.norm_weight, p.channels, "norm_weight_grad");
    params.norm_bias_grad = values_of(g.norm_bias, p.channels, "norm_bias_grad");
    params.sums = floats_of(sums, 2 * p.channels, "sums");
    return params;
}

}  // namespace fused_ops::hr_chain
