// Merges what the blocks of the low-resolution backward have written, in a fixed order: results repeat to the
// bit.
//
//     sums       a block adds up 32 columns of the parts, 8 of these at a time, as they lie in memory
//     layers     a block takes 16 channels, 16 hidden units at a time: fc1's gradient, and the norm's two
//     sums shared memory   one or two values per thread
#include "../common/matrix.h"
#include "plan.h"

namespace fused_ops {

namespace {

using namespace hr_chain;

constexpr int THREADS = 256;
constexpr int COLUMNS = 32;
constexpr int CHANNELS = 16;

FUSED_OPS_DEVICE float load_float(const float* address) {
    return load_vector<float, 1>(address).elements[0];
}

// Adds up what the threads of a column of the block hold, LANES threads side by side; every thread gets the
// sum.
template <int LANES>
FUSED_OPS_DEVICE float sum_of_column(float* shared, float value) {
    // The previous sum may still be read.
    __syncthreads();
    shared[threadIdx.x] = value;
    __syncthreads();
    float sum = 0.0f;
    FUSED_OPS_UNROLL
    for (int group = 0; group < THREADS / LANES; ++group) {
        sum += shared[group * LANES + threadIdx.x % LANES];
    }
    return sum;
}

// Columns: fc1's sums (hidden, channels), fc2's transposed gradient (hidden, channels), fc1's bias (hidden).
__global__ void __launch_bounds__(THREADS) hr_chain_sums(const __grid_constant__ FinishArguments arguments) {
    __shared__ float shared[THREADS];
    const HRChainBackwardParams& params = arguments.params;
    const int64_t matrix = params.problem.hidden * params.problem.channels;
    const int64_t column = int64_t{blockIdx.x} * COLUMNS + threadIdx.x % COLUMNS;
    const int which = column < matrix ? 0 : column < 2 * matrix ? 1 : 2;
    const float* const parts = which == 0   ? arguments.parts_fc1
                               : which == 1 ? arguments.parts_fc2
                                            : arguments.parts_bias;
    const int64_t width = which == 2 ? params.problem.hidden : matrix;
    const int64_t own = column - which * matrix;
    const bool active = own < width;
    float sum = 0.0f;
    if (active) {
        for (uint32_t part = threadIdx.x / COLUMNS; part < arguments.parts; part += THREADS / COLUMNS) {
            sum += load_float(parts + part * width + own);
        }
    }
    sum = sum_of_column<COLUMNS>(shared, sum);
    if (!active || threadIdx.x >= COLUMNS) {
        return;
    }
    const Vector<float, 1> total{{sum}};
    if (which == 0) {
        store_vector(arguments.fc1_sums + own, total);
    } else if (which == 1) {
        if (params.fc2_weight_grad.data != nullptr) {
            const int64_t channel = own % params.problem.channels;
            const int64_t unit = own / params.problem.channels;
            store_element(params.fc2_weight_grad.data, params.fc2_weight_grad.type,
                          channel * params.problem.hidden + unit, sum);
        }
    } else {
        store_vector(arguments.bias_sums + own, total);
        if (params.fc1_bias_grad.data != nullptr) {
            store_element(params.fc1_bias_grad.data, params.fc1_bias_grad.type,
                          own * params.fc1_bias_grad.stride, sum);
        }
    }
}

// fc1's sums are with normalised values, so that fc1's gradient, and what the norm sums over all pixels,
// follow.
__global__ void __launch_bounds__(THREADS)
    hr_chain_layers(const __grid_constant__ FinishArguments arguments) {
    __shared__ float shared[THREADS];
    const HRChainBackwardParams& params = arguments.params;
    const HRChainProblem& p = params.problem;
    const int64_t channel = int64_t{blockIdx.x} * CHANNELS + threadIdx.x % CHANNELS;
    const bool active = channel < p.channels;
    const auto value = [&](const ChannelValues& values, float otherwise) {
        return active && values.data != nullptr
                   ? load_element(values.data, values.type, channel * values.stride)
                   : otherwise;
    };
    const float weight = value(p.norm_weight, 1.0f);
    const float bias = value(p.norm_bias, 0.0f);
    float sum = 0.0f;
    float sum_normalised = 0.0f;
    for (int64_t unit = threadIdx.x / CHANNELS; active && unit < p.hidden; unit += THREADS / CHANNELS) {
        const int64_t index = unit * p.channels + channel;
        const float of_fc1 = load_float(arguments.fc1_sums + index);
        const float of_bias = load_float(arguments.bias_sums + unit);
        const float fc1 = load_element(p.fc1.data, p.fc1.type, index);
        sum += fc1 * of_bias;
        sum_normalised += fc1 * of_fc1;
        if (params.fc1_weight_grad.data != nullptr) {
            store_element(params.fc1_weight_grad.data, params.fc1_weight_grad.type, index,
                          of_fc1 * weight + of_bias * bias);
        }
    }
    sum = sum_of_column<CHANNELS>(shared, sum);
    sum_normalised = sum_of_column<CHANNELS>(shared, sum_normalised);
    if (!active || threadIdx.x >= CHANNELS) {
        return;
    }
    store_vector(arguments.sums + channel, Vector<float, 1>{{sum}});
    store_vector(arguments.sums + p.channels + channel, Vector<float, 1>{{sum_normalised}});
    const auto put = [&](const ChannelValues& target, float result) {
        if (target.data != nullptr) {
            store_element(target.data, target.type, channel * target.stride, result);
        }
    };
    put(params.norm_bias_grad, sum);
    put(params.norm_weight_grad, sum_normalised);
}

}  // namespace

namespace hr_chain {

const char* launch_finish(const FinishArguments& arguments, void* stream) {
    const HRChainProblem& p = arguments.params.problem;
    const int64_t columns = p.hidden * (2 * p.channels + 1);
    const char* const error = launch_kernel("hr_chain_sums", hr_chain_sums,
                                            static_cast<uint32_t>((columns + COLUMNS - 1) / COLUMNS), THREADS,
                                            0, stream, arguments);
    if (error != nullptr) {
        return error;
    }
    return launch_kernel("hr_chain_layers", hr_chain_layers,
                         static_cast<uint32_t>((p.channels + CHANNELS - 1) / CHANNELS), THREADS, 0, stream,
                         arguments);
}

}  // namespace hr_chain

}  // namespace fused_ops
