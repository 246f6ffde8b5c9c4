// The torch library `fused_ops_native`: schemas, argument checks, device and stream. The only file that
// includes torch, and only its stable ABI, so that one binary serves every torch from TORCH_TARGET_VERSION
// on; there is no Python ABI in it either.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "depthwise/params.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

fused_ops::ScalarType scalar_type(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return fused_ops::ScalarType::float32;
        case ScalarType::Half:
            return fused_ops::ScalarType::float16;
        case ScalarType::BFloat16:
            return fused_ops::ScalarType::bfloat16;
        default:
            STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
    }
}

// Where a kernel can read or write `tensor`: on the device of `x`.
void check_device(const Tensor& tensor, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
                    " must be on the CUDA device of x");
}

fused_ops::MapStrides map_strides(const Tensor& map, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(map.dim() == 4, name, " must have 4 dimensions, and has ", map.dim());
    check_device(map, x, name);
    STD_TORCH_CHECK(map.scalar_type() == x.scalar_type(), name, " must have the element type of x");
    STD_TORCH_CHECK(map.stride(1) == 1 || map.size(1) == 1, name,
                    " must have neighbouring channels (channels_last), and has channel stride ",
                    map.stride(1));
    return {map.stride(0), map.stride(2), map.stride(3)};
}

void check_size(const Tensor& map, int64_t n, int64_t c, int64_t h, int64_t w, const char* name) {
    STD_TORCH_CHECK(map.size(0) == n && map.size(1) == c && map.size(2) == h && map.size(3) == w, name,
                    " has size (", map.size(0), ", ", map.size(1), ", ", map.size(2), ", ", map.size(3),
                    ") and must have (", n, ", ", c, ", ", h, ", ", w, ")");
}

fused_ops::ChannelValues channel_values(const std::optional<Tensor>& values, const Tensor& x,
                                        const char* name) {
    if (!values.has_value()) {
        return {nullptr, fused_ops::ScalarType::float32, 0};
    }
    check_device(*values, x, name);
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == x.size(1), name,
                    " must have one value per channel, ", x.size(1));
    return {values->const_data_ptr(), scalar_type(*values, name), values->stride(0)};
}

template <typename Enumeration>
Enumeration enumeration(int64_t value, Enumeration last, const char* name) {
    STD_TORCH_CHECK(value >= 0 && value <= static_cast<int64_t>(last), name, " has no meaning for ", value);
    return static_cast<Enumeration>(value);
}

void depthwise_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                       const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                       const std::optional<Tensor>& residual, int64_t pad_h, int64_t pad_w, int64_t norm,
                       double eps, int64_t activation, int64_t residual_mode, bool identity, Tensor& out) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be a CUDA tensor");
    fused_ops::DepthwiseForwardParams params{};
    params.type = scalar_type(x, "x");
    params.x_strides = map_strides(x, x, "x");
    params.x = x.const_data_ptr();
    params.batch = x.size(0);
    params.channels = x.size(1);
    params.height = x.size(2);
    params.width = x.size(3);
    params.pad_h = pad_h;
    params.pad_w = pad_w;

    params.out_strides = map_strides(out, x, "out");
    params.out = out.mutable_data_ptr();
    params.out_height = params.height + 2 * pad_h - 2;
    params.out_width = params.width + 2 * pad_w - 2;
    check_size(out, params.batch, params.channels, params.out_height, params.out_width, "out");

    check_device(weight, x, "weight");
    STD_TORCH_CHECK(weight.dim() == 4, "weight must have 4 dimensions, and has ", weight.dim());
    check_size(weight, params.channels, 1, 3, 3, "weight");
    params.weight = {weight.const_data_ptr(), scalar_type(weight, "weight"), weight.stride(0),
                     weight.stride(2), weight.stride(3)};

    params.bias = channel_values(bias, x, "bias");
    params.norm_weight = channel_values(norm_weight, x, "norm_weight");
    params.norm_bias = channel_values(norm_bias, x, "norm_bias");
    params.mean = channel_values(mean, x, "mean");
    params.var = channel_values(var, x, "var");
    params.eps = static_cast<float>(eps);
    params.norm = enumeration(norm, fused_ops::NormPlacement::post, "norm");
    params.activation = enumeration(activation, fused_ops::Activation::hardswish, "activation");
    params.residual_mode = enumeration(residual_mode, fused_ops::ResidualMode::after, "residual_mode");
    params.identity = identity;
    if (residual.has_value()) {
        params.residual_strides = map_strides(*residual, x, "residual");
        check_size(*residual, params.batch, params.channels, params.out_height, params.out_width, "residual");
        params.residual = residual->const_data_ptr();
    }

    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    const char* error = fused_ops::launch_depthwise_forward(params, stream);
    STD_TORCH_CHECK(error == nullptr, "fused_ops_native::depthwise_forward: ", error == nullptr ? "" : error);
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_ops_native, m)
{
    m.def(
        "depthwise_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor? mean, Tensor? var, Tensor? residual, int pad_h, int pad_w, int norm, float eps, int "
        "activation, "
        "int residual_mode, bool identity, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops_native, CUDA, m)
{
    m.impl("depthwise_forward", TORCH_BOX(&depthwise_forward));
}

// Read by fused_ops/core/native.py through ctypes.
extern "C" __attribute__((visibility("default"))) int fused_ops_interface() {
    return FUSED_OPS_INTERFACE;
}

// How the library was built, as JSON; architectures and ptx are lists of compute capabilities.
extern "C" __attribute__((visibility("default"))) const char* fused_ops_build_info() {
    return "{\"cuda\": \"" FUSED_OPS_CUDA_VERSION "\", \"torch\": \"" FUSED_OPS_TORCH_VERSION
           "\", \"architectures\": \"" FUSED_OPS_ARCHITECTURES "\", \"ptx\": \"" FUSED_OPS_PTX "\"}";
}
