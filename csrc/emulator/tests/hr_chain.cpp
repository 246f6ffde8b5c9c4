// The HR chain's launch sequences on OS threads, for the sanitizers: maps are allocated exactly, so
// AddressSanitizer sees any access outside them, and are odd, strided, and of numbers of channels that fill
// no vector. Results must be those of the same kernels as coroutines, which the Python tests check against
// the definition, to the bit.
//
// With a number as argument, every launch passes the barrier of that number in each block without waiting:
// ThreadSanitizer must report a race.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../common/scalar.h"
#include "../../hr_chain/params.h"
#include "../emulator.h"

using namespace fused_ops;

namespace {

using T = float16;

struct Shape {
    int n, c, h, w, hidden;
    int spare;  // maps are slices of ones with this many more channels
    bool batch_stats;
};

class Run {
  public:
    explicit Run(const Shape& shape) : shape_(shape), generator_(0) {}

    // Every result of a forward and a backward pass, as floats; empty after an error.
    std::vector<float> results(emulator::Mode mode) {
        emulator::mode = mode;
        generator_.seed(0);
        const int low_h = (shape_.h + 1) / 2;
        const int low_w = (shape_.w + 1) / 2;
        const int c = shape_.c;
        const int matrix = c * shape_.hidden;
        std::vector<T> x = halves(pixels(shape_.h, shape_.w, shape_.spare));
        std::vector<T> grad = halves(pixels(shape_.h, shape_.w, shape_.spare));
        std::vector<T> fc1 = halves(matrix), fc2 = halves(matrix);
        std::vector<T> out(pixels(shape_.h, shape_.w, 0)), x_grad(out.size());
        std::vector<T> low(pixels(low_h, low_w, 0)), low_grad(low.size());
        std::vector<float> filters[] = {floats(9 * c), floats(9 * c)};
        std::vector<float> vectors[] = {floats(c), floats(shape_.hidden), floats(c), floats(c), floats(c)};
        std::vector<float> mean(c, 0.1f), var(c, 1.5f), unbiased(c), drop_path(shape_.n, 1.25f);

        HRChainForwardParams forward{};
        HRChainProblem& p = forward.problem;
        p.batch = shape_.n;
        p.channels = c;
        p.height = shape_.h;
        p.width = shape_.w;
        p.hidden = shape_.hidden;
        p.low_height = low_h;
        p.low_width = low_w;
        p.type = ScalarType::float16;
        p.batch_stats = shape_.batch_stats;
        p.eps = 1e-5f;
        p.activation = Activation::gelu;
        p.identity = true;
        p.x = map(x, shape_.h, shape_.w, shape_.spare);
        p.high_weight = filter(filters[0]);
        p.low_weight = filter(filters[1]);
        p.high_bias = values(vectors[0]);
        p.fc1_bias = values(vectors[1]);
        p.fc2_bias = values(vectors[2]);
        p.norm_weight = values(vectors[3]);
        p.norm_bias = values(vectors[4]);
        p.mean = values(mean);
        p.var = values(var);
        p.drop_path = values(drop_path);
        p.fc1 = {fc1.data(), ScalarType::float16};
        p.fc2 = {fc2.data(), ScalarType::float16};
        p.stages = STATISTICS_STAGE | RESULT_STAGE;
        forward.out = map(out, shape_.h, shape_.w, 0);
        forward.low = map(low, low_h, low_w, 0);
        forward.unbiased_var = unbiased.data();
        int64_t count = 0;
        const char* error = hr_chain_forward_workspace(forward, count);
        std::vector<float> forward_memory(count, std::nanf(""));
        p.workspace = forward_memory.data();
        error = error != nullptr ? error : launch_hr_chain_forward(forward, nullptr);

        std::vector<float> filter_grads[] = {std::vector<float>(9 * c), std::vector<float>(9 * c)};
        std::vector<float> matrix_grads[] = {std::vector<float>(matrix), std::vector<float>(matrix)};
        std::vector<float> vector_grads[] = {std::vector<float>(c), std::vector<float>(shape_.hidden),
                                             std::vector<float>(c), std::vector<float>(c),
                                             std::vector<float>(c)};
        HRChainBackwardParams backward{};
        backward.problem = p;
        backward.grad = map(grad, shape_.h, shape_.w, shape_.spare);
        backward.low = map(low, low_h, low_w, 0);
        backward.low_grad = map(low_grad, low_h, low_w, 0);
        backward.x_grad = map(x_grad, shape_.h, shape_.w, 0);
        backward.high_weight_grad = filter(filter_grads[0]);
        backward.low_weight_grad = filter(filter_grads[1]);
        backward.fc1_weight_grad = {matrix_grads[0].data(), ScalarType::float32};
        backward.fc2_weight_grad = {matrix_grads[1].data(), ScalarType::float32};
        backward.high_bias_grad = values(vector_grads[0]);
        backward.fc1_bias_grad = values(vector_grads[1]);
        backward.fc2_bias_grad = values(vector_grads[2]);
        backward.norm_weight_grad = values(vector_grads[3]);
        backward.norm_bias_grad = values(vector_grads[4]);
        if (error == nullptr) {
            error = hr_chain_backward_workspace(backward, count);
        }
        std::vector<float> memory(count, std::nanf(""));
        backward.problem.workspace = memory.data();
        error = error != nullptr ? error : launch_hr_chain_backward(backward, nullptr);
        if (error != nullptr) {
            std::printf("%s\n", error);
            return {};
        }

        std::vector<float> all;
        for (const auto* half : {&out, &low, &low_grad, &x_grad}) {
            for (const T value : *half) {
                all.push_back(to_float(value));
            }
        }
        const auto add = [&](const std::vector<float>& more) {
            all.insert(all.end(), more.begin(), more.end());
        };
        add(unbiased);
        for (int i = 0; i < 2; ++i) {
            add(filter_grads[i]);
            add(matrix_grads[i]);
        }
        for (const std::vector<float>& gradient : vector_grads) {
            add(gradient);
        }
        return all;
    }

  private:
    size_t pixels(int h, int w, int spare) const {
        return static_cast<size_t>(shape_.n) * h * w * (shape_.c + spare) - spare;
    }
    float random_value() { return 0.5f * std::normal_distribution<float>()(generator_); }
    std::vector<T> halves(size_t count) {
        std::vector<T> result(count);
        for (T& value : result) {
            value = from_float<T>(random_value());
        }
        return result;
    }
    std::vector<float> floats(size_t count) {
        std::vector<float> result(count);
        for (float& value : result) {
            value = random_value();
        }
        return result;
    }
    Map map(std::vector<T>& of, int h, int w, int spare) const {
        const int64_t pixel = shape_.c + spare;
        return {of.data(), {pixel * h * w, 1, pixel * w, pixel}};
    }
    static DepthwiseWeight filter(std::vector<float>& of) {
        return {of.data(), ScalarType::float32, 9, 3, 1};
    }
    static ChannelValues values(std::vector<float>& of) { return {of.data(), ScalarType::float32, 1}; }

    Shape shape_;
    std::mt19937 generator_;
};

bool check(const Shape& shape) {
    Run run(shape);
    const std::vector<float> concurrent = run.results(emulator::Mode::concurrent);
    const std::vector<float> sequential = run.results(emulator::Mode::sequential);
    for (size_t i = 0; i < sequential.size() && i < concurrent.size(); ++i) {
        if (!(concurrent[i] == sequential[i])) {
            std::printf("%d channels, %d x %d: value %zu is %g and not %g\n", shape.c, shape.h, shape.w, i,
                        concurrent[i], sequential[i]);
            return false;
        }
    }
    return !sequential.empty() && sequential.size() == concurrent.size();
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1) {
        emulator::skipped_barrier = std::atoi(arguments[1]);
    }
    emulator::multiprocessors = 4;
#if defined(__SANITIZE_THREAD__)
    // A launch takes seconds under ThreadSanitizer. 18 tiles of 32 pixels are several rounds of a cluster;
    // hidden units beyond 128 with more than 64 channels are several slices.
    const Shape shapes[] = {{3, 8, 28, 26, 16, 0, true}, {1, 66, 6, 4, 136, 0, false}};
#else
    const Shape shapes[] = {{1, 1, 3, 3, 8, 0, true},
                            {2, 5, 9, 7, 24, 3, true},
                            {3, 8, 28, 26, 16, 0, true},
                            {1, 33, 5, 6, 40, 0, false},
                            {1, 66, 6, 4, 136, 8, false}};
#endif
    int failures = 0;
    for (const Shape& shape : shapes) {
        failures += check(shape) ? 0 : 1;
    }
    std::printf(failures == 0 ? "right\n" : "%d failures\n", failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
