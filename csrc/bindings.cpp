// The torch library `fused_ops_native`: schemas, argument checks, device and stream. The only file that
// includes torch, and only its stable ABI, so that one binary serves every torch from TORCH_TARGET_VERSION
// on; there is no Python ABI in it either.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "depthwise/arguments.h"
#include "hr_chain/arguments.h"

namespace {

using fused_ops::TensorView;
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

// Views of tensors on the device of the first one.
class Views {
  public:
    explicit Views(const Tensor& x) : device_(x.get_device_index()) {
        STD_TORCH_CHECK(x.is_cuda(), "x must be a CUDA tensor");
    }

    TensorView operator()(const Tensor& tensor, const char* name) const {
        STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, name,
                        " must be on the CUDA device of x");
        STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.dim() <= 4, name, " has ", tensor.dim(), " dimensions");
        TensorView view;
        view.data = tensor.data_ptr();
        view.type = scalar_type(tensor, name);
        view.dimensions = static_cast<int>(tensor.dim());
        for (int i = 0; i < view.dimensions; ++i) {
            view.sizes[i] = tensor.size(i);
            view.strides[i] = tensor.stride(i);
        }
        return view;
    }

    TensorView operator()(const std::optional<Tensor>& tensor, const char* name) const {
        return tensor.has_value() ? (*this)(*tensor, name) : TensorView{};
    }

  private:
    int32_t device_;
};

// Runs a launch sequence on the device and the current stream of `x`, with the workspace that it asks for.
template <typename Params>
void launch(const Tensor& x, Params& params, const char* (*workspace)(const Params&, int64_t&),
            const char* (*sequence)(const Params&, void*), const char* name) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    int64_t floats = 0;
    const char* error = workspace(params, floats);
    STD_TORCH_CHECK(error == nullptr, "fused_ops_native::", name, ": ", error == nullptr ? "" : error);
    std::optional<Tensor> memory;
    if (floats > 0) {
        memory = torch::stable::new_empty(x, {floats}, ScalarType::Float);
        params.problem.workspace = static_cast<float*>(memory->mutable_data_ptr());
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    error = sequence(params, stream);
    STD_TORCH_CHECK(error == nullptr, "fused_ops_native::", name, ": ", error == nullptr ? "" : error);
}

using Optional = std::optional<Tensor>;

void depthwise_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                       const Optional& norm_weight, const Optional& norm_bias, const Optional& mean,
                       const Optional& var, const Optional& unbiased_var, const Optional& residual,
                       const Tensor& out, const Optional& raw, int64_t stride, int64_t pad_h, int64_t pad_w,
                       int64_t norm, bool batch_stats, double eps, int64_t activation, int64_t residual_mode,
                       bool identity, int64_t stages, int64_t tile_vector, int64_t tile_columns,
                       int64_t tile_rows) {
    const Views view(x);
    auto params = fused_ops::depthwise::forward_params(
        {view(x, "x"), view(weight, "weight"), view(bias, "bias"), view(norm_weight, "norm_weight"),
         view(norm_bias, "norm_bias"), view(mean, "mean"), view(var, "var"),
         view(unbiased_var, "unbiased_var"), view(residual, "residual"), view(out, "out"), view(raw, "raw")},
        {stride, pad_h, pad_w, norm, batch_stats, eps, activation, residual_mode, identity, stages,
         tile_vector, tile_columns, tile_rows});
    launch(x, params, fused_ops::depthwise_forward_workspace, fused_ops::launch_depthwise_forward,
           "depthwise_forward");
}

void depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                        const Optional& norm_weight, const Optional& norm_bias, const Optional& mean,
                        const Optional& var, const Optional& residual, const Optional& raw,
                        const Optional& x_grad, const Optional& weight_grad, const Optional& bias_grad,
                        const Optional& norm_weight_grad, const Optional& norm_bias_grad,
                        const Optional& residual_grad, const Optional& sums, int64_t stride, int64_t pad_h,
                        int64_t pad_w, int64_t norm, bool batch_stats, double eps, int64_t activation,
                        int64_t residual_mode, bool identity, int64_t stages, int64_t tile_vector,
                        int64_t tile_columns, int64_t tile_rows) {
    const Views view(x);
    auto params = fused_ops::depthwise::backward_params(
        {view(grad, "grad"), view(x, "x"), view(weight, "weight"), view(norm_weight, "norm_weight"),
         view(norm_bias, "norm_bias"), view(mean, "mean"), view(var, "var"), view(residual, "residual"),
         view(raw, "raw"), view(x_grad, "x_grad"), view(weight_grad, "weight_grad"),
         view(bias_grad, "bias_grad"), view(norm_weight_grad, "norm_weight_grad"),
         view(norm_bias_grad, "norm_bias_grad"), view(residual_grad, "residual_grad"), view(sums, "sums")},
        {stride, pad_h, pad_w, norm, batch_stats, eps, activation, residual_mode, identity, stages,
         tile_vector, tile_columns, tile_rows});
    launch(x, params, fused_ops::depthwise_backward_workspace, fused_ops::launch_depthwise_backward,
           "depthwise_backward");
}

void hr_chain_forward(const Tensor& x, const Tensor& high_weight, const Optional& high_bias,
                      const Tensor& low_weight, const Tensor& fc1_weight, const Optional& fc1_bias,
                      const Tensor& fc2_weight, const Optional& fc2_bias, const Optional& norm_weight,
                      const Optional& norm_bias, const Tensor& mean, const Tensor& var,
                      const Optional& drop_path, const Optional& unbiased_var, const Tensor& out,
                      const Optional& low, bool batch_stats, double eps, int64_t activation, bool identity,
                      int64_t stages) {
    const Views view(x);
    auto params = fused_ops::hr_chain::forward_params(
        {view(x, "x"), view(high_weight, "high_weight"), view(high_bias, "high_bias"),
         view(low_weight, "low_weight"), view(fc1_weight, "fc1_weight"), view(fc1_bias, "fc1_bias"),
         view(fc2_weight, "fc2_weight"), view(fc2_bias, "fc2_bias"), view(norm_weight, "norm_weight"),
         view(norm_bias, "norm_bias"), view(mean, "mean"), view(var, "var"), view(drop_path, "drop_path")},
        view(out, "out"), view(low, "low"), view(unbiased_var, "unbiased_var"),
        {batch_stats, eps, activation, identity, stages});
    launch(x, params, fused_ops::hr_chain_forward_workspace, fused_ops::launch_hr_chain_forward,
           "hr_chain_forward");
}

void hr_chain_backward(const Tensor& grad, const Tensor& low, const Tensor& x, const Tensor& high_weight,
                       const Optional& high_bias, const Tensor& low_weight, const Tensor& fc1_weight,
                       const Optional& fc1_bias, const Tensor& fc2_weight, const Optional& fc2_bias,
                       const Optional& norm_weight, const Optional& norm_bias, const Tensor& mean,
                       const Tensor& var, const Optional& drop_path, const Optional& x_grad,
                       const Optional& high_weight_grad, const Optional& high_bias_grad,
                       const Optional& low_weight_grad, const Optional& fc1_weight_grad,
                       const Optional& fc1_bias_grad, const Optional& fc2_weight_grad,
                       const Optional& fc2_bias_grad, const Optional& norm_weight_grad,
                       const Optional& norm_bias_grad, const Optional& low_grad, const Optional& sums,
                       bool batch_stats, double eps, int64_t activation, bool identity, int64_t stages) {
    const Views view(x);
    auto params = fused_ops::hr_chain::backward_params(
        view(grad, "grad"), view(low, "low"),
        {view(x, "x"), view(high_weight, "high_weight"), view(high_bias, "high_bias"),
         view(low_weight, "low_weight"), view(fc1_weight, "fc1_weight"), view(fc1_bias, "fc1_bias"),
         view(fc2_weight, "fc2_weight"), view(fc2_bias, "fc2_bias"), view(norm_weight, "norm_weight"),
         view(norm_bias, "norm_bias"), view(mean, "mean"), view(var, "var"), view(drop_path, "drop_path")},
        {view(x_grad, "x_grad"), view(high_weight_grad, "high_weight_grad"),
         view(high_bias_grad, "high_bias_grad"), view(low_weight_grad, "low_weight_grad"),
         view(fc1_weight_grad, "fc1_weight_grad"), view(fc1_bias_grad, "fc1_bias_grad"),
         view(fc2_weight_grad, "fc2_weight_grad"), view(fc2_bias_grad, "fc2_bias_grad"),
         view(norm_weight_grad, "norm_weight_grad"), view(norm_bias_grad, "norm_bias_grad")},
        view(low_grad, "low_grad"), view(sums, "sums"), {batch_stats, eps, activation, identity, stages});
    launch(x, params, fused_ops::hr_chain_backward_workspace, fused_ops::launch_hr_chain_backward,
           "hr_chain_backward");
}

}  // namespace

// mean and var are written by the statistics stage of a forward with batch_stats.
#define FUSED_OPS_OPTIONS                                                       \
    "int stride, int pad_h, int pad_w, int norm, bool batch_stats, float eps, " \
    "int activation, "                                                          \
    "int residual_mode, bool identity, int stages, int tile_vector, int "       \
    "tile_columns, int tile_rows"

#define FUSED_OPS_HR_CHAIN_INPUTS                                                             \
    "Tensor x, Tensor high_weight, Tensor? high_bias, Tensor low_weight, Tensor fc1_weight, " \
    "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? norm_weight, "            \
    "Tensor? norm_bias, "
#define FUSED_OPS_HR_CHAIN_OPTIONS \
    "bool batch_stats, float eps, int activation, bool identity, int stages) -> ()"

STABLE_TORCH_LIBRARY(fused_ops_native, m)
{
    m.def(
        "depthwise_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? "
        "norm_weight, Tensor? norm_bias, "
        "Tensor(a!)? mean, Tensor(b!)? var, Tensor(c!)? unbiased_var, Tensor? "
        "residual, Tensor(d!) out, "
        "Tensor(e!)? raw, " FUSED_OPS_OPTIONS ") -> ()");
    m.def(
        "depthwise_backward(Tensor grad, Tensor x, Tensor weight, Tensor? "
        "norm_weight, Tensor? norm_bias, "
        "Tensor? mean, Tensor? var, Tensor? residual, Tensor? raw, Tensor(a!)? "
        "x_grad, "
        "Tensor(b!)? weight_grad, Tensor(c!)? bias_grad, Tensor(d!)? "
        "norm_weight_grad, "
        "Tensor(e!)? norm_bias_grad, Tensor(f!)? residual_grad, Tensor(g!)? "
        "sums, " FUSED_OPS_OPTIONS ") -> ()");
    m.def("hr_chain_forward(" FUSED_OPS_HR_CHAIN_INPUTS
          "Tensor(a!) mean, Tensor(b!) var, Tensor? drop_path, Tensor(c!)? unbiased_var, "
          "Tensor(d!) out, Tensor(e!)? low, " FUSED_OPS_HR_CHAIN_OPTIONS);
    m.def("hr_chain_backward(Tensor grad, Tensor low, " FUSED_OPS_HR_CHAIN_INPUTS
          "Tensor mean, Tensor var, Tensor? drop_path, Tensor(a!)? x_grad, Tensor(b!)? high_weight_grad, "
          "Tensor(c!)? high_bias_grad, Tensor(d!)? low_weight_grad, Tensor(e!)? fc1_weight_grad, "
          "Tensor(f!)? fc1_bias_grad, Tensor(g!)? fc2_weight_grad, Tensor(h!)? fc2_bias_grad, "
          "Tensor(i!)? norm_weight_grad, Tensor(j!)? norm_bias_grad, Tensor(k!)? low_grad, "
          "Tensor(l!)? sums, " FUSED_OPS_HR_CHAIN_OPTIONS);
}

STABLE_TORCH_LIBRARY_IMPL(fused_ops_native, CUDA, m)
{
    m.impl("depthwise_forward", TORCH_BOX(&depthwise_forward));
    m.impl("depthwise_backward", TORCH_BOX(&depthwise_backward));
    m.impl("hr_chain_forward", TORCH_BOX(&hr_chain_forward));
    m.impl("hr_chain_backward", TORCH_BOX(&hr_chain_backward));
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
