// From tensors as callers have them to the parameters of the launch sequences, with the checks of sizes and
// layouts. The same for the torch library and the emulator's Python module; no torch type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "../common/tensor_view.h"
#include "params.h"

namespace fused_ops::depthwise {

// What both directions are told beside tensors, in the order of the operators' schemas.
struct Options {
    int64_t stride, pad_h, pad_w, norm;
    bool batch_stats;
    double eps;
    int64_t activation, residual_mode;
    bool identity;
    int64_t stages, tile_vector, tile_columns, tile_rows;
};

struct ForwardTensors {
    TensorView x, weight, bias, norm_weight, norm_bias, mean, var, unbiased_var, residual, out, raw;
};

struct BackwardTensors {
    TensorView grad, x, weight, norm_weight, norm_bias, mean, var, residual, raw;
    TensorView x_grad, weight_grad, bias_grad, norm_weight_grad, norm_bias_grad, residual_grad, sums;
};

// A feature map (batch, channels, height, width), or none.
inline Map map_of(const TensorView& view, ScalarType type, int64_t batch, int64_t channels, int64_t height,
                  int64_t width, const char* name) {
    if (!view.given()) {
        return {};
    }
    require(view.dimensions == 4, name, "must have 4 dimensions");
    require(view.type == type, name, "must have the element type of x");
    const int64_t sizes[] = {batch, channels, height, width};
    for (int i = 0; i < 4; ++i) {
        require(view.sizes[i] == sizes[i], name,
                "has size " + std::to_string(view.sizes[i]) + " in dimension " + std::to_string(i) +
                    " and must have " + std::to_string(sizes[i]));
    }
    // A stride along a dimension of one element means nothing, and must not decide what is aligned.
    const auto stride = [&](int dimension) {
        return view.sizes[dimension] > 1 ? view.strides[dimension] : 0;
    };
    return {view.data, {stride(0), stride(1), stride(2), stride(3)}};
}

inline Map map_of(const TensorView& view, const DepthwiseProblem& p, int64_t height, int64_t width,
                  const char* name) {
    return map_of(view, p.type, p.batch, p.channels, height, width, name);
}

// Settles in which layout the kernels see the maps: all of them have neighbouring channels, or columns.
inline void choose_layout(DepthwiseProblem& p, std::initializer_list<const TensorView*> maps) {
    const auto all_neighbours = [&](int dimension) {
        return std::all_of(maps.begin(), maps.end(), [&](const TensorView* view) {
            return !view->given() || view->sizes[dimension] == 1 || view->strides[dimension] == 1;
        });
    };
    p.planes = !all_neighbours(1);
    require(!p.planes || all_neighbours(3), "maps",
            "must all have neighbouring channels (channels_last) or all neighbouring columns (NCHW)");
}

// `count` values, one per channel, image or hidden unit, or none.
inline ChannelValues values_of(const TensorView& view, int64_t count, const char* name) {
    if (!view.given()) {
        return {};
    }
    require(view.dimensions == 1 && view.sizes[0] == count, name,
            "must have " + std::to_string(count) + " values");
    return {view.data, view.type, view.strides[0]};
}

inline ChannelValues values_of(const TensorView& view, const DepthwiseProblem& p, const char* name) {
    return values_of(view, p.channels, name);
}

inline DepthwiseWeight weight_of(const TensorView& view, int64_t channels, int64_t kernel, const char* name) {
    if (!view.given()) {
        return {};
    }
    require(view.dimensions == 4 && view.sizes[0] == channels && view.sizes[1] == 1 &&
                view.sizes[2] == kernel && view.sizes[3] == kernel,
            name, "must have one square filter per channel");
    return {view.data, view.type, view.strides[0], view.strides[2], view.strides[3]};
}

inline DepthwiseWeight weight_of(const TensorView& view, const DepthwiseProblem& p, const char* name) {
    return weight_of(view, p.channels, p.kernel, name);
}

inline DepthwiseProblem problem_of(const TensorView& x, const TensorView& weight, const TensorView& residual,
                                   const Options& options) {
    DepthwiseProblem p{};
    require(x.dimensions == 4, "x", "must have 4 dimensions");
    require(weight.dimensions == 4, "weight", "must have 4 dimensions");
    p.type = x.type;
    p.batch = x.sizes[0];
    p.channels = x.sizes[1];
    p.height = x.sizes[2];
    p.width = x.sizes[3];
    p.kernel = static_cast<int32_t>(weight.sizes[2]);
    p.stride = static_cast<int32_t>(options.stride);
    require(p.stride == 1 || p.stride == 2, "stride", "must be 1 or 2");
    p.pad_h = options.pad_h;
    p.pad_w = options.pad_w;
    p.out_height = (p.height + 2 * p.pad_h - p.kernel) / p.stride + 1;
    p.out_width = (p.width + 2 * p.pad_w - p.kernel) / p.stride + 1;
    p.norm = enumeration(options.norm, NormPlacement::post, "norm");
    p.batch_stats = options.batch_stats;
    p.eps = static_cast<float>(options.eps);
    p.activation = enumeration(options.activation, Activation::hardswish, "activation");
    p.residual_mode = enumeration(options.residual_mode, ResidualMode::after, "residual_mode");
    p.identity = options.identity;
    p.x = map_of(x, p, p.height, p.width, "x");
    p.residual = map_of(residual, p, p.out_height, p.out_width, "residual");
    p.weight = weight_of(weight, p, "weight");
    p.tile = {static_cast<int32_t>(options.tile_vector), static_cast<int32_t>(options.tile_columns),
              static_cast<int32_t>(options.tile_rows)};
    p.stages = static_cast<int32_t>(options.stages);
    return p;
}

inline DepthwiseForwardParams forward_params(const ForwardTensors& t, const Options& options) {
    DepthwiseForwardParams params{};
    DepthwiseProblem& p = params.problem;
    p = problem_of(t.x, t.weight, t.residual, options);
    p.bias = values_of(t.bias, p, "bias");
    p.norm_weight = values_of(t.norm_weight, p, "norm_weight");
    p.norm_bias = values_of(t.norm_bias, p, "norm_bias");
    p.mean = values_of(t.mean, p, "mean");
    p.var = values_of(t.var, p, "var");
    params.out = map_of(t.out, p, p.out_height, p.out_width, "out");
    params.raw = map_of(t.raw, p, p.out_height, p.out_width, "raw");
    choose_layout(p, {&t.x, &t.residual, &t.out, &t.raw});
    params.unbiased_var = floats_of(t.unbiased_var, p.channels, "unbiased_var");
    return params;
}

inline DepthwiseBackwardParams backward_params(const BackwardTensors& t, const Options& options) {
    DepthwiseBackwardParams params{};
    DepthwiseProblem& p = params.problem;
    p = problem_of(t.x, t.weight, t.residual, options);
    p.norm_weight = values_of(t.norm_weight, p, "norm_weight");
    p.norm_bias = values_of(t.norm_bias, p, "norm_bias");
    p.mean = values_of(t.mean, p, "mean");
    p.var = values_of(t.var, p, "var");
    params.grad = map_of(t.grad, p, p.out_height, p.out_width, "grad");
    params.raw = map_of(t.raw, p, p.out_height, p.out_width, "raw");
    params.x_grad = map_of(t.x_grad, p, p.height, p.width, "x_grad");
    params.residual_grad = map_of(t.residual_grad, p, p.out_height, p.out_width, "residual_grad");
    choose_layout(p, {&t.grad, &t.x, &t.residual, &t.raw, &t.x_grad, &t.residual_grad});
    params.weight_grad = weight_of(t.weight_grad, p, "weight_grad");
    params.bias_grad = values_of(t.bias_grad, p, "bias_grad");
    params.norm_weight_grad = values_of(t.norm_weight_grad, p, "norm_weight_grad");
    params.norm_bias_grad = values_of(t.norm_bias_grad, p, "norm_bias_grad");
    params.sums = floats_of(t.sums, 2 * p.channels, "sums");
    return params;
}

}  // namespace fused_ops::depthwise
