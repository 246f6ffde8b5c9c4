// The depthwise forward kernel against a plain double loop, on OS threads, for the sanitizers: maps are
// allocated exactly, so AddressSanitizer sees any access outside them, and are odd, narrow, strided and of
// few channels.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../common/scalar.h"
#include "../../depthwise/params.h"
#include "../emulator.h"

using namespace fused_ops;

namespace {

struct Shape {
    int n, c, h, w, pad;
    int spare_channels;  // the map is a slice of one with this many more channels
};

// A channels_last map, allocated up to its last element and not one further.
template <typename T>
struct Map {
    Map(int n, int c, int h, int w, int spare)
        : strides{int64_t{h} * w * (c + spare), int64_t{w} * (c + spare), c + spare},
          values(n * strides.n - spare) {}
    T& at(int n, int c, int h, int w) { return values[n * strides.n + h * strides.h + w * strides.w + c]; }
    MapStrides strides;
    std::vector<T> values;
};

std::mt19937 generator(0);

float random_value() {
    return std::normal_distribution<float>()(generator);
}

template <typename T>
ScalarType type_of();
template <>
ScalarType type_of<float>() {
    return ScalarType::float32;
}
template <>
ScalarType type_of<float16>() {
    return ScalarType::float16;
}
template <>
ScalarType type_of<bfloat16>() {
    return ScalarType::bfloat16;
}

// Half a unit in the last place, relative, and room for the sums in float.
template <typename T>
constexpr double TOLERANCE = 1e-5;
template <>
constexpr double TOLERANCE<float16> = 1.0 / 1024;
template <>
constexpr double TOLERANCE<bfloat16> = 1.0 / 128;

template <typename T>
int check(const Shape& shape, NormPlacement norm, ResidualMode residual_mode, bool identity) {
    const int out_h = shape.h + 2 * shape.pad - 2;
    const int out_w = shape.w + 2 * shape.pad - 2;
    Map<T> x(shape.n, shape.c, shape.h, shape.w, shape.spare_channels);
    Map<T> residual(shape.n, shape.c, out_h, out_w, shape.spare_channels);
    Map<T> out(shape.n, shape.c, out_h, out_w, shape.spare_channels);
    for (T& value : x.values) {
        value = from_float<T>(random_value());
    }
    for (T& value : residual.values) {
        value = from_float<T>(random_value());
    }
    std::vector<float> weight(9 * shape.c), bias(shape.c), mean(shape.c), var(shape.c), gamma(shape.c);
    for (float& value : weight) {
        value = random_value() / 3;
    }
    for (int c = 0; c < shape.c; ++c) {
        bias[c] = random_value();
        mean[c] = random_value();
        var[c] = 0.5f + std::fabs(random_value());
        gamma[c] = random_value();
    }
    const float eps = 1e-5f;

    DepthwiseForwardParams params{};
    params.batch = shape.n;
    params.channels = shape.c;
    params.height = shape.h;
    params.width = shape.w;
    params.out_height = out_h;
    params.out_width = out_w;
    params.pad_h = params.pad_w = shape.pad;
    params.type = type_of<T>();
    params.x = x.values.data();
    params.x_strides = x.strides;
    if (residual_mode != ResidualMode::none && !identity) {
        params.residual = residual.values.data();
        params.residual_strides = residual.strides;
    }
    params.out = out.values.data();
    params.out_strides = out.strides;
    params.weight = {weight.data(), ScalarType::float32, 9, 3, 1};
    params.bias = {bias.data(), ScalarType::float32, 1};
    if (norm != NormPlacement::none) {
        params.norm_weight = {gamma.data(), ScalarType::float32, 1};
        params.mean = {mean.data(), ScalarType::float32, 1};
        params.var = {var.data(), ScalarType::float32, 1};
    }
    params.eps = eps;
    params.norm = norm;
    params.activation = Activation::relu;
    params.residual_mode = residual_mode;
    params.identity = identity;
    if (const char* error = launch_depthwise_forward(params, nullptr)) {
        std::printf("%s\n", error);
        return 1;
    }

    const auto normalised = [&](double value, int c) {
        return (value - mean[c]) / std::sqrt(double{var[c]} + eps) * gamma[c];
    };
    for (int n = 0; n < shape.n; ++n) {
        for (int c = 0; c < shape.c; ++c) {
            for (int h = 0; h < out_h; ++h) {
                for (int w = 0; w < out_w; ++w) {
                    double sum = bias[c];
                    double magnitude = std::fabs(sum) + 1;
                    for (int k = 0; k < 9; ++k) {
                        const int row = h - shape.pad + k / 3;
                        const int column = w - shape.pad + k % 3;
                        if (row < 0 || row >= shape.h || column < 0 || column >= shape.w) {
                            continue;
                        }
                        double value = to_float(x.at(n, c, row, column));
                        value = norm == NormPlacement::pre ? normalised(value, c) : value;
                        sum += value * weight[c * 9 + k];
                        magnitude += std::fabs(value * weight[c * 9 + k]);
                    }
                    sum = norm == NormPlacement::post ? normalised(sum, c) : sum;
                    const double added = residual_mode == ResidualMode::none ? 0.0
                                         : identity ? double{to_float(x.at(n, c, h, w))}
                                                    : double{to_float(residual.at(n, c, h, w))};
                    const bool before = residual_mode == ResidualMode::before;
                    const double expected =
                        std::fmax(sum + (before ? added : 0.0), 0.0) + (before ? 0.0 : added);
                    const double got = to_float(out.at(n, c, h, w));
                    if (!(std::fabs(got - expected) <=
                          TOLERANCE<T> * (magnitude * 4 + std::fabs(expected)))) {
                        std::printf("n %d c %d h %d w %d: %g and not %g (map of %d channels, %dx%d)\n", n, c,
                                    h, w, got, expected, shape.c, shape.h, shape.w);
                        return 1;
                    }
                }
            }
        }
    }
    return 0;
}

template <typename T>
int check_all(const Shape& shape) {
    int failures = check<T>(shape, NormPlacement::none, ResidualMode::none, false);
    failures += check<T>(shape, NormPlacement::pre, ResidualMode::before, shape.pad == 1);
    failures += check<T>(shape, NormPlacement::post, ResidualMode::after, false);
    return failures;
}

}  // namespace

int main() {
    emulator::mode = emulator::Mode::concurrent;
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 0}, {2, 1, 5, 7, 1, 0},  {1, 3, 7, 5, 1, 0}, {2, 8, 5, 6, 1, 0}, {1, 20, 9, 5, 1, 0},
        {1, 8, 6, 5, 0, 0}, {1, 12, 3, 4, 2, 0}, {1, 8, 5, 5, 1, 8}, {1, 8, 5, 5, 1, 3}, {1, 280, 3, 3, 1, 0},
    };
    int failures = 0;
    for (const Shape& shape : shapes) {
#if defined(__SANITIZE_THREAD__)
        // A launch takes most of a second under ThreadSanitizer, and the types share one kernel text.
        failures += check<float16>(shape, NormPlacement::pre, ResidualMode::before, shape.pad == 1);
        continue;
#endif
        failures += check_all<float>(shape) + check_all<float16>(shape) + check_all<bfloat16>(shape);
    }
    std::printf(failures == 0 ? "right\n" : "%d failures\n", failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
