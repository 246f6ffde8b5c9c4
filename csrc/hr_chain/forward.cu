// Everything of the forward pass but the norm's statistics, in one pass over the map.
//
//     tile of a block     ROWS x 8 low-resolution pixels (64, or 32 above 64 channels), all channels
//     block of threads    8 warps: ROWS / 2 groups of 16 pixels times groups of 16 hidden units
//     shared memory       (2 ROWS + 2) x 18 full-resolution pixels, from which both convolutions are
//     computed;
//                         the normalised branch; chunks of 64 hidden units of both matrices, streamed from
//                         L2; in their place then the branch's result
//     registers           16 pixels times all channels of the branch's result per warp
//
// Hidden units are never in memory: a product's results are, activated and rounded, the rows of the next one.
#include "../depthwise/unit.h"
#include "tile.h"

namespace fused_ops {

namespace {

using namespace hr_chain;

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int CHUNK = 64;
constexpr int CHUNK_PITCH = CHUNK + ROW_PADDING;

template <typename T, int C, int PIXEL_GROUPS>
struct Layout {
    static constexpr int ROWS = 2 * PIXEL_GROUPS;
    static constexpr int PIXELS = 16 * PIXEL_GROUPS;
    static constexpr int PITCH = C + ROW_PADDING;
    static constexpr int VALUE_PITCH = C + 4;
    static constexpr int FLOATS = 18 * C + CHUNK;
    static constexpr int MAP = (2 * ROWS + 2) * HALO_COLUMNS * C;
    static constexpr int NORMAL = PIXELS * PITCH;
    static constexpr int MATRICES = CHUNK * PITCH + C * CHUNK_PITCH;
    static constexpr int LAST =
        MATRICES * 2 > PIXELS * VALUE_PITCH * 4 ? MATRICES * 2 : PIXELS * VALUE_PITCH * 4;
    static constexpr uint32_t BYTES = FLOATS * 4 + (MAP + NORMAL) * 2 + LAST;
};

// The strided convolution and the norm: reads the tile of x, writes the normalised branch, rounded.
template <typename T, int C, int PIXEL_GROUPS>
FUSED_OPS_DEVICE void convolve_low(T* normal, const T* map, const float* filter,
                                   const HRChainForwardParams& params, const Tile& tile, bool wide) {
    using L = Layout<T, C, PIXEL_GROUPS>;
    const HRChainProblem& p = params.problem;
    constexpr int PAIRS = C / 2;
    constexpr int GROUPS = THREADS / PAIRS;
    const int channel = threadIdx.x % PAIRS * 2;
    const int group = threadIdx.x / PAIRS;
    if (group >= GROUPS) {
        return;
    }
    float taps[9][2];
    read_taps<C>(taps, filter, channel);
    float mean[2], scale[2], shift[2];
    FUSED_OPS_UNROLL
    for (int v = 0; v < 2; ++v) {
        mean[v] = value_of(p.mean, channel + v, p.channels, 0.0f);
        scale[v] = inverse_deviation(p, channel + v) *
                   (channel + v < p.channels ? value_of(p.norm_weight, channel + v, p.channels, 1.0f) : 0.0f);
        shift[v] = value_of(p.norm_bias, channel + v, p.channels, 0.0f);
    }
    for (int pixel = group; pixel < L::PIXELS; pixel += GROUPS) {
        const int i = pixel / TILE_COLUMNS;
        const int j = pixel % TILE_COLUMNS;
        float sum[2] = {};
        FUSED_OPS_UNROLL
        for (int tap = 0; tap < 9; ++tap) {
            const uint32_t word =
                load_pair(map + ((2 * i + tap / 3) * HALO_COLUMNS + 2 * j + tap % 3) * C + channel);
            sum[0] += first_of<T>(word) * taps[tap][0];
            sum[1] += second_of<T>(word) * taps[tap][1];
        }
        const uint32_t low = pack_pair<T>(sum[0], sum[1]);
        const bool inside = tile.row + i < p.low_height && tile.column + j < p.low_width;
        if (params.low.data != nullptr && inside) {
            T* const target = static_cast<T*>(params.low.data) + tile.image * params.low.strides.n +
                              (tile.row + i) * params.low.strides.h +
                              (tile.column + j) * params.low.strides.w + channel;
            store_channels(target, first_of<T>(low), second_of<T>(low), p.channels - channel, wide);
        }
        const uint32_t value = pack_pair<T>((first_of<T>(low) - mean[0]) * scale[0] + shift[0],
                                            (second_of<T>(low) - mean[1]) * scale[1] + shift[1]);
        store_pair(normal + pixel * L::PITCH + channel, inside ? value : 0);
    }
}

// Copies hidden units [first, first + CHUNK) of both matrices to shared memory, zeros beyond the last.
template <typename T, int C>
FUSED_OPS_DEVICE void copy_matrices(T* fc1, T* fc2, float* bias, const ForwardArguments& arguments,
                                    int first) {
    const HRChainProblem& p = arguments.params.problem;
    const int channels = static_cast<int>(p.channels);
    const int hidden = static_cast<int>(p.hidden);
    const T* const fc1_weight = static_cast<const T*>(p.fc1.data);
    const T* const fc2_weight = static_cast<const T*>(p.fc2.data);
    for (int item = threadIdx.x; item < CHUNK * C / 8; item += THREADS) {
        const int unit = item / (C / 8);
        const int channel = item % (C / 8) * 8;
        const int count = first + unit < hidden ? channels - channel : 0;
        copy_channels(fc1 + unit * (C + ROW_PADDING) + channel,
                      count > 0 ? fc1_weight + int64_t{first + unit} * channels + channel : fc1_weight, count,
                      arguments.wide_fc1);
    }
    for (int item = threadIdx.x; item < C * CHUNK / 8; item += THREADS) {
        const int channel = item / (CHUNK / 8);
        const int unit = first + item % (CHUNK / 8) * 8;
        const int count = channel < channels ? hidden - unit : 0;
        copy_channels(fc2 + channel * CHUNK_PITCH + unit - first,
                      count > 0 ? fc2_weight + int64_t{channel} * hidden + unit : fc2_weight, count,
                      arguments.wide_fc2);
    }
    for (int unit = threadIdx.x; unit < CHUNK; unit += THREADS) {
        bias[unit] = value_of(p.fc1_bias, first + unit, hidden, 0.0f);
    }
}

// The full-resolution convolution, and both branches' sum: reads the tile of x and the branch's result.
template <typename T, int C, int PIXEL_GROUPS>
FUSED_OPS_DEVICE void convolve_high(const T* map, const float* filter, const float* value,
                                    const HRChainForwardParams& params, const Tile& tile, bool wide) {
    using L = Layout<T, C, PIXEL_GROUPS>;
    const HRChainProblem& p = params.problem;
    constexpr int PAIRS = C / 2;
    constexpr int COLUMNS = PAIRS * TILE_COLUMNS;
    constexpr int SEGMENTS = COLUMNS < THREADS ? THREADS / COLUMNS : 1;
    const float factor = value_of(p.drop_path, tile.image, p.batch, 1.0f);
    T* const out = static_cast<T*>(params.out.data) + tile.image * params.out.strides.n;
    for (int item = threadIdx.x; item < COLUMNS * SEGMENTS; item += THREADS) {
        const int channel = item % PAIRS * 2;
        const int j = item / PAIRS % TILE_COLUMNS;
        const int first = item / COLUMNS * (L::ROWS / SEGMENTS);
        if (channel >= p.channels || tile.column + j >= p.low_width) {
            continue;
        }
        float taps[9][2];
        read_taps<C>(taps, filter, channel);
        float bias[2];
        FUSED_OPS_UNROLL
        for (int v = 0; v < 2; ++v) {
            bias[v] = value_of(p.high_bias, channel + v, p.channels, 0.0f) +
                      value_of(p.fc2_bias, channel + v, p.channels, 0.0f);
        }
        FUSED_OPS_NO_UNROLL
        for (int i = first; i < first + L::ROWS / SEGMENTS && tile.row + i < p.low_height; ++i) {
            const float* const branch = value + (i * TILE_COLUMNS + j) * L::VALUE_PITCH + channel;
            float sum[2][2][2], own[2][2][2];
            FUSED_OPS_UNROLL
            for (int v = 0; v < 2; ++v) {
                const float start = branch[v] + bias[v];
                sum[0][0][v] = sum[0][1][v] = sum[1][0][v] = sum[1][1][v] = start;
            }
            FUSED_OPS_UNROLL
            for (int r = 0; r < 4; ++r) {
                float row[4][2];
                read_row<T, C>(row, map + ((2 * i + r) * HALO_COLUMNS + 2 * j) * C + channel);
                FUSED_OPS_UNROLL
                for (int a = 0; a < 2; ++a) {
                    const int tap = r - a;
                    FUSED_OPS_UNROLL
                    for (int b = 0; b < 2; ++b) {
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < 2; ++v) {
                            if (tap >= 0 && tap < 3) {
                                FUSED_OPS_UNROLL
                                for (int s = 0; s < 3; ++s) {
                                    sum[a][b][v] += row[b + s][v] * taps[tap * 3 + s][v];
                                }
                            }
                            if (tap == 1) {
                                own[a][b][v] = row[b + 1][v];
                            }
                        }
                    }
                }
            }
            FUSED_OPS_UNROLL
            for (int a = 0; a < 2; ++a) {
                FUSED_OPS_UNROLL
                for (int b = 0; b < 2; ++b) {
                    const int64_t row = 2 * (tile.row + i) + a;
                    const int64_t column = 2 * (tile.column + j) + b;
                    if (row >= p.height || column >= p.width) {
                        continue;
                    }
                    store_channels(out + row * params.out.strides.h + column * params.out.strides.w + channel,
                                   factor * sum[a][b][0] + (p.identity ? own[a][b][0] : 0.0f),
                                   factor * sum[a][b][1] + (p.identity ? own[a][b][1] : 0.0f),
                                   p.channels - channel, wide);
                }
            }
        }
    }
}

template <typename T, int C, int PIXEL_GROUPS>
__global__ void __launch_bounds__(THREADS, 2)
    hr_chain_forward(const __grid_constant__ ForwardArguments arguments) {
    using L = Layout<T, C, PIXEL_GROUPS>;
    constexpr int UNIT_GROUPS = WARPS / PIXEL_GROUPS;
    const HRChainProblem& p = arguments.params.problem;
    FUSED_OPS_DYNAMIC_SHARED(memory);
    float* const high_filter = memory;
    float* const low_filter = high_filter + 9 * C;
    float* const bias = low_filter + 9 * C;
    T* const map = reinterpret_cast<T*>(bias + CHUNK);
    T* const normal = map + L::MAP;
    T* const fc1 = normal + L::NORMAL;
    T* const fc2 = fc1 + CHUNK * L::PITCH;
    float* const value = reinterpret_cast<float*>(fc1);

    const Tile tile = tile_of<L::ROWS>(arguments.tiles, blockIdx.x);
    copy_tile<T, L::ROWS, C, THREADS>(map, p.x, p, tile, 0, arguments.wide_maps);
    load_filter<C, THREADS>(high_filter, p.high_weight, p.channels, 0);
    load_filter<C, THREADS>(low_filter, p.low_weight, p.channels, 0);
    finish_copies();
    __syncthreads();
    convolve_low<T, C, PIXEL_GROUPS>(normal, map, low_filter, arguments.params, tile, arguments.wide_maps);

    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int pixels = warp % PIXEL_GROUPS * 16;
    const int unit_group = warp / PIXEL_GROUPS;
    float sum[C / 8][4] = {};
    for (int first = 0; first < p.hidden; first += CHUNK) {
        copy_matrices<T, C>(fc1, fc2, bias, arguments, first);
        finish_copies();
        __syncthreads();
        FUSED_OPS_NO_UNROLL
        for (int unit = unit_group * 16; unit < CHUNK && first + unit < p.hidden; unit += UNIT_GROUPS * 16) {
            float hidden[8];
            FUSED_OPS_UNROLL
            for (int entry = 0; entry < 8; ++entry) {
                hidden[entry] = bias[unit + entry / 4 * 8 + lane % 4 * 2 + entry % 2];
            }
            float (&left)[4] = *reinterpret_cast<float (*)[4]>(hidden);
            float (&right)[4] = *reinterpret_cast<float (*)[4]>(hidden + 4);
            FUSED_OPS_UNROLL
            for (int k = 0; k < C; k += 16) {
                uint32_t a[4], b[4];
                load_a(a, normal + pixels * L::PITCH + k, L::PITCH);
                load_b(b, fc1 + unit * L::PITCH + k, L::PITCH);
                multiply<T>(left, a, b[0], b[1]);
                multiply<T>(right, a, b[2], b[3]);
            }
            FUSED_OPS_UNROLL
            for (int entry = 0; entry < 8; ++entry) {
                // Infinity times the zeros that stand for a unit beyond the last would be NaN.
                if (first + unit + entry / 4 * 8 + lane % 4 * 2 + entry % 2 >= p.hidden) {
                    hidden[entry] = 0.0f;
                }
            }
            activate_all(hidden, p.activation);
            uint32_t a[4];
            FUSED_OPS_UNROLL
            for (int word = 0; word < 4; ++word) {
                a[word] = pack_pair<T>(hidden[2 * word], hidden[2 * word + 1]);
            }
            FUSED_OPS_UNROLL
            for (int n = 0; n < C / 8; n += 2) {
                uint32_t b[4];
                load_b(b, fc2 + n * 8 * CHUNK_PITCH + unit, CHUNK_PITCH);
                multiply<T>(sum[n], a, b[0], b[1]);
                multiply<T>(sum[n + 1], a, b[2], b[3]);
            }
        }
        // The next chunk, or the result, takes this one's place.
        __syncthreads();
    }

    // Groups of hidden units add their shares one after the other.
    FUSED_OPS_UNROLL
    for (int group = 0; group < UNIT_GROUPS; ++group) {
        if (unit_group == group) {
            FUSED_OPS_UNROLL
            for (int n = 0; n < C / 8; ++n) {
                FUSED_OPS_UNROLL
                for (int entry = 0; entry < 4; ++entry) {
                    const int pixel = pixels + lane / 4 + entry / 2 * 8;
                    float& target = value[pixel * L::VALUE_PITCH + n * 8 + lane % 4 * 2 + entry % 2];
                    target = group == 0 ? sum[n][entry] : target + sum[n][entry];
                }
            }
        }
        __syncthreads();
    }
    convolve_high<T, C, PIXEL_GROUPS>(map, high_filter, value, arguments.params, tile, arguments.wide_maps);
}

template <typename T, int C, int PIXEL_GROUPS>
const char* launch(ForwardArguments arguments, void* stream) {
    using L = Layout<T, C, PIXEL_GROUPS>;
    const HRChainProblem& p = arguments.params.problem;
    arguments.tiles.down = static_cast<uint32_t>((p.low_height + L::ROWS - 1) / L::ROWS);
    arguments.tiles.across = static_cast<uint32_t>((p.low_width + TILE_COLUMNS - 1) / TILE_COLUMNS);
    arguments.tiles.count = arguments.tiles.down * arguments.tiles.across * static_cast<uint32_t>(p.batch);
    return launch_kernel("hr_chain_forward", hr_chain_forward<T, C, PIXEL_GROUPS>, arguments.tiles.count,
                         THREADS, L::BYTES, stream, arguments);
}

}  // namespace

namespace hr_chain {

template <>
const char* launch_forward<Scalar>(const ForwardArguments& arguments, void* stream) {
    switch (padded_channels(arguments.params.problem.channels)) {
        case 16:
            return launch<Scalar, 16, 4>(arguments, stream);
        case 32:
            return launch<Scalar, 32, 4>(arguments, stream);
        case 64:
            return launch<Scalar, 64, 4>(arguments, stream);
        case 96:
            return launch<Scalar, 96, 2>(arguments, stream);
        case 128:
            return launch<Scalar, 128, 2>(arguments, stream);
        default:
            return "no forward kernel was compiled for so many channels";
    }
}

}  // namespace hr_chain

}  // namespace fused_ops
