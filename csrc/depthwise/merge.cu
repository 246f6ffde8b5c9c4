// Merges what the blocks of a launch have written, part by part, in a fixed order: results repeat to the bit.
//
//     tile of a block    16 channels of one row, all parts
//     block of threads   16 threads side by side over channels times 16 over parts; a thread takes every
//                        16th part, then the 16 results are merged in their order
//     shared memory      one value per thread
#include "../common/portability.h"
#include "../common/vector.h"
#include "plan.h"

namespace fused_ops {

namespace {

using namespace depthwise;

constexpr uint32_t LANES = 16;
constexpr uint32_t GROUPS = 16;

FUSED_OPS_DEVICE float load_float(const float* address) {
    return load_vector<float, 1>(address).elements[0];
}

// Adds up the values that the threads of a column of the block hold; every thread gets the sum.
FUSED_OPS_DEVICE float sum_of_groups(float (&values)[GROUPS][LANES], float value) {
    const uint32_t lane = threadIdx.x % LANES;
    // The previous round may still be read.
    __syncthreads();
    values[threadIdx.x / LANES][lane] = value;
    __syncthreads();
    float sum = 0.0f;
    FUSED_OPS_UNROLL
    for (uint32_t group = 0; group < GROUPS; ++group) {
        sum += values[group][lane];
    }
    return sum;
}

// (count (parts), mean and M2 (parts, channels)) of disjoint sets -> mean, biased and unbiased variance of
// their union. Never a difference of large sums, so that a mean far above the deviation does no harm.
__global__ void __launch_bounds__(LANES* GROUPS)
    merge_moments(const __grid_constant__ MergeMomentsArguments arguments) {
    __shared__ float values[GROUPS][LANES];
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * LANES + threadIdx.x % LANES;
    const uint32_t group = threadIdx.x / LANES;
    const bool active = channel < arguments.channels;
    // Deviations from one part's mean keep the sums small where all means are large.
    const float first = active ? load_float(arguments.mean + channel) : 0.0f;
    float sum = 0.0f;
    for (uint32_t part = active ? group : arguments.parts; part < arguments.parts; part += GROUPS) {
        const int64_t index = static_cast<int64_t>(part) * arguments.channels + channel;
        sum += load_float(arguments.count + part) * (load_float(arguments.mean + index) - first);
    }
    const float mean = first + sum_of_groups(values, sum) / arguments.total;
    float m2 = 0.0f;
    for (uint32_t part = active ? group : arguments.parts; part < arguments.parts; part += GROUPS) {
        const int64_t index = static_cast<int64_t>(part) * arguments.channels + channel;
        const float deviation = load_float(arguments.mean + index) - mean;
        m2 += load_float(arguments.m2 + index) + load_float(arguments.count + part) * deviation * deviation;
    }
    m2 = sum_of_groups(values, m2);
    if (active && group == 0) {
        store_element(arguments.out_mean.data, arguments.out_mean.type, channel * arguments.out_mean.stride,
                      mean);
        store_element(arguments.out_var.data, arguments.out_var.type, channel * arguments.out_var.stride,
                      m2 / arguments.total);
        store_element(arguments.out_unbiased, ScalarType::float32, channel, m2 / (arguments.total - 1.0f));
    }
}

// parts (count, rows, channels) -> their sums, each row to where it belongs, in that tensor's type.
__global__ void __launch_bounds__(LANES* GROUPS)
    merge_sums(const __grid_constant__ MergeSumsArguments arguments) {
    __shared__ float values[GROUPS][LANES];
    const uint32_t rows = arguments.weight_rows + arguments.bias_rows + arguments.sum_rows;
    const uint32_t row = blockIdx.x % rows;
    const int64_t channel = static_cast<int64_t>(blockIdx.x / rows) * LANES + threadIdx.x % LANES;
    const uint32_t group = threadIdx.x / LANES;
    const bool active = channel < arguments.channels;
    float sum = 0.0f;
    for (uint32_t part = active ? group : arguments.count; part < arguments.count; part += GROUPS) {
        sum += load_float(arguments.parts + (static_cast<int64_t>(part) * rows + row) * arguments.channels +
                          channel);
    }
    sum = sum_of_groups(values, sum);
    if (!active || group != 0) {
        return;
    }
    const auto put = [&](const ChannelValues& target) {
        if (target.data != nullptr) {
            store_element(target.data, target.type, channel * target.stride, sum);
        }
    };
    if (row < arguments.weight_rows) {
        const DepthwiseWeight& weight = arguments.weight;
        store_element(weight.data, weight.type,
                      channel * weight.c_stride + (row / arguments.kernel) * weight.h_stride +
                          (row % arguments.kernel) * weight.w_stride,
                      sum);
    } else if (row < arguments.weight_rows + arguments.bias_rows) {
        put(arguments.bias);
    } else {
        const uint32_t which = row - arguments.weight_rows - arguments.bias_rows;
        put(which == 0 ? arguments.norm_bias : arguments.norm_weight);
        if (arguments.sums != nullptr) {
            store_element(arguments.sums, ScalarType::float32, which * arguments.channels + channel, sum);
        }
    }
}

uint32_t channel_blocks(int64_t channels) {
    return static_cast<uint32_t>((channels + LANES - 1) / LANES);
}

}  // namespace

namespace depthwise {

const char* launch_merge_moments(const MergeMomentsArguments& arguments, void* stream) {
    return launch_kernel("merge_moments", merge_moments, channel_blocks(arguments.channels), LANES * GROUPS,
                         0, stream, arguments);
}

const char* launch_merge_sums(const MergeSumsArguments& arguments, void* stream) {
    const uint32_t rows = arguments.weight_rows + arguments.bias_rows + arguments.sum_rows;
    return launch_kernel("merge_sums", merge_sums, channel_blocks(arguments.channels) * rows, LANES * GROUPS,
                         0, stream, arguments);
}

}  // namespace depthwise

}  // namespace fused_ops
