// The passes of the depthwise operator that don't convolve: moments of the input, norm with activation and
// residual after batch statistics are known, the two sums of the norm's gradient, and what they add to x's
// gradient.
//
//     tile of a thread    iterations positions, `walkers` apart, x V channels
//     block of threads    lanes (<= 16) threads side by side over channels, times walkers (128 / lanes)
//                         neighbouring positions
//     shared memory       the affine vectors of the block's channels, and the block's sums
//
// Positions are counted over (image, row, column), so that narrow maps fill the blocks too. On PLANES (NCHW
// maps) a position is V neighbouring columns, and a block has one channel: lanes is 1 and walkers 128.
#include "planes.h"
#include "unit.h"

namespace fused_ops {

namespace {

using namespace depthwise;

// The positions of one thread, one after the other.
struct Walk {
    int64_t image;
    uint32_t row, column;
    uint32_t left;

    FUSED_OPS_DEVICE Walk(const PointwiseArguments& arguments, uint32_t part, uint32_t walker) {
        const int64_t first = static_cast<int64_t>(part) * arguments.walkers * arguments.iterations + walker;
        const int64_t image_row = first / arguments.width;
        column = static_cast<uint32_t>(first - image_row * arguments.width);
        image = image_row / arguments.height;
        row = static_cast<uint32_t>(image_row - image * arguments.height);
        const int64_t after = arguments.positions - first + arguments.walkers - 1;
        const int64_t count = after < 0 ? 0 : after / arguments.walkers;
        left = count < arguments.iterations ? static_cast<uint32_t>(count) : arguments.iterations;
    }

    FUSED_OPS_DEVICE void advance(const PointwiseArguments& arguments) {
        --left;
        column += arguments.step_w;
        row += arguments.step_h;
        image += arguments.step_n;
        if (column >= arguments.width) {
            column -= arguments.width;
            ++row;
        }
        if (row >= arguments.height) {
            row -= arguments.height;
            ++image;
        }
    }
};

// Which channels and positions a thread has.
struct Place {
    uint32_t channel_block, part, lane, walker;
    int64_t channel;
    bool active;

    template <int CHANNELS>
    static FUSED_OPS_DEVICE Place of(const PointwiseArguments& arguments) {
        const ChannelCut& cut = arguments.cut;
        Place place;
        place.channel_block = blockIdx.x % cut.blocks;
        place.part = blockIdx.x / cut.blocks;
        place.lane = threadIdx.x % cut.lanes;
        place.walker = threadIdx.x / cut.lanes;
        const uint32_t group = place.channel_block * cut.lanes + place.lane;
        place.channel = static_cast<int64_t>(group) * CHANNELS;
        place.active = place.walker < arguments.walkers && group < cut.groups;
        return place;
    }
};

// Address of V elements at a position of the walk.
template <typename T, int V, bool PLANES>
FUSED_OPS_DEVICE T* position(const Map& map, const Walk& walk, const Place& place) {
    return mutable_address<T, PLANES>(map, walk.image, walk.row,
                                      PLANES ? static_cast<int64_t>(walk.column) * V : walk.column,
                                      place.channel);
}

// Channels that a thread has.
template <int V, bool PLANES>
constexpr int CHANNELS = PLANES ? 1 : V;

// BatchNorm's vectors of a block's channels.
template <int V>
struct NormTables {
    ChannelTable<V> mean, rstd, gamma, beta;

    FUSED_OPS_DEVICE void fill(const PointwiseArguments& arguments, uint32_t channel_block) {
        const int width = static_cast<int>(arguments.cut.lanes) * V;
        for (int i = threadIdx.x; i < width; i += THREADS) {
            const int64_t channel = static_cast<int64_t>(channel_block) * width + i;
            if (channel >= arguments.channels) {
                break;
            }
            mean.at(i) = channel_value(arguments.mean, channel, 0.0f);
            rstd.at(i) = reciprocal_deviation(arguments.var, channel, arguments.eps);
            gamma.at(i) = channel_value(arguments.norm_weight, channel, 1.0f);
            beta.at(i) = channel_value(arguments.norm_bias, channel, 0.0f);
        }
        __syncthreads();
    }
};

// source -> count (parts), mean and M2 (parts, channels) of each block's positions.
template <typename T, int V, bool PLANES>
__global__ void __launch_bounds__(THREADS, 5) moments(const __grid_constant__ PointwiseArguments arguments) {
    constexpr int C = CHANNELS<V, PLANES>;
    const Place place = Place::of<C>(arguments);
    RunningMoments running[C];
    Walk walk(arguments, place.part, place.walker);
    const uint32_t count = place.active ? walk.left : 0;
    for (uint32_t i = 0; i < count; ++i) {
        const Vector<T, V> value = load_vector<T, V>(position<T, V, PLANES>(arguments.source, walk, place));
        walk.advance(arguments);
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            running[PLANES ? 0 : v].add(to_float(value.elements[v]), i == 0 && (!PLANES || v == 0));
        }
    }
    if constexpr (PLANES) {
        store_plane_moments(running[0], count * V, place.part, place.channel, arguments.channels,
                            arguments.part_count, arguments.parts, arguments.part_m2);
    } else {
        const float total = static_cast<float>(count);
        float mean[V], m2[V];
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            running[v].finish(total, mean[v], m2[v]);
        }
        __shared__ MomentsExchange<V> exchange;
        store_moments(exchange, arguments.cut, arguments.walkers, place.part, place.channel_block,
                      arguments.channels, total, mean, m2, arguments.part_count, arguments.parts,
                      arguments.part_m2);
    }
}

// target = act(norm(source)) with the residual before or after the activation.
template <typename T, int V, bool PLANES>
__global__ void __launch_bounds__(THREADS, 5)
    normalise(const __grid_constant__ PointwiseArguments arguments) {
    __shared__ NormTables<CHANNELS<V, PLANES>> tables;
    const Place place = Place::of<CHANNELS<V, PLANES>>(arguments);
    tables.fill(arguments, place.channel_block);
    if (!place.active) {
        return;
    }
    float mean[V], scale[V], shift[V], gamma[V];
    tables.mean.read_all(place.lane, mean);
    tables.rstd.read_all(place.lane, scale);
    tables.gamma.read_all(place.lane, gamma);
    tables.beta.read_all(place.lane, shift);
    FUSED_OPS_UNROLL
    for (int v = 0; v < V; ++v) {
        scale[v] *= gamma[v];
    }
    const bool has_residual = arguments.residual_mode != ResidualMode::none;
    Walk walk(arguments, place.part, place.walker);
    while (walk.left > 0) {
        const Vector<T, V> source = load_vector<T, V>(position<T, V, PLANES>(arguments.source, walk, place));
        const Vector<T, V> added =
            has_residual ? load_vector<T, V>(position<T, V, PLANES>(arguments.residual, walk, place))
                         : zero_vector<T, V>();
        float values[V];
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            values[v] = (to_float(source.elements[v]) - mean[v]) * scale[v] + shift[v];
        }
        store_vector<T, V>(
            position<T, V, PLANES>(arguments.target, walk, place),
            activate_with_residual<T, V>(values, added, arguments.residual_mode, arguments.activation));
        walk.advance(arguments);
    }
}

// grad and source (the convolution's output) -> parts (parts, 2, channels): sums of the gradient after the
// norm, and of its product with the normalised value.
template <typename T, int V, bool PLANES>
__global__ void __launch_bounds__(THREADS, 5)
    norm_sums(const __grid_constant__ PointwiseArguments arguments) {
    constexpr int C = CHANNELS<V, PLANES>;
    __shared__ NormTables<C> tables;
    const Place place = Place::of<C>(arguments);
    tables.fill(arguments, place.channel_block);
    float own[3][C] = {};
    if (place.active) {
        float mean[V], rstd[V], gamma[V], beta[V];
        tables.mean.read_all(place.lane, mean);
        tables.rstd.read_all(place.lane, rstd);
        tables.gamma.read_all(place.lane, gamma);
        tables.beta.read_all(place.lane, beta);
        // Only a residual before the activation plays a part in the activation's derivative.
        const bool add_residual =
            arguments.residual_mode == ResidualMode::before && arguments.activation != Activation::none;
        Walk walk(arguments, place.part, place.walker);
        while (walk.left > 0) {
            const auto load = [&](const Map& map) {
                return load_vector<T, V>(position<T, V, PLANES>(map, walk, place));
            };
            const Vector<T, V> grad = load(arguments.grad);
            const Vector<T, V> source = load(arguments.source);
            const Vector<T, V> added = add_residual ? load(arguments.residual) : zero_vector<T, V>();
            walk.advance(arguments);
            float value_grad[V], value[V], normalised[V];
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                value_grad[v] = to_float(grad.elements[v]);
                normalised[v] = (to_float(source.elements[v]) - mean[v]) * rstd[v];
                value[v] = normalised[v] * gamma[v] + beta[v] + to_float(added.elements[v]);
            }
            multiply_activation_gradient(value_grad, value, arguments.activation);
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                own[1][PLANES ? 0 : v] += value_grad[v];
                own[2][PLANES ? 0 : v] += value_grad[v] * normalised[v];
            }
        }
    }
    if constexpr (PLANES) {
        const float no_taps[1] = {};
        store_plane_sums(no_taps, {own[0][0], own[1][0], own[2][0]}, 0, 0, 2, place.part, place.channel,
                         arguments.channels, arguments.parts);
    } else {
        alignas(16) __shared__ float buffer[2 * THREADS * V];
        const float no_taps[1][V] = {};
        store_sums(buffer, 2 * THREADS * V, no_taps, own, 0, 0, 2, arguments.cut, arguments.walkers,
                   place.part, place.channel_block, arguments.channels, arguments.parts);
    }
}

// target (t, the gradient of x without the part that passes through the batch's statistics) and source (x):
// target = t - gamma rstd (m1 + xhat m2) in place, m1 and m2 the means of the norm's two sums.
template <typename T, int V, bool PLANES>
__global__ void __launch_bounds__(THREADS, 5) finish(const __grid_constant__ PointwiseArguments arguments) {
    __shared__ NormTables<CHANNELS<V, PLANES>> tables;
    const Place place = Place::of<CHANNELS<V, PLANES>>(arguments);
    tables.fill(arguments, place.channel_block);
    if (!place.active) {
        return;
    }
    float mean[V], rstd[V], scale[V], sum[V], product[V];
    tables.mean.read_all(place.lane, mean);
    tables.rstd.read_all(place.lane, rstd);
    tables.gamma.read_all(place.lane, scale);
    FUSED_OPS_UNROLL
    for (int v = 0; v < V; ++v) {
        scale[v] *= rstd[v] * arguments.inverse_count;
        const float* const sums = arguments.sums + place.channel + (PLANES ? 0 : v);
        sum[v] = load_vector<float, 1>(sums).elements[0];
        product[v] = load_vector<float, 1>(sums + arguments.channels).elements[0];
    }
    Walk walk(arguments, place.part, place.walker);
    while (walk.left > 0) {
        T* const where = position<T, V, PLANES>(arguments.target, walk, place);
        const Vector<T, V> partial = load_written_vector<T, V>(where);
        const Vector<T, V> x = load_vector<T, V>(position<T, V, PLANES>(arguments.source, walk, place));
        walk.advance(arguments);
        Vector<T, V> result;
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            const float normalised = (to_float(x.elements[v]) - mean[v]) * rstd[v];
            result.elements[v] =
                from_float<T>(to_float(partial.elements[v]) - scale[v] * (sum[v] + normalised * product[v]));
        }
        store_vector<T, V>(where, result);
    }
}

template <typename T, int V>
const char* launch_vector(PointwiseKernel kernel, const PointwiseArguments& arguments, uint32_t blocks,
                          void* stream) {
    void (*const kernels[][2])(PointwiseArguments) = {{moments<T, V, false>, moments<T, V, true>},
                                                      {normalise<T, V, false>, normalise<T, V, true>},
                                                      {norm_sums<T, V, false>, norm_sums<T, V, true>},
                                                      {finish<T, V, false>, finish<T, V, true>}};
    constexpr const char* NAMES[] = {"moments", "normalise", "norm_sums", "finish"};
    const int index = static_cast<int>(kernel);
    return launch_kernel(NAMES[index], kernels[index][arguments.planes ? 1 : 0], blocks, THREADS, 0, stream,
                         arguments);
}

}  // namespace

namespace depthwise {

template <>
const char* launch_pointwise<Scalar>(PointwiseKernel kernel, const PointwiseArguments& arguments, int vector,
                                     uint32_t blocks, void* stream) {
    switch (vector) {
#if FUSED_OPS_SCALAR != 0
        case 8:
            return launch_vector<Scalar, 8>(kernel, arguments, blocks, stream);
#endif
        case 4:
            return launch_vector<Scalar, 4>(kernel, arguments, blocks, stream);
        case 2:
            return launch_vector<Scalar, 2>(kernel, arguments, blocks, stream);
        default:
            return launch_vector<Scalar, 1>(kernel, arguments, blocks, stream);
    }
}

}  // namespace depthwise

}  // namespace fused_ops
