// What the depthwise kernels share on the device: per-channel constants in shared memory, and the sums of a
// thread block over its walkers in a fixed order.
#pragma once

#include "../common/activation.h"
#include "../common/portability.h"
#include "../common/vector.h"
#include "plan.h"

namespace fused_ops::depthwise {

// Per-channel constants of a block, V per lane. A lane reads PART floats at once; the parts of neighbouring
// lanes are neighbours, so that 16-byte reads of a quarter of a warp touch every bank once.
template <int V>
struct ChannelTable {
    static constexpr int PART = V < 4 ? V : 4;
    static constexpr int PARTS = V / PART;

    alignas(16) float values[CHANNEL_LANES * V];

    // The value of channel `channel`, counted from the block's first.
    FUSED_OPS_DEVICE float& at(int channel) {
        const int lane = channel / V;
        const int v = channel % V;
        return values[((v / PART) * CHANNEL_LANES + lane) * PART + v % PART];
    }

    FUSED_OPS_DEVICE void read(int part, int lane, float (&result)[PART]) const {
        struct alignas(PART * sizeof(float)) Block {
            float values[PART];
        };
        const Block block = *reinterpret_cast<const Block*>(values + (part * CHANNEL_LANES + lane) * PART);
        FUSED_OPS_UNROLL
        for (int q = 0; q < PART; ++q) {
            result[q] = block.values[q];
        }
    }

    // The lane's values; of one channel as often as asked for, once for every column that it has.
    template <int COUNT>
    FUSED_OPS_DEVICE void read_all(int lane, float (&result)[COUNT]) const {
        static_assert(COUNT == V || V == 1);
        FUSED_OPS_UNROLL
        for (int part = 0; part < PARTS; ++part) {
            float values_of_part[PART];
            read(part, lane, values_of_part);
            FUSED_OPS_UNROLL
            for (int q = 0; q < COUNT / PARTS; ++q) {
                result[part * PART + q] = values_of_part[q % PART];
            }
        }
    }
};

FUSED_OPS_DEVICE float channel_value(const ChannelValues& values, int64_t channel, float otherwise) {
    return values.data == nullptr ? otherwise
                                  : load_element(values.data, values.type, channel * values.stride);
}

FUSED_OPS_DEVICE float reciprocal_deviation(const ChannelValues& var, int64_t channel, float eps) {
    return 1.0f / sqrtf(channel_value(var, channel, 1.0f) + eps);
}

// In elements. The channel's stride is 1, or on planes the column's.
template <bool PLANES = false>
FUSED_OPS_DEVICE int64_t map_offset(const MapStrides& strides, int64_t image, int64_t row, int64_t column,
                                    int64_t channel) {
    return image * strides.n + row * strides.h +
           (PLANES ? channel * strides.c + column : column * strides.w + channel);
}

template <typename T, bool PLANES = false>
FUSED_OPS_DEVICE const T* map_address(const Map& map, int64_t image, int64_t row, int64_t column,
                                      int64_t channel) {
    return static_cast<const T*>(map.data) + map_offset<PLANES>(map.strides, image, row, column, channel);
}

template <typename T, bool PLANES = false>
FUSED_OPS_DEVICE T* mutable_address(const Map& map, int64_t image, int64_t row, int64_t column,
                                    int64_t channel) {
    return static_cast<T*>(map.data) + map_offset<PLANES>(map.strides, image, row, column, channel);
}

FUSED_OPS_DEVICE float weight_value(const DepthwiseWeight& weight, int64_t channel, int row, int column) {
    return load_element(weight.data, weight.type,
                        channel * weight.c_stride + row * weight.h_stride + column * weight.w_stride);
}

// The operator's last step: the activation of `values`, with the residual `added` before or after it.
template <typename T, int V>
FUSED_OPS_DEVICE Vector<T, V> activate_with_residual(float (&values)[V], const Vector<T, V>& added,
                                                     ResidualMode mode, Activation activation) {
    const auto add = [&] {
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            values[v] += to_float(added.elements[v]);
        }
    };
    if (mode == ResidualMode::before) {
        add();
    }
    activate_all(values, activation);
    if (mode == ResidualMode::after) {
        add();
    }
    Vector<T, V> result;
    FUSED_OPS_UNROLL
    for (int v = 0; v < V; ++v) {
        result.elements[v] = from_float<T>(values[v]);
    }
    return result;
}

// The gradient on its way back from the output to the convolution. With c = value - mean: BatchNorm is
// c scale + beta, its normalised value c rstd, and the gradient in front of it scale g - offset - c slope,
// where offset and slope carry what passes through the batch's mean and variance.
template <int V>
struct NormGradient {
    ChannelTable<V> mean, rstd, scale, beta, offset, slope;

    // Channel `channel`, which is number i of the block. `sums` (2, channels) are those of the norm's
    // gradient, for one by batch statistics after the convolution.
    FUSED_OPS_DEVICE void fill(int i, int64_t channel, const DepthwiseProblem& p, const float* sums,
                               float inverse_count) {
        const float channel_rstd = reciprocal_deviation(p.var, channel, p.eps);
        const float channel_scale = channel_value(p.norm_weight, channel, 1.0f) * channel_rstd;
        mean.at(i) = channel_value(p.mean, channel, 0.0f);
        rstd.at(i) = channel_rstd;
        scale.at(i) = channel_scale;
        beta.at(i) = channel_value(p.norm_bias, channel, 0.0f);
        offset.at(i) = 0.0f;
        slope.at(i) = 0.0f;
        if (p.norm == NormPlacement::post && p.batch_stats) {
            const float mean_scale = inverse_count * channel_scale;
            offset.at(i) = load_vector<float, 1>(sums + channel).elements[0] * mean_scale;
            slope.at(i) =
                load_vector<float, 1>(sums + p.channels + channel).elements[0] * mean_scale * channel_rstd;
        }
    }

    // The gradient before the activation at COUNT positions or channels, and c there.
    template <typename T, int COUNT, typename Added>
    FUSED_OPS_DEVICE void before_activation(int lane, const DepthwiseProblem& p, const Vector<T, COUNT>& grad,
                                            const Vector<T, COUNT>& raw, const Added& load_added,
                                            float (&value_grad)[COUNT], float (&centred)[COUNT]) const {
        float value[COUNT];
        FUSED_OPS_UNROLL
        for (int v = 0; v < COUNT; ++v) {
            value_grad[v] = to_float(grad.elements[v]);
            value[v] = to_float(raw.elements[v]);
            centred[v] = 0.0f;
        }
        if (p.norm == NormPlacement::post) {
            float own_mean[COUNT], own_scale[COUNT], own_beta[COUNT];
            mean.read_all(lane, own_mean);
            scale.read_all(lane, own_scale);
            beta.read_all(lane, own_beta);
            FUSED_OPS_UNROLL
            for (int v = 0; v < COUNT; ++v) {
                centred[v] = value[v] - own_mean[v];
                value[v] = centred[v] * own_scale[v] + own_beta[v];
            }
        }
        if (p.residual_mode == ResidualMode::before && p.activation != Activation::none) {
            const Vector<T, COUNT> added = load_added();
            FUSED_OPS_UNROLL
            for (int v = 0; v < COUNT; ++v) {
                value[v] += to_float(added.elements[v]);
            }
        }
        multiply_activation_gradient(value_grad, value, p.activation);
    }

    // From there on through a norm after the convolution, in place.
    template <int COUNT>
    FUSED_OPS_DEVICE void before_norm(int lane, float (&grads)[COUNT], const float (&centred)[COUNT]) const {
        float own_scale[COUNT], own_offset[COUNT], own_slope[COUNT];
        scale.read_all(lane, own_scale);
        offset.read_all(lane, own_offset);
        slope.read_all(lane, own_slope);
        FUSED_OPS_UNROLL
        for (int v = 0; v < COUNT; ++v) {
            grads[v] = grads[v] * own_scale[v] - own_offset[v] - centred[v] * own_slope[v];
        }
    }
};

// Sums of a thread's values relative to its first one, so that a large mean costs no digits.
struct RunningMoments {
    float first = 0.0f, sum = 0.0f, sum_of_squares = 0.0f;

    FUSED_OPS_DEVICE void add(float value, bool is_first) {
        first = is_first ? value : first;
        const float difference = value - first;
        sum += difference;
        sum_of_squares += difference * difference;
    }

    // Mean, less `reference`, and sum of squared deviations of `count` values; finite for none.
    FUSED_OPS_DEVICE void finish(float count, float& mean, float& m2, float reference = 0.0f) const {
        const float shifted = count > 0.0f ? sum / count : 0.0f;
        mean = (first - reference) + shifted;
        m2 = sum_of_squares - sum * shifted;
    }
};

// V neighbouring floats of shared memory, in one access.
template <int V>
FUSED_OPS_DEVICE void read_shared(const float* address, float (&result)[V]) {
    constexpr int PART = V < 4 ? V : 4;
    struct alignas(PART * sizeof(float)) Block {
        float values[PART];
    };
    FUSED_OPS_UNROLL
    for (int part = 0; part < V / PART; ++part) {
        const Block block = reinterpret_cast<const Block*>(address)[part];
        FUSED_OPS_UNROLL
        for (int q = 0; q < PART; ++q) {
            result[part * PART + q] = block.values[q];
        }
    }
}

template <int V>
FUSED_OPS_DEVICE void write_shared(float* address, const float (&source)[V]) {
    constexpr int PART = V < 4 ? V : 4;
    struct alignas(PART * sizeof(float)) Block {
        float values[PART];
    };
    FUSED_OPS_UNROLL
    for (int part = 0; part < V / PART; ++part) {
        Block block;
        FUSED_OPS_UNROLL
        for (int q = 0; q < PART; ++q) {
            block.values[q] = source[part * PART + q];
        }
        reinterpret_cast<Block*>(address)[part] = block;
    }
}

FUSED_OPS_DEVICE void store_float(float* address, float value) {
    store_vector<float, 1>(address, Vector<float, 1>{{value}});
}

// Shared memory in which the walkers of a block put their moments side by side.
template <int V>
struct MomentsExchange {
    alignas(16) float mean[THREADS * V];
    alignas(16) float m2[THREADS * V];
    float count[THREADS];
};

// Merges the moments of a block's walkers, in the order of the walkers, and writes them as part `part`.
// Threads without elements pass count 0 and finite moments; walker 0 always has some. All threads call it.
template <int V>
FUSED_OPS_DEVICE void store_moments(MomentsExchange<V>& shared, const ChannelCut& cut, uint32_t walkers,
                                    uint32_t part, uint32_t channel_block, int64_t channels, float count,
                                    const float (&mean)[V], const float (&m2)[V], float* part_count,
                                    float* part_mean, float* part_m2) {
    const uint32_t width = cut.lanes * V;
    if (threadIdx.x < walkers * cut.lanes) {
        // The first lane of a walker always has a channel, so its count is that of the walker.
        if (threadIdx.x % cut.lanes == 0) {
            shared.count[threadIdx.x / cut.lanes] = count;
        }
        write_shared(shared.mean + threadIdx.x * V, mean);
        write_shared(shared.m2 + threadIdx.x * V, m2);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        const int64_t channel = static_cast<int64_t>(channel_block) * width + i;
        if (channel >= channels) {
            break;
        }
        // Deviations from one walker's mean keep the sums small where all means are large.
        const float first = shared.mean[i];
        float total = 0.0f;
        float sum = 0.0f;
        for (uint32_t walker = 0; walker < walkers; ++walker) {
            const float n = shared.count[walker];
            total += n;
            sum += n * (shared.mean[walker * width + i] - first);
        }
        const float merged = first + sum / total;
        float merged_m2 = 0.0f;
        for (uint32_t walker = 0; walker < walkers; ++walker) {
            const float deviation = shared.mean[walker * width + i] - merged;
            merged_m2 += shared.m2[walker * width + i] + shared.count[walker] * deviation * deviation;
        }
        const int64_t index = static_cast<int64_t>(part) * channels + channel;
        store_float(part_mean + index, merged);
        store_float(part_m2 + index, merged_m2);
        if (channel == 0) {
            store_float(part_count + part, total);
        }
    }
}

// Adds up the rows of sums that the walkers of a block hold, in the order of the walkers, and writes them as
// part `part`: TAPS rows of weight gradients if `weight_rows`, then of `own` the first if `bias_rows`, then
// the other two if `sum_rows`. `buffer` is shared memory of `capacity` >= THREADS * V floats; as many rows as
// fit in it go together. All threads call it, those without elements with zeros.
template <int V, int TAPS>
FUSED_OPS_DEVICE void store_sums(float* buffer, uint32_t capacity, const float (&taps)[TAPS][V],
                                 const float (&own)[3][V], uint32_t weight_rows, uint32_t bias_rows,
                                 uint32_t sum_rows, const ChannelCut& cut, uint32_t walkers, uint32_t part,
                                 uint32_t channel_block, int64_t channels, float* parts) {
    const uint32_t width = cut.lanes * V;
    const uint32_t row_floats = walkers * width;
    const uint32_t rows = weight_rows + bias_rows + sum_rows;
    const uint32_t rows_at_once = capacity / row_floats;
    for (uint32_t begin = 0; begin < rows; begin += rows_at_once) {
        const uint32_t end = begin + rows_at_once < rows ? begin + rows_at_once : rows;
        float* const mine = buffer + threadIdx.x * V;
        // The buffer may still be read: by the previous round, or by what the kernel kept in it.
        __syncthreads();
        if (threadIdx.x < walkers * cut.lanes) {
            const auto put = [&](uint32_t row, const float (&values)[V]) {
                if (row >= begin && row < end) {
                    write_shared(mine + (row - begin) * row_floats, values);
                }
            };
            if (weight_rows != 0) {
                FUSED_OPS_UNROLL
                for (int tap = 0; tap < TAPS; ++tap) {
                    put(tap, taps[tap]);
                }
            }
            if (bias_rows != 0) {
                put(weight_rows, own[0]);
            }
            if (sum_rows != 0) {
                put(weight_rows + bias_rows, own[1]);
                put(weight_rows + bias_rows + 1, own[2]);
            }
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < (end - begin) * width; i += THREADS) {
            const uint32_t row = i / width;
            const uint32_t offset = i - row * width;
            const int64_t channel = static_cast<int64_t>(channel_block) * width + offset;
            if (channel < channels) {
                const float* column = buffer + row * row_floats + offset;
                float sum = 0.0f;
                for (uint32_t walker = 0; walker < walkers; ++walker) {
                    sum += column[walker * width];
                }
                store_float(parts + (static_cast<int64_t>(part) * rows + begin + row) * channels + channel,
                            sum);
            }
        }
    }
}

}  // namespace fused_ops::depthwise
