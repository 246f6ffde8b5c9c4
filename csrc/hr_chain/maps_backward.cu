// Gradients of the map and of both filters, in one pass over the full-resolution maps.
//
//     tile of a block     8 x 8 low-resolution pixels, 32 channels (16 of maps with no more)
//     block of threads    pairs of channels times columns of low-resolution pixels (times halves of the tile,
//     with
//                         16 channels); a thread walks down its column, four full-resolution pixels a step
//     shared memory       18 x 18 pixels each of the gradient and of x; 9 x 9 of the strided convolution's
//     gradient registers           both filters, and both their gradients over all tiles of the block
#include "../depthwise/unit.h"
#include "tile.h"

namespace fused_ops {

namespace {

using namespace hr_chain;

constexpr int THREADS = 128;
constexpr int ROWS = 8;
// Rows and columns of the strided convolution's gradient that the tile's pixels need.
constexpr int LOW_HALO = ROWS + 1;
static_assert(ROWS == TILE_COLUMNS);
// What a channel's sums are of: taps of the full-resolution filter, its bias, taps of the strided filter.
constexpr int SUMS = 19;

template <int C>
struct Layout {
    static constexpr int PAIRS = C / 2;
    static constexpr int WALKERS = THREADS / PAIRS;
    static constexpr int SEGMENTS = WALKERS / TILE_COLUMNS;
    static constexpr int MAP = (2 * ROWS + 2) * HALO_COLUMNS * C;
    static constexpr int FLOATS = 18 * C + 5 * C;
    static constexpr int LOW_GRAD = LOW_HALO * LOW_HALO * C;
    static constexpr uint32_t TILE_BYTES = 2 * MAP * 2 + LOW_GRAD * 4;
    static constexpr uint32_t SUM_BYTES = WALKERS * SUMS * C * 4;
    static constexpr uint32_t BYTES = FLOATS * 4 + (TILE_BYTES > SUM_BYTES ? TILE_BYTES : SUM_BYTES);
};

// The strided convolution's gradient on the tile and one pixel further on: through the norm; zero outside the
// map.
template <typename T, int C>
FUSED_OPS_DEVICE void load_low_gradient(float* shared, const float* norm, const HRChainBackwardParams& params,
                                        const Tile& tile, int first_channel, bool wide) {
    const HRChainProblem& p = params.problem;
    constexpr int OCTETS = C / 8;
    const T* const grad =
        static_cast<const T*>(params.low_grad.data) + tile.image * params.low_grad.strides.n + first_channel;
    const T* const low =
        static_cast<const T*>(params.low.data) + tile.image * params.low.strides.n + first_channel;
    for (int item = threadIdx.x; item < LOW_HALO * LOW_HALO * OCTETS; item += THREADS) {
        const int channel = item % OCTETS * 8;
        const int row = tile.row + item / OCTETS / LOW_HALO;
        const int column = tile.column + item / OCTETS % LOW_HALO;
        const int left = row < p.low_height && column < p.low_width
                             ? static_cast<int>(p.channels) - first_channel - channel
                             : 0;
        Vector<T, 8> grads = zero_vector<T, 8>();
        Vector<T, 8> lows = zero_vector<T, 8>();
        if (left > 0) {
            const T* const grad_at =
                grad + row * params.low_grad.strides.h + column * params.low_grad.strides.w;
            const T* const low_at = low + row * params.low.strides.h + column * params.low.strides.w;
            if (wide) {
                grads = load_vector<T, 8>(grad_at + channel);
                if (p.batch_stats) {
                    lows = load_vector<T, 8>(low_at + channel);
                }
            } else {
                FUSED_OPS_UNROLL
                for (int v = 0; v < 8; ++v) {
                    if (v < left) {
                        grads.elements[v] = load_vector<T, 1>(grad_at + channel + v).elements[0];
                        if (p.batch_stats) {
                            lows.elements[v] = load_vector<T, 1>(low_at + channel + v).elements[0];
                        }
                    }
                }
            }
        }
        FUSED_OPS_UNROLL
        for (int v = 0; v < 8; ++v) {
            const float* const of = norm + channel + v;
            const float normalised = (to_float(lows.elements[v]) - of[0]) * of[C];
            const float value = to_float(grads.elements[v]) - of[3 * C] - normalised * of[4 * C];
            shared[item * 8 + v] = left > v ? value * of[2 * C] : 0.0f;
        }
    }
}

template <typename T, int C>
__global__ void __launch_bounds__(THREADS, 3)
    hr_chain_maps_backward(const __grid_constant__ MapsBackwardArguments arguments) {
    using L = Layout<C>;
    const HRChainBackwardParams& params = arguments.params;
    const HRChainProblem& p = params.problem;
    FUSED_OPS_DYNAMIC_SHARED(memory);
    float* const high_filter = memory;
    float* const low_filter = high_filter + 9 * C;
    // Mean, one over deviation, scale of the gradient, mean gradient, mean of gradient times normalised
    // value.
    float* const norm = low_filter + 9 * C;
    float* const low_grad = norm + 5 * C;
    T* const grad = reinterpret_cast<T*>(low_grad + L::LOW_GRAD);
    T* const x = grad + L::MAP;

    const uint32_t part = blockIdx.x / arguments.channel_blocks;
    const int first_channel = static_cast<int>(blockIdx.x % arguments.channel_blocks) * C;
    const int channel = threadIdx.x % L::PAIRS * 2;
    const int walker = threadIdx.x / L::PAIRS;
    const int j = walker % TILE_COLUMNS;
    const int first_row = walker / TILE_COLUMNS * (ROWS / L::SEGMENTS);
    const int64_t channels_left = p.channels - first_channel - channel;
    const bool need_high = arguments.parts_high != nullptr;
    const bool need_low = arguments.parts_low != nullptr;
    const bool need_x = params.x_grad.data != nullptr;

    load_filter<C, THREADS>(high_filter, p.high_weight, p.channels, first_channel);
    load_filter<C, THREADS>(low_filter, p.low_weight, p.channels, first_channel);
    for (int c = threadIdx.x; c < C; c += THREADS) {
        const int64_t of = first_channel + c;
        const float deviation = of < p.channels ? inverse_deviation(p, of) : 0.0f;
        const bool sums = p.batch_stats && of < p.channels && (need_x || need_low);
        norm[c] = value_of(p.mean, of, p.channels, 0.0f);
        norm[C + c] = deviation;
        norm[2 * C + c] = deviation * value_of(p.norm_weight, of, p.channels, 1.0f);
        norm[3 * C + c] =
            sums ? load_vector<float, 1>(arguments.sums + of).elements[0] * arguments.inverse_count : 0.0f;
        norm[4 * C + c] = sums ? load_vector<float, 1>(arguments.sums + p.channels + of).elements[0] *
                                     arguments.inverse_count
                               : 0.0f;
    }
    __syncthreads();
    float high_taps[9][2], low_taps[9][2];
    read_taps<C>(high_taps, high_filter, channel);
    read_taps<C>(low_taps, low_filter, channel);
    float sums[SUMS][2] = {};

    for (uint32_t round = 0; round < arguments.rounds; ++round) {
        const uint32_t index = part * arguments.rounds + round;
        if (index >= arguments.tiles.count) {
            break;
        }
        const Tile tile = tile_of<ROWS>(arguments.tiles, index);
        copy_tile<T, ROWS, C, THREADS>(grad, params.grad, p, tile, first_channel, arguments.wide_maps);
        if (need_high || need_low) {
            copy_tile<T, ROWS, C, THREADS>(x, p.x, p, tile, first_channel, arguments.wide_maps);
        }
        if (need_x || need_low) {
            load_low_gradient<T, C>(low_grad, norm, params, tile, first_channel, arguments.wide_maps);
        }
        finish_copies();
        __syncthreads();
        const float factor = value_of(p.drop_path, tile.image, p.batch, 1.0f);
        T* const x_grad = static_cast<T*>(params.x_grad.data) + tile.image * params.x_grad.strides.n +
                          first_channel + channel;
        FUSED_OPS_NO_UNROLL
        for (int i = first_row; i < first_row + ROWS / L::SEGMENTS; ++i) {
            if (tile.row + i >= p.low_height || tile.column + j >= p.low_width) {
                break;
            }
            // Of the four pixels (a, b) that the low-resolution pixel stands for.
            float result[2][2][2] = {}, own[2][2][2];
            const int corner = (2 * i * HALO_COLUMNS + 2 * j) * C + channel;
            FUSED_OPS_UNROLL
            for (int r = 0; r < 4; ++r) {
                float row[4][2];
                read_row<T, C>(row, grad + corner + r * HALO_COLUMNS * C);
                FUSED_OPS_UNROLL
                for (int a = 0; a < 2; ++a) {
                    // The convolution's transpose: taps in reverse order.
                    const int tap = a + 2 - r;
                    FUSED_OPS_UNROLL
                    for (int b = 0; b < 2; ++b) {
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < 2; ++v) {
                            if (tap >= 0 && tap < 3) {
                                FUSED_OPS_UNROLL
                                for (int s = 0; s < 3; ++s) {
                                    result[a][b][v] += row[b + 2 - s][v] * high_taps[tap * 3 + s][v];
                                }
                            }
                            if (tap == 1) {
                                own[a][b][v] = row[b + 1][v];
                            }
                        }
                    }
                }
            }
            float low[2][2][2];
            FUSED_OPS_UNROLL
            for (int a = 0; a < 2; ++a) {
                FUSED_OPS_UNROLL
                for (int b = 0; b < 2; ++b) {
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < 2; ++v) {
                        low[a][b][v] = need_x || need_low
                                           ? low_grad[((i + a) * LOW_HALO + j + b) * C + channel + v]
                                           : 0.0f;
                    }
                }
            }
            if (need_x) {
                FUSED_OPS_UNROLL
                for (int a = 0; a < 2; ++a) {
                    FUSED_OPS_UNROLL
                    for (int b = 0; b < 2; ++b) {
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < 2; ++v) {
                            // An even row or column is read by the middle tap of its own low-resolution
                            // pixel, an odd one by the last tap of that and the first of the next.
                            float& sum = result[a][b][v];
                            sum = sum * factor + (p.identity ? own[a][b][v] : 0.0f);
                            sum += low[0][0][v] * low_taps[(1 + a) * 3 + 1 + b][v];
                            if (b == 1) {
                                sum += low[0][1][v] * low_taps[(1 + a) * 3][v];
                            }
                            if (a == 1) {
                                sum += low[1][0][v] * low_taps[1 + b][v];
                            }
                            if (a == 1 && b == 1) {
                                sum += low[1][1][v] * low_taps[0][v];
                            }
                        }
                        const int64_t row = 2 * (tile.row + i) + a;
                        const int64_t column = 2 * (tile.column + j) + b;
                        if (row < p.height && column < p.width) {
                            store_channels(
                                x_grad + row * params.x_grad.strides.h + column * params.x_grad.strides.w,
                                result[a][b][0], result[a][b][1], channels_left, arguments.wide_maps);
                        }
                    }
                }
            }
            if (!need_high && !need_low) {
                continue;
            }
            FUSED_OPS_UNROLL
            for (int v = 0; v < 2; ++v) {
                FUSED_OPS_UNROLL
                for (int pixel = 0; pixel < 4; ++pixel) {
                    own[pixel / 2][pixel % 2][v] *= factor;
                }
                sums[9][v] += (own[0][0][v] + own[0][1][v]) + (own[1][0][v] + own[1][1][v]);
            }
            FUSED_OPS_UNROLL
            for (int r = 0; r < 4; ++r) {
                float row[4][2];
                read_row<T, C>(row, x + corner + r * HALO_COLUMNS * C);
                FUSED_OPS_UNROLL
                for (int s = 0; s < 3; ++s) {
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < 2; ++v) {
                        FUSED_OPS_UNROLL
                        for (int a = 0; a < 2; ++a) {
                            const int tap = r - a;
                            if (tap >= 0 && tap < 3) {
                                sums[tap * 3 + s][v] +=
                                    own[a][0][v] * row[s][v] + own[a][1][v] * row[s + 1][v];
                            }
                        }
                        if (r < 3) {
                            sums[10 + r * 3 + s][v] += low[0][0][v] * row[s][v];
                        }
                    }
                }
            }
        }
        // The next tile takes this one's place.
        __syncthreads();
    }
    if (!need_high && !need_low) {
        return;
    }

    float* const gathered = low_grad;
    FUSED_OPS_UNROLL
    for (int row = 0; row < SUMS; ++row) {
        FUSED_OPS_UNROLL
        for (int v = 0; v < 2; ++v) {
            gathered[(walker * SUMS + row) * C + channel + v] = sums[row][v];
        }
    }
    __syncthreads();
    for (int item = threadIdx.x; item < SUMS * C; item += THREADS) {
        const int64_t of = first_channel + item % C;
        const int row = item / C;
        if (of >= p.channels) {
            continue;
        }
        float sum = 0.0f;
        for (int other = 0; other < L::WALKERS; ++other) {
            sum += gathered[other * SUMS * C + item];
        }
        const Vector<float, 1> total{{sum}};
        if (row < 10 && need_high) {
            const uint32_t rows = arguments.high_taps + HIGH_BIAS_ROWS;
            float* const target = arguments.parts_high + int64_t{part} * rows * p.channels + of;
            if (row < static_cast<int>(arguments.high_taps)) {
                store_vector(target + row * p.channels, total);
            } else if (row == 9) {
                for (int copy = 0; copy < HIGH_BIAS_ROWS; ++copy) {
                    store_vector(target + (arguments.high_taps + copy) * p.channels, total);
                }
            }
        }
        if (row >= 10 && need_low) {
            store_vector(arguments.parts_low + (int64_t{part} * 9 + row - 10) * p.channels + of, total);
        }
    }
}

template <typename T, int C>
const char* launch(const MapsBackwardArguments& arguments, void* stream) {
    return launch_kernel("hr_chain_maps_backward", hr_chain_maps_backward<T, C>,
                         arguments.parts * arguments.channel_blocks, THREADS, Layout<C>::BYTES, stream,
                         arguments);
}

}  // namespace

namespace hr_chain {

template <>
const char* launch_maps_backward<Scalar>(const MapsBackwardArguments& arguments, void* stream) {
    return arguments.params.problem.channels <= 16 ? launch<Scalar, 16>(arguments, stream)
                                                   : launch<Scalar, 32>(arguments, stream);
}

}  // namespace hr_chain

}  // namespace fused_ops
