// Backward pass of the low-resolution branch: the gradient of the norm's output, and the gradients of both
// fully connected layers, in one pass over the gradient and the strided convolution's output.
//
//     tile of a block      32 low-resolution pixels, all channels, a slice of the hidden units
//     block of threads     one warp per 16 hidden units, up to 256 units (128 above 64 channels)
//     registers            both weight gradients of a warp's hidden units, all channels, over the whole
//     launch; fc2 shared memory        fc1; the gradient summed over repeated pixels and the normalised
//     branch, as operands;
//                          the hidden gradients; the next tile's pixels on their way
//     cluster              blocks with the other slices, whose shares of the map gradient are added up
//     through
//                          shared memory; and several such groups, each with tiles of its own, whose weight
//                          gradients are added up at the end, so that a cluster writes one part
//
// Products have hidden units as rows, so that the hidden gradients come out as the rows of the weights'
// products.
#include "../common/cluster.h"
#include "../depthwise/unit.h"
#include "tile.h"

namespace fused_ops {

namespace {

using namespace hr_chain;

constexpr int UNIT_PITCH = LOW_PIXELS + ROW_PADDING;
// Copies on their way per pixel: the four that its value was repeated to, and its own.
constexpr int STAGES = 5;

// Where a pixel of a tile lies; tiles are cut from the pixels of all low-resolution maps in a row.
struct Pixel {
    int64_t image;
    int row, column;
    bool inside;
};

FUSED_OPS_DEVICE Pixel pixel_of(const HRChainProblem& p, uint32_t tile, int index) {
    const auto width = static_cast<uint32_t>(p.low_width);
    const auto size = static_cast<uint32_t>(p.low_height) * width;
    const int64_t wanted = int64_t{tile} * LOW_PIXELS + index;
    const bool inside = wanted < p.batch * static_cast<int64_t>(size);
    const uint32_t flat = inside ? static_cast<uint32_t>(wanted) : 0;
    return {flat / size, static_cast<int>(flat % size / width), static_cast<int>(flat % width), inside};
}

// Starts copying what the calling thread's pixels and octets of channels need.
template <typename T, int C>
FUSED_OPS_DEVICE void copy_pixels(T* staged, const LowBackwardArguments& arguments, uint32_t tile) {
    const HRChainBackwardParams& params = arguments.params;
    const HRChainProblem& p = params.problem;
    constexpr int OCTETS = C / 8;
    const int threads = static_cast<int>(arguments.warps * 32);
    for (int item = threadIdx.x; item < LOW_PIXELS * OCTETS; item += threads) {
        const int channel = item % OCTETS * 8;
        const Pixel pixel = pixel_of(p, tile, item / OCTETS);
        const T* const grad = static_cast<const T*>(params.grad.data) + pixel.image * params.grad.strides.n;
        const T* const low = static_cast<const T*>(params.low.data) + pixel.image * params.low.strides.n;
        const int count = pixel.inside ? static_cast<int>(p.channels) - channel : 0;
        T* const target = staged + item * 8 * STAGES;
        // Unrolled, the addresses would take registers that there are none of.
        FUSED_OPS_NO_UNROLL
        for (int repeat = 0; repeat < 4; ++repeat) {
            const int64_t row = 2 * pixel.row + repeat / 2;
            const int64_t column = 2 * pixel.column + repeat % 2;
            const int here = row < p.height && column < p.width ? count : 0;
            copy_channels(target + repeat * 8,
                          here > 0
                              ? grad + row * params.grad.strides.h + column * params.grad.strides.w + channel
                              : grad,
                          here, arguments.wide_maps);
        }
        copy_channels(
            target + 32,
            count > 0 ? low + pixel.row * params.low.strides.h + pixel.column * params.low.strides.w + channel
                      : low,
            count, arguments.wide_maps);
    }
}

// What the norm does to each channel, in shared memory.
template <int C>
struct NormTable {
    float mean[C], deviation[C], weight[C], bias[C];
};

template <int C>
FUSED_OPS_DEVICE void load_norm(NormTable<C>& table, const HRChainProblem& p, int threads) {
    for (int channel = threadIdx.x; channel < C; channel += threads) {
        const bool exists = channel < p.channels;
        table.mean[channel] = value_of(p.mean, channel, p.channels, 0.0f);
        table.deviation[channel] = exists ? inverse_deviation(p, channel) : 0.0f;
        table.weight[channel] = exists ? value_of(p.norm_weight, channel, p.channels, 1.0f) : 0.0f;
        table.bias[channel] = value_of(p.norm_bias, channel, p.channels, 0.0f);
    }
}

// Turns the calling thread's copies into operands, each (LOW_PIXELS, C): the gradient summed over repeated
// pixels, the normalised branch, and the norm's output.
template <typename T, int C>
FUSED_OPS_DEVICE void convert_pixels(T* grad, T* normalised, T* normal, const T* staged,
                                     const NormTable<C>& table, const LowBackwardArguments& arguments,
                                     uint32_t tile) {
    const HRChainProblem& p = arguments.params.problem;
    constexpr int OCTETS = C / 8;
    constexpr int PITCH = C + ROW_PADDING;
    const int threads = static_cast<int>(arguments.warps * 32);
    for (int item = threadIdx.x; item < LOW_PIXELS * OCTETS; item += threads) {
        const int channel = item % OCTETS * 8;
        const int target = item / OCTETS * PITCH + channel;
        const T* const source = staged + item * 8 * STAGES;
        const float factor =
            p.drop_path.data == nullptr
                ? 1.0f
                : value_of(p.drop_path, pixel_of(p, tile, item / OCTETS).image, p.batch, 1.0f);
        FUSED_OPS_UNROLL
        for (int v = 0; v < 8; v += 2) {
            float sum[2] = {};
            FUSED_OPS_UNROLL
            for (int repeat = 0; repeat < 4; ++repeat) {
                const uint32_t word = load_pair(source + repeat * 8 + v);
                sum[0] += first_of<T>(word);
                sum[1] += second_of<T>(word);
            }
            const uint32_t low = load_pair(source + 32 + v);
            const int c = channel + v;
            const float left = (first_of<T>(low) - table.mean[c]) * table.deviation[c];
            const float right = (second_of<T>(low) - table.mean[c + 1]) * table.deviation[c + 1];
            store_pair(grad + target + v, pack_pair<T>(sum[0] * factor, sum[1] * factor));
            store_pair(normalised + target + v, pack_pair<T>(left, right));
            store_pair(normal + target + v, pack_pair<T>(left * table.weight[c] + table.bias[c],
                                                         right * table.weight[c + 1] + table.bias[c + 1]));
        }
    }
}

template <typename T>
FUSED_OPS_DEVICE void pack_rows(uint32_t (&words)[4], const float (&values)[8]) {
    FUSED_OPS_UNROLL
    for (int word = 0; word < 4; ++word) {
        words[word] = pack_pair<T>(values[2 * word], values[2 * word + 1]);
    }
}

template <typename T, int C, int THREADS>
__global__ void __maxnreg__(THREADS == 512 ? 128 : 240)
    hr_chain_low_backward(const __grid_constant__ LowBackwardArguments arguments) {
    const HRChainBackwardParams& params = arguments.params;
    const HRChainProblem& p = params.problem;
    constexpr int PITCH = C + ROW_PADDING;
    constexpr int SHARE_PITCH = C + 4;
    const int threads = static_cast<int>(arguments.warps * 32);
    const int units = static_cast<int>(arguments.warps) * WARP_UNITS;
    FUSED_OPS_DYNAMIC_SHARED(memory);
    NormTable<C>& table = *reinterpret_cast<NormTable<C>*>(memory);
    T* const grad = reinterpret_cast<T*>(memory + sizeof(NormTable<C>) / sizeof(float));
    T* const normalised = grad + LOW_PIXELS * PITCH;
    T* const normal = normalised + LOW_PIXELS * PITCH;
    T* const staged = normal + LOW_PIXELS * PITCH;
    T* const fc1 = staged + LOW_PIXELS * C * STAGES;
    T* const hidden_grad = fc1 + units * PITCH;
    float* const bias = reinterpret_cast<float*>(hidden_grad + units * UNIT_PITCH);
    float* const share = reinterpret_cast<float*>(grad);

    const uint32_t blocks = arguments.depth * arguments.repeats;
    const uint32_t slice = cluster_rank() % arguments.depth;
    const uint32_t repeat = cluster_rank() / arguments.depth;
    const uint32_t part = blockIdx.x / blocks;
    const int first_unit = static_cast<int>(slice) * units;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int channels = static_cast<int>(p.channels);
    const int hidden = static_cast<int>(p.hidden);

    load_norm(table, p, threads);
    for (int row = threadIdx.x; row < units; row += threads) {
        bias[row] = value_of(p.fc1_bias, first_unit + row, hidden, 0.0f);
    }
    for (int item = threadIdx.x; item < units * C / 8; item += threads) {
        const int unit = item / (C / 8);
        const int channel = item % (C / 8) * 8;
        const T* const weight = static_cast<const T*>(p.fc1.data);
        const int count = first_unit + unit < hidden ? channels - channel : 0;
        copy_channels(fc1 + unit * PITCH + channel,
                      count > 0 ? weight + int64_t{first_unit + unit} * channels + channel : weight, count,
                      arguments.wide_fc1);
    }
    // fc2 transposed, rows of the calling warp's hidden units.
    uint32_t fc2[C / 16][4];
    const int unit = warp * WARP_UNITS + lane / 4;
    FUSED_OPS_UNROLL
    for (int entry = 0; entry < 2; ++entry) {
        const int row = first_unit + unit + entry * 8;
        FUSED_OPS_UNROLL
        for (int k = 0; k < C / 8; ++k) {
            float pair[2];
            FUSED_OPS_UNROLL
            for (int v = 0; v < 2; ++v) {
                const int channel = k * 8 + lane % 4 * 2 + v;
                pair[v] = row < hidden && channel < channels
                              ? load_element(p.fc2.data, p.type, int64_t{channel} * hidden + row)
                              : 0.0f;
            }
            fc2[k / 2][k % 2 * 2 + entry] = pack_pair<T>(pair[0], pair[1]);
        }
    }

    float fc1_grad[C / 8][4] = {};
    float fc2_grad[C / 8][4] = {};
    float bias_grad[2] = {};
    const uint32_t worker = part * arguments.repeats + repeat;
    uint32_t tile = worker * arguments.rounds;
    const uint32_t end = tile + arguments.rounds;
    copy_pixels<T, C>(staged, arguments, tile);
    for (; tile < end; ++tile) {
        finish_copies();
        // The last tile's share of the map gradient, in the operands' place, may still be read.
        synchronise_cluster();
        convert_pixels<T, C>(grad, normalised, normal, staged, table, arguments, tile);
        __syncthreads();
        if (tile + 1 < end) {
            copy_pixels<T, C>(staged, arguments, tile + 1);
        }
        FUSED_OPS_NO_UNROLL
        for (int pixels = 0; pixels < LOW_PIXELS; pixels += 16) {
            float value[8], value_grad[8];
            FUSED_OPS_UNROLL
            for (int entry = 0; entry < 8; ++entry) {
                value[entry] = bias[unit + entry / 2 % 2 * 8];
                value_grad[entry] = 0.0f;
            }
            FUSED_OPS_UNROLL
            for (int k = 0; k < C / 16; ++k) {
                uint32_t a[4], b[4];
                load_a(a, fc1 + warp * WARP_UNITS * PITCH + k * 16, PITCH);
                load_b(b, normal + pixels * PITCH + k * 16, PITCH);
                multiply<T>(*reinterpret_cast<float (*)[4]>(value), a, b[0], b[1]);
                multiply<T>(*reinterpret_cast<float (*)[4]>(value + 4), a, b[2], b[3]);
                load_b(b, grad + pixels * PITCH + k * 16, PITCH);
                multiply<T>(*reinterpret_cast<float (*)[4]>(value_grad), fc2[k], b[0], b[1]);
                multiply<T>(*reinterpret_cast<float (*)[4]>(value_grad + 4), fc2[k], b[2], b[3]);
            }
            FUSED_OPS_UNROLL
            for (int entry = 0; entry < 8; ++entry) {
                // Infinity times the zeros that stand for a unit beyond the last would be NaN.
                if (first_unit + unit + entry / 2 % 2 * 8 >= hidden) {
                    value[entry] = 0.0f;
                }
            }
            multiply_activation_gradient(value_grad, value, p.activation);
            FUSED_OPS_UNROLL
            for (int entry = 0; entry < 8; ++entry) {
                bias_grad[entry / 2 % 2] += value_grad[entry];
            }
            uint32_t rows[4], grad_rows[4];
            pack_rows<T>(grad_rows, value_grad);
            activate_all(value, p.activation);
            pack_rows<T>(rows, value);
            FUSED_OPS_UNROLL
            for (int word = 0; word < 4; ++word) {
                store_pair(
                    hidden_grad + (unit + word % 2 * 8) * UNIT_PITCH + pixels + word / 2 * 8 + lane % 4 * 2,
                    grad_rows[word]);
            }
            if (arguments.weights) {
                FUSED_OPS_UNROLL
                for (int n = 0; n < C / 8; n += 2) {
                    uint32_t b[4];
                    load_b_transposed(b, normalised + pixels * PITCH + n * 8, PITCH);
                    multiply<T>(fc1_grad[n], grad_rows, b[0], b[1]);
                    multiply<T>(fc1_grad[n + 1], grad_rows, b[2], b[3]);
                    load_b_transposed(b, grad + pixels * PITCH + n * 8, PITCH);
                    multiply<T>(fc2_grad[n], rows, b[0], b[1]);
                    multiply<T>(fc2_grad[n + 1], rows, b[2], b[3]);
                }
            }
        }
        if (params.low_grad.data != nullptr) {
            __syncthreads();
            for (int square = warp; square < LOW_PIXELS / 16 * (C / 16);
                 square += static_cast<int>(arguments.warps)) {
                const int pixels = square % (LOW_PIXELS / 16) * 16;
                const int channel = square / (LOW_PIXELS / 16) * 16;
                float sum[2][4] = {};
                FUSED_OPS_NO_UNROLL
                for (int k = 0; k < units; k += 16) {
                    uint32_t a[4], b[4];
                    load_a_transposed(a, hidden_grad + k * UNIT_PITCH + pixels, UNIT_PITCH);
                    load_b_transposed(b, fc1 + k * PITCH + channel, PITCH);
                    multiply<T>(sum[0], a, b[0], b[1]);
                    multiply<T>(sum[1], a, b[2], b[3]);
                }
                FUSED_OPS_UNROLL
                for (int entry = 0; entry < 8; ++entry) {
                    share[(pixels + lane / 4 + entry / 2 % 2 * 8) * SHARE_PITCH + channel + entry / 4 * 8 +
                          lane % 4 * 2 + entry % 2] = sum[entry / 4][entry % 4];
                }
            }
            synchronise_cluster();
            for (int item = static_cast<int>(slice) + threadIdx.x * static_cast<int>(arguments.depth);
                 item < LOW_PIXELS * C / 8; item += threads * static_cast<int>(arguments.depth)) {
                const Pixel pixel = pixel_of(p, tile, item / (C / 8));
                const int channel = item % (C / 8) * 8;
                float sum[8] = {};
                FUSED_OPS_NO_UNROLL
                for (uint32_t other = 0; other < arguments.depth; ++other) {
                    const float* const from = of_block(share, repeat * arguments.depth + other) +
                                              item / (C / 8) * SHARE_PITCH + channel;
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < 8; ++v) {
                        sum[v] += from[v];
                    }
                }
                if (!pixel.inside) {
                    continue;
                }
                T* const target = static_cast<T*>(params.low_grad.data) +
                                  pixel.image * params.low_grad.strides.n +
                                  pixel.row * params.low_grad.strides.h +
                                  pixel.column * params.low_grad.strides.w + channel;
                Vector<T, 8> result;
                FUSED_OPS_UNROLL
                for (int v = 0; v < 8; ++v) {
                    result.elements[v] = from_float<T>(sum[v]);
                }
                if (arguments.wide_maps) {
                    if (channel < channels) {
                        store_vector(target, result);
                    }
                    continue;
                }
                FUSED_OPS_UNROLL
                for (int v = 0; v < 8; ++v) {
                    if (channel + v < channels) {
                        store_vector(target + v, Vector<T, 1>{{result.elements[v]}});
                    }
                }
            }
        }
    }
    if (!arguments.weights) {
        // Another block may still read this one's share.
        synchronise_cluster();
        return;
    }

    // One part per cluster: blocks with the same slice add up theirs, in the order of their rank, each a
    // share.
    const auto merge = [&](float* target, int columns, int stride) {
        synchronise_cluster();
        for (int item = static_cast<int>(repeat) * threads + threadIdx.x; item < units * columns;
             item += threads * static_cast<int>(arguments.repeats)) {
            float sum = 0.0f;
            for (uint32_t other = 0; other < arguments.repeats; ++other) {
                sum += of_block(memory, other * arguments.depth + slice)[item];
            }
            const int row = first_unit + item / columns;
            if (row < hidden && item % columns < stride) {
                store_vector(target + (int64_t{part} * hidden + row) * stride + item % columns,
                             Vector<float, 1>{{sum}});
            }
        }
        synchronise_cluster();
    };
    const auto put = [&](const float (&sums)[C / 8][4]) {
        FUSED_OPS_UNROLL
        for (int n = 0; n < C / 8; ++n) {
            FUSED_OPS_UNROLL
            for (int entry = 0; entry < 4; ++entry) {
                memory[(unit + entry / 2 * 8) * C + n * 8 + lane % 4 * 2 + entry % 2] = sums[n][entry];
            }
        }
    };
    synchronise_cluster();
    put(fc1_grad);
    merge(arguments.parts_fc1, C, channels);
    put(fc2_grad);
    merge(arguments.parts_fc2, C, channels);
    FUSED_OPS_UNROLL
    for (int entry = 0; entry < 2; ++entry) {
        float sum = bias_grad[entry];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) {
            memory[unit + entry * 8] = sum;
        }
    }
    merge(arguments.parts_bias, 1, 1);
}

template <typename T, int C>
const char* launch(const LowBackwardArguments& arguments, void* stream) {
    constexpr int THREADS = C <= 64 ? 512 : 256;
    const uint32_t cluster = arguments.depth * arguments.repeats;
    return launch_clusters("hr_chain_low_backward", hr_chain_low_backward<T, C, THREADS>,
                           arguments.parts * cluster, cluster, arguments.warps * 32,
                           low_backward_bytes(C, arguments.warps), stream, arguments);
}

}  // namespace

namespace hr_chain {

template <>
const char* launch_low_backward<Scalar>(const LowBackwardArguments& arguments, void* stream) {
    switch (padded_channels(arguments.params.problem.channels)) {
        case 16:
            return launch<Scalar, 16>(arguments, stream);
        case 32:
            return launch<Scalar, 32>(arguments, stream);
        case 64:
            return launch<Scalar, 64>(arguments, stream);
        case 96:
            return launch<Scalar, 96>(arguments, stream);
        case 128:
            return launch<Scalar, 128>(arguments, stream);
        default:
            return "no backward kernel was compiled for so many channels";
    }
}

}  // namespace hr_chain

}  // namespace fused_ops
