// Python module over the emulated kernels: the same launchers as the torch library's, with raw CPU addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../depthwise/arguments.h"
#include "../hr_chain/arguments.h"
#include "emulator.h"

namespace py = pybind11;
using namespace fused_ops;

namespace {

// A tensor as Python passes it: (address, element type, sizes, strides), or None.
using Tensor = std::optional<std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>>;

TensorView view(const Tensor& tensor) {
    TensorView result;
    if (!tensor) {
        return result;
    }
    const auto& [address, type, sizes, strides] = *tensor;
    if (sizes.empty() || sizes.size() > 4 || sizes.size() != strides.size()) {
        throw std::invalid_argument("a tensor has 1 to 4 sizes and as many strides");
    }
    result.data = reinterpret_cast<void*>(address);
    result.type = static_cast<ScalarType>(type);
    result.dimensions = static_cast<int>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), result.sizes);
    std::copy(strides.begin(), strides.end(), result.strides);
    return result;
}

// Only the plan of a launch sequence is made, so that its size can be asked for without its memory.
bool plan_only = false;
int64_t workspace_floats = 0;

template <typename Params>
void launch(Params& params, const char* (*workspace)(const Params&, int64_t&),
            const char* (*sequence)(const Params&, void*), const char* name) {
    py::gil_scoped_release released;
    int64_t floats = 0;
    const char* error = workspace(params, floats);
    workspace_floats = floats;
    if (plan_only && error == nullptr) {
        return;
    }
    // NaN where a kernel reads what no kernel has written.
    std::vector<float> memory(floats, std::nanf(""));
    params.problem.workspace = memory.data();
    if (error == nullptr) {
        error = sequence(params, nullptr);
    }
    if (error != nullptr) {
        throw std::runtime_error(std::string(name) + ": " + error);
    }
}

void depthwise_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& norm_weight,
                       const Tensor& norm_bias, const Tensor& mean, const Tensor& var,
                       const Tensor& unbiased_var, const Tensor& residual, const Tensor& out,
                       const Tensor& raw, int64_t stride, int64_t pad_h, int64_t pad_w, int64_t norm,
                       bool batch_stats, double eps, int64_t activation, int64_t residual_mode, bool identity,
                       int64_t stages, int64_t tile_vector, int64_t tile_columns, int64_t tile_rows) {
    auto params = depthwise::forward_params(
        {view(x), view(weight), view(bias), view(norm_weight), view(norm_bias), view(mean), view(var),
         view(unbiased_var), view(residual), view(out), view(raw)},
        {stride, pad_h, pad_w, norm, batch_stats, eps, activation, residual_mode, identity, stages,
         tile_vector, tile_columns, tile_rows});
    launch(params, depthwise_forward_workspace, launch_depthwise_forward, "depthwise_forward");
}

void depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& norm_weight,
                        const Tensor& norm_bias, const Tensor& mean, const Tensor& var,
                        const Tensor& residual, const Tensor& raw, const Tensor& x_grad,
                        const Tensor& weight_grad, const Tensor& bias_grad, const Tensor& norm_weight_grad,
                        const Tensor& norm_bias_grad, const Tensor& residual_grad, const Tensor& sums,
                        int64_t stride, int64_t pad_h, int64_t pad_w, int64_t norm, bool batch_stats,
                        double eps, int64_t activation, int64_t residual_mode, bool identity, int64_t stages,
                        int64_t tile_vector, int64_t tile_columns, int64_t tile_rows) {
    auto params = depthwise::backward_params(
        {view(grad), view(x), view(weight), view(norm_weight), view(norm_bias), view(mean), view(var),
         view(residual), view(raw), view(x_grad), view(weight_grad), view(bias_grad), view(norm_weight_grad),
         view(norm_bias_grad), view(residual_grad), view(sums)},
        {stride, pad_h, pad_w, norm, batch_stats, eps, activation, residual_mode, identity, stages,
         tile_vector, tile_columns, tile_rows});
    launch(params, depthwise_backward_workspace, launch_depthwise_backward, "depthwise_backward");
}

void hr_chain_forward(const Tensor& x, const Tensor& high_weight, const Tensor& high_bias,
                      const Tensor& low_weight, const Tensor& fc1_weight, const Tensor& fc1_bias,
                      const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& norm_weight,
                      const Tensor& norm_bias, const Tensor& mean, const Tensor& var, const Tensor& drop_path,
                      const Tensor& unbiased_var, const Tensor& out, const Tensor& low, bool batch_stats,
                      double eps, int64_t activation, bool identity, int64_t stages) {
    auto params = hr_chain::forward_params(
        {view(x), view(high_weight), view(high_bias), view(low_weight), view(fc1_weight), view(fc1_bias),
         view(fc2_weight), view(fc2_bias), view(norm_weight), view(norm_bias), view(mean), view(var),
         view(drop_path)},
        view(out), view(low), view(unbiased_var), {batch_stats, eps, activation, identity, stages});
    launch(params, hr_chain_forward_workspace, launch_hr_chain_forward, "hr_chain_forward");
}

void hr_chain_backward(const Tensor& grad, const Tensor& low, const Tensor& x, const Tensor& high_weight,
                       const Tensor& high_bias, const Tensor& low_weight, const Tensor& fc1_weight,
                       const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias,
                       const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mean,
                       const Tensor& var, const Tensor& drop_path, const Tensor& x_grad,
                       const Tensor& high_weight_grad, const Tensor& high_bias_grad,
                       const Tensor& low_weight_grad, const Tensor& fc1_weight_grad,
                       const Tensor& fc1_bias_grad, const Tensor& fc2_weight_grad,
                       const Tensor& fc2_bias_grad, const Tensor& norm_weight_grad,
                       const Tensor& norm_bias_grad, const Tensor& low_grad, const Tensor& sums,
                       bool batch_stats, double eps, int64_t activation, bool identity, int64_t stages) {
    auto params = hr_chain::backward_params(
        view(grad), view(low),
        {view(x), view(high_weight), view(high_bias), view(low_weight), view(fc1_weight), view(fc1_bias),
         view(fc2_weight), view(fc2_bias), view(norm_weight), view(norm_bias), view(mean), view(var),
         view(drop_path)},
        {view(x_grad), view(high_weight_grad), view(high_bias_grad), view(low_weight_grad),
         view(fc1_weight_grad), view(fc1_bias_grad), view(fc2_weight_grad), view(fc2_bias_grad),
         view(norm_weight_grad), view(norm_bias_grad)},
        view(low_grad), view(sums), {batch_stats, eps, activation, identity, stages});
    launch(params, hr_chain_backward_workspace, launch_hr_chain_backward, "hr_chain_backward");
}

py::dict traffic() {
    const emulator::Traffic& now = emulator::traffic;
    py::dict result;
    result["counted_bytes"] = now.counted_bytes;
    result["block_bytes"] = now.block_bytes;
    result["requested_bytes"] = now.requested_bytes;
    result["launches"] = now.launches;
    result["blocks"] = now.blocks;
    return result;
}

// One (name, counted, block, requested bytes) per launch since the last reset.
std::vector<std::tuple<std::string, uint64_t, uint64_t, uint64_t>> launches() {
    std::vector<std::tuple<std::string, uint64_t, uint64_t, uint64_t>> result;
    for (const emulator::Launch& launch : emulator::traffic.each) {
        result.emplace_back(launch.name, launch.counted_bytes, launch.block_bytes, launch.requested_bytes);
    }
    return result;
}

void set_mode(const std::string& name) {
    if (name != "sequential" && name != "concurrent") {
        throw std::invalid_argument("mode is \"sequential\" or \"concurrent\"");
    }
    emulator::mode = name == "concurrent" ? emulator::Mode::concurrent : emulator::Mode::sequential;
}

// The numbers that callers pass, by name, so that a test can compare them with the Python side's.
py::dict codes() {
    using namespace py::literals;
    const auto number = [](auto value) { return static_cast<int>(value); };
    return py::dict(
        "type"_a =
            py::dict("float32"_a = number(ScalarType::float32), "float16"_a = number(ScalarType::float16),
                     "bfloat16"_a = number(ScalarType::bfloat16)),
        "activation"_a =
            py::dict("none"_a = number(Activation::none), "relu"_a = number(Activation::relu),
                     "relu6"_a = number(Activation::relu6), "silu"_a = number(Activation::silu),
                     "gelu"_a = number(Activation::gelu), "gelu_tanh"_a = number(Activation::gelu_tanh),
                     "hardswish"_a = number(Activation::hardswish)),
        "norm"_a = py::dict("none"_a = number(NormPlacement::none), "pre"_a = number(NormPlacement::pre),
                            "post"_a = number(NormPlacement::post)),
        "residual_mode"_a =
            py::dict("none"_a = number(ResidualMode::none), "before"_a = number(ResidualMode::before),
                     "after"_a = number(ResidualMode::after)));
}

}  // namespace

PYBIND11_MODULE(fused_ops_emulator, m)
{
    m.doc() =
        "The CUDA kernels of fused_ops on CPU threads; memory is passed as "
        "raw addresses.";
    m.def("depthwise_forward", &depthwise_forward, "As the torch library's operator of this name.");
    m.def("depthwise_backward", &depthwise_backward, "As the torch library's operator of this name.");
    m.def("hr_chain_forward", &hr_chain_forward, "As the torch library's operator of this name.");
    m.def("hr_chain_backward", &hr_chain_backward, "As the torch library's operator of this name.");
    m.def("codes", &codes);
    m.def("traffic", &traffic, "Global memory traffic since the last reset_traffic().");
    m.def("launches", &launches,
          "Traffic of each launch since the last reset_traffic(): (kernel, "
          "counted, block, requested bytes).");
    m.def("reset_traffic", [] { emulator::traffic = {}; });
    m.def(
        "touched", [] { return std::make_pair(emulator::traffic.read, emulator::traffic.written); },
        "Address intervals [begin, end) that the last launch read and wrote.");
    m.def("set_mode", &set_mode, "\"sequential\": coroutines on one thread. \"concurrent\": OS threads.");
    m.def(
        "set_plan_only", [](bool only) { plan_only = only; }, "Plan launch sequences without running them.");
    m.def(
        "workspace_floats", [] { return workspace_floats; }, "Size of the last launch sequence's workspace.");
    m.def("set_multiprocessors", [](int count) { emulator::multiprocessors = count; });
    m.def(
        "set_clusters", [](bool supported) { emulator::clusters = supported; },
        "Whether blocks run in clusters.");
}
