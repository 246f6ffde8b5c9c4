// Python module over the emulated kernels: the same launchers as the torch library's, with raw CPU addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../depthwise/params.h"
#include "emulator.h"

namespace py = pybind11;
using namespace fused_ops;

namespace {

const void* address(uintptr_t value) {
    return reinterpret_cast<const void*>(value);
}

// (address, element type, stride) or None.
using Values = std::optional<std::tuple<uintptr_t, int, int64_t>>;

ChannelValues channel_values(const Values& values) {
    if (!values) {
        return {nullptr, ScalarType::float32, 0};
    }
    return {address(std::get<0>(*values)), static_cast<ScalarType>(std::get<1>(*values)),
            std::get<2>(*values)};
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;

MapStrides map_strides(const Strides& strides) {
    return {std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

void depthwise_forward(std::tuple<int64_t, int64_t, int64_t, int64_t> size,
                       std::pair<int64_t, int64_t> out_size, std::pair<int64_t, int64_t> padding, int type,
                       uintptr_t x, Strides x_strides, uintptr_t residual, Strides residual_strides,
                       uintptr_t out, Strides out_strides, uintptr_t weight, int weight_type,
                       Strides weight_strides, Values bias, Values norm_weight, Values norm_bias, Values mean,
                       Values var, int norm, float eps, int activation, int residual_mode, bool identity,
                       int vector_width, int tile_columns, int strip_rows) {
    DepthwiseForwardParams params{};
    std::tie(params.batch, params.channels, params.height, params.width) = size;
    std::tie(params.out_height, params.out_width) = out_size;
    std::tie(params.pad_h, params.pad_w) = padding;
    params.type = static_cast<ScalarType>(type);
    params.x = address(x);
    params.x_strides = map_strides(x_strides);
    params.residual = address(residual);
    params.residual_strides = map_strides(residual_strides);
    params.out = reinterpret_cast<void*>(out);
    params.out_strides = map_strides(out_strides);
    params.weight = {address(weight), static_cast<ScalarType>(weight_type), std::get<0>(weight_strides),
                     std::get<1>(weight_strides), std::get<2>(weight_strides)};
    params.bias = channel_values(bias);
    params.norm_weight = channel_values(norm_weight);
    params.norm_bias = channel_values(norm_bias);
    params.mean = channel_values(mean);
    params.var = channel_values(var);
    params.eps = eps;
    params.norm = static_cast<NormPlacement>(norm);
    params.activation = static_cast<Activation>(activation);
    params.residual_mode = static_cast<ResidualMode>(residual_mode);
    params.identity = identity;
    params.vector_width = vector_width;
    params.tile_columns = tile_columns;
    params.strip_rows = strip_rows;
    const char* error = nullptr;
    {
        py::gil_scoped_release released;
        error = launch_depthwise_forward(params, nullptr);
    }
    if (error != nullptr) {
        throw std::runtime_error(std::string("depthwise_forward: ") + error);
    }
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
    m.doc() = "The CUDA kernels of fused_ops on CPU threads; memory is passed as raw addresses.";
    m.def("depthwise_forward", &depthwise_forward, py::kw_only(), py::arg("size"), py::arg("out_size"),
          py::arg("padding"), py::arg("type"), py::arg("x"), py::arg("x_strides"), py::arg("residual"),
          py::arg("residual_strides"), py::arg("out"), py::arg("out_strides"), py::arg("weight"),
          py::arg("weight_type"), py::arg("weight_strides"), py::arg("bias"), py::arg("norm_weight"),
          py::arg("norm_bias"), py::arg("mean"), py::arg("var"), py::arg("norm"), py::arg("eps"),
          py::arg("activation"), py::arg("residual_mode"), py::arg("identity"), py::arg("vector_width") = 0,
          py::arg("tile_columns") = 0, py::arg("strip_rows") = 0);
    m.def("codes", &codes);
    m.def("traffic", &traffic, "Global memory traffic since the last reset_traffic().");
    m.def("reset_traffic", [] { emulator::traffic = {}; });
    m.def(
        "touched", [] { return std::make_pair(emulator::traffic.read, emulator::traffic.written); },
        "Address intervals [begin, end) that the last launch read and wrote.");
    m.def("set_mode", &set_mode, "\"sequential\": coroutines on one thread. \"concurrent\": OS threads.");
    m.def("set_multiprocessors", [](int count) { emulator::multiprocessors = count; });
}
