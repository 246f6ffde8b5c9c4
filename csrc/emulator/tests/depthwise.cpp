// The depthwise launch sequences on OS threads, for the sanitizers: maps are allocated exactly, so
// AddressSanitizer sees any access outside them, and are odd, narrow, strided and of few channels. Outputs
// and gradients of the convolution are compared with plain loops; the sequences with batch statistics, whose
// numbers the Python tests check, must give finite ones.
//
// With a number as argument, every launch passes the barrier of that number in each block without waiting:
// ThreadSanitizer must report a race.
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

using T = float16;

struct Shape {
    int n, c, h, w, kernel, stride, pad;
    int spare;  // the map is a slice of one with this many more channels, of planes columns
    bool planes = false;
};

std::mt19937 generator(0);

float random_value() {
    return std::normal_distribution<float>()(generator);
}

// A channels_last or NCHW map, allocated up to its last element and not one further.
struct FeatureMap {
    FeatureMap(const Shape& shape, int h, int w, int spare)
        : strides(shape.planes
                      ? MapStrides{int64_t{shape.c} * h * (w + spare), int64_t{h} * (w + spare), w + spare, 1}
                      : MapStrides{int64_t{h} * w * (shape.c + spare), 1, int64_t{w} * (shape.c + spare),
                                   shape.c + spare}),
          values(shape.n * strides.n - spare) {
        for (T& value : values) {
            value = from_float<T>(random_value());
        }
    }
    int64_t index(int n, int c, int h, int w) const {
        return n * strides.n + c * strides.c + h * strides.h + w * strides.w;
    }
    double at(int n, int c, int h, int w) const { return to_float(values[index(n, c, h, w)]); }
    Map map() { return {values.data(), strides}; }
    MapStrides strides;
    std::vector<T> values;
};

std::vector<float> random_vector(int count, float centre, float spread) {
    std::vector<float> values(count);
    for (float& value : values) {
        value = centre + spread * random_value();
    }
    return values;
}

struct Case {
    Shape shape;
    int out_h, out_w;
    FeatureMap x, residual, out, raw, grad, x_grad, residual_grad;
    std::vector<float> weight, bias, gamma, mean, var, unbiased;
    std::vector<float> weight_grad, bias_grad, gamma_grad, beta_grad;

    explicit Case(const Shape& s)
        : shape(s),
          out_h((s.h + 2 * s.pad - s.kernel) / s.stride + 1),
          out_w((s.w + 2 * s.pad - s.kernel) / s.stride + 1),
          x(s, s.h, s.w, s.spare),
          residual(s, out_h, out_w, s.spare),
          out(s, out_h, out_w, s.spare),
          raw(s, out_h, out_w, 0),
          grad(s, out_h, out_w, s.spare),
          x_grad(s, s.h, s.w, 0),
          residual_grad(s, out_h, out_w, 0),
          weight(random_vector(s.c * s.kernel * s.kernel, 0.0f, 1.0f / s.kernel)),
          bias(random_vector(s.c, 0.0f, 1.0f)),
          gamma(random_vector(s.c, 1.0f, 0.2f)),
          mean(random_vector(s.c, 0.0f, 0.5f)),
          var(s.c, 1.5f),
          unbiased(s.c),
          weight_grad(weight.size()),
          bias_grad(s.c),
          gamma_grad(s.c),
          beta_grad(s.c) {}

    DepthwiseProblem problem(NormPlacement norm, bool batch, ResidualMode mode, Activation activation) {
        DepthwiseProblem p{};
        p.batch = shape.n;
        p.channels = shape.c;
        p.height = shape.h;
        p.width = shape.w;
        p.out_height = out_h;
        p.out_width = out_w;
        p.kernel = shape.kernel;
        p.stride = shape.stride;
        p.pad_h = p.pad_w = shape.pad;
        p.type = ScalarType::float16;
        p.planes = shape.planes;
        p.norm = norm;
        p.batch_stats = batch;
        p.eps = 1e-5f;
        p.activation = activation;
        p.residual_mode = mode;
        p.x = x.map();
        if (mode != ResidualMode::none) {
            p.residual = residual.map();
        }
        p.weight = {weight.data(), ScalarType::float32, shape.kernel * shape.kernel, shape.kernel, 1};
        p.bias = values(bias);
        if (norm != NormPlacement::none) {
            p.norm_weight = values(gamma);
            p.mean = values(mean);
            p.var = values(var);
        }
        p.stages = STATISTICS_STAGE | RESULT_STAGE;
        return p;
    }

    static ChannelValues values(std::vector<float>& vector) {
        return {vector.data(), ScalarType::float32, 1};
    }

    // Forward, then backward with every gradient.
    const char* run(const DepthwiseProblem& p) {
        DepthwiseForwardParams forward{};
        forward.problem = p;
        forward.out = out.map();
        forward.raw = raw.map();
        forward.unbiased_var = unbiased.data();
        int64_t floats = 0;
        const char* error = depthwise_forward_workspace(forward, floats);
        std::vector<float> workspace(floats, std::nanf(""));
        forward.problem.workspace = workspace.data();
        error = error != nullptr ? error : launch_depthwise_forward(forward, nullptr);
        if (error != nullptr) {
            return error;
        }
        DepthwiseBackwardParams backward{};
        backward.problem = p;
        backward.grad = grad.map();
        backward.raw = raw.map();
        backward.x_grad = x_grad.map();
        backward.residual_grad = residual_grad.map();
        backward.weight_grad = {weight_grad.data(), ScalarType::float32, shape.kernel * shape.kernel,
                                shape.kernel, 1};
        backward.bias_grad = values(bias_grad);
        if (p.norm != NormPlacement::none) {
            backward.norm_weight_grad = values(gamma_grad);
            backward.norm_bias_grad = values(beta_grad);
        }
        error = depthwise_backward_workspace(backward, floats);
        std::vector<float> memory(floats, std::nanf(""));
        backward.problem.workspace = memory.data();
        return error != nullptr ? error : launch_depthwise_backward(backward, nullptr);
    }
};

// Half a unit in the last place of float16, relative, and room for the sums in float.
bool near(double got, double expected, double magnitude) {
    return std::fabs(got - expected) <= (std::fabs(expected) + 1e-2 * magnitude) / 1024 + 1e-6;
}

int check_convolution(const Shape& shape) {
    Case c(shape);
    if (const char* error =
            c.run(c.problem(NormPlacement::none, false, ResidualMode::none, Activation::none))) {
        std::printf("%s\n", error);
        return 1;
    }
    const int k = shape.kernel;
    std::vector<double> x_grad(c.x_grad.values.size()), weight_grad(c.weight.size()), bias_grad(shape.c);
    std::vector<double> magnitudes(c.weight.size() + 1, 1.0);
    for (int n = 0; n < shape.n; ++n) {
        for (int channel = 0; channel < shape.c; ++channel) {
            for (int h = 0; h < c.out_h; ++h) {
                for (int w = 0; w < c.out_w; ++w) {
                    const double grad = c.grad.at(n, channel, h, w);
                    double sum = c.bias[channel];
                    bias_grad[channel] += grad;
                    for (int tap = 0; tap < k * k; ++tap) {
                        const int row = h * shape.stride - shape.pad + tap / k;
                        const int column = w * shape.stride - shape.pad + tap % k;
                        if (row < 0 || row >= shape.h || column < 0 || column >= shape.w) {
                            continue;
                        }
                        const int index = channel * k * k + tap;
                        const double value = c.x.at(n, channel, row, column);
                        sum += value * c.weight[index];
                        weight_grad[index] += value * grad;
                        magnitudes[index] += std::fabs(value * grad);
                        x_grad[c.x_grad.index(n, channel, row, column)] += c.weight[index] * grad;
                    }
                    if (!near(c.out.at(n, channel, h, w), sum, k)) {
                        std::printf("out %d %d %d %d: %g and not %g\n", n, channel, h, w,
                                    c.out.at(n, channel, h, w), sum);
                        return 1;
                    }
                }
            }
        }
    }
    for (size_t i = 0; i < x_grad.size(); ++i) {
        if (!near(to_float(c.x_grad.values[i]), x_grad[i], k)) {
            std::printf("x_grad %zu: %g and not %g\n", i, to_float(c.x_grad.values[i]), x_grad[i]);
            return 1;
        }
    }
    for (size_t i = 0; i < weight_grad.size(); ++i) {
        if (!(std::fabs(c.weight_grad[i] - weight_grad[i]) <= 1e-5 * magnitudes[i])) {
            std::printf("weight_grad %zu: %g and not %g\n", i, c.weight_grad[i], weight_grad[i]);
            return 1;
        }
    }
    for (int i = 0; i < shape.c; ++i) {
        if (!(std::fabs(c.bias_grad[i] - bias_grad[i]) <= 1e-3)) {
            std::printf("bias_grad %d: %g and not %g\n", i, c.bias_grad[i], bias_grad[i]);
            return 1;
        }
    }
    return 0;
}

int check_finite(const Shape& shape, NormPlacement norm, ResidualMode mode) {
    Case c(shape);
    if (const char* error = c.run(c.problem(norm, true, mode, Activation::silu))) {
        std::printf("%s\n", error);
        return 1;
    }
    double sum = 0;
    for (const auto* values : {&c.out.values, &c.x_grad.values, &c.residual_grad.values}) {
        for (const T value : *values) {
            sum += to_float(value);
        }
    }
    for (const auto* values : {&c.weight_grad, &c.bias_grad, &c.gamma_grad, &c.beta_grad, &c.unbiased}) {
        for (const float value : *values) {
            sum += value;
        }
    }
    if (!std::isfinite(sum)) {
        std::printf("not finite: %d channels, %dx%d, kernel %d, stride %d\n", shape.c, shape.h, shape.w,
                    shape.kernel, shape.stride);
        return 1;
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    emulator::mode = emulator::Mode::concurrent;
    if (count > 1) {
        emulator::skipped_barrier = std::atoi(arguments[1]);
    }
#if defined(__SANITIZE_THREAD__)
    // A launch takes most of a second under ThreadSanitizer.
    const Shape convolutions[] = {{1, 8, 5, 6, 3, 1, 1, 0}, {1, 1, 5, 6, 3, 1, 1, 0, true}};
    const Shape sequences[] = {{2, 8, 5, 5, 3, 1, 1, 0}, {2, 1, 5, 6, 3, 1, 1, 0, true}};
#else
    const Shape convolutions[] = {
        {2, 1, 3, 3, 3, 1, 1, 0},       {2, 1, 5, 7, 3, 1, 1, 0},         {1, 3, 7, 5, 3, 2, 1, 0},
        {2, 8, 5, 6, 3, 1, 2, 8},       {1, 8, 6, 5, 3, 2, 0, 3},         {1, 12, 5, 9, 5, 1, 2, 0},
        {1, 6, 7, 8, 5, 2, 4, 0},       {1, 8, 8, 9, 7, 1, 3, 0},         {1, 4, 9, 8, 7, 2, 3, 2},
        {1, 280, 3, 3, 3, 1, 1, 0},     {2, 2, 5, 7, 3, 1, 1, 0, true},   {1, 2, 7, 8, 3, 2, 1, 4, true},
        {1, 2, 5, 8, 5, 1, 2, 0, true}, {2, 1, 7, 8, 5, 2, 4, 0, true},   {1, 2, 8, 12, 7, 1, 3, 2, true},
        {1, 1, 9, 8, 7, 2, 3, 0, true}, {1, 1, 3, 200, 3, 1, 2, 0, true}, {9, 1, 3, 3, 3, 1, 0, 1, true}};
    const Shape sequences[] = {{2, 8, 5, 5, 3, 1, 1, 0},       {2, 5, 6, 7, 5, 2, 2, 0},
                               {1, 6, 7, 8, 7, 1, 3, 0},       {2, 2, 4, 8, 3, 1, 1, 0, true},
                               {2, 2, 6, 7, 5, 2, 2, 0, true}, {1, 2, 7, 8, 7, 1, 3, 0, true}};
#endif
    int failures = 0;
    for (const Shape& shape : convolutions) {
        failures += check_convolution(shape);
    }
    for (const Shape& shape : sequences) {
        failures += check_finite(shape, NormPlacement::pre, ResidualMode::none);
        failures += check_finite(shape, NormPlacement::post, ResidualMode::before);
    }
    std::printf(failures == 0 ? "right\n" : "%d failures\n", failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
