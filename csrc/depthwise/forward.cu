// Depthwise convolution, forward, with BatchNorm on the input as it is loaded or on the output before it is
// stored, an activation and a residual; or the bare convolution with the moments of its output, for a norm by
// batch statistics that follows. Feature maps with neighbouring channels (channels_last).
//
// One thread owns V neighbouring channels and TW neighbouring output columns and walks down a strip of output
// rows. An input row is loaded and converted once and added into the output rows that it touches, so the
// registers hold the sums of (K - 1) / S + 1 output rows and one row of input:
//
//     tile of a thread   strip_rows x TW outputs x V channels, from ((strip_rows - 1) S + K) rows of
//                        ((TW - 1) S + K) inputs
//     block of threads   lanes (<= 16) threads side by side over channels, times walkers_per_block
//                        (128 / lanes) walkers, each one (image, strip, column tile)
//     shared memory      the K x K weights and the affine vectors of the block's channels, in float
//
// Lanes run fastest over channels, then over column tiles: both are contiguous in memory, so a warp's
// accesses are whole sectors whatever the channel count is. Zero padding applies to the normalised input: a
// padded position contributes 0 and never the norm of 0.
#include <type_traits>

#include "device.h"
#include "unit.h"

namespace fused_ops {

namespace {

using namespace depthwise;

// Blocks that must fit on a multiprocessor. Left to itself the compiler aims at more and spills; converting
// to bfloat16 takes a few registers more.
template <typename T, int K, int V>
constexpr int MIN_BLOCKS = K == 3 ? (V == 1 ? 7 : (V == 2 ? 5 : 3))
                                  : (V == 1 ? 5 : (K == 5 && V == 4 && std::is_same_v<T, bfloat16> ? 2 : 3));

template <typename T, int K, int S, int V, int TW, bool STATISTICS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<T, K, V>)
    depthwise_forward(const __grid_constant__ ForwardArguments arguments) {
    using Table = ChannelTable<V>;
    constexpr int PART = Table::PART;
    constexpr int PARTS = Table::PARTS;
    constexpr int COLUMNS = (TW - 1) * S + K;
    // Output rows that still wait for input when one is finished.
    constexpr int WAITING = (K - 1) / S;

    // center, scale, shift: (value - center) * scale + shift is BatchNorm. The mean is subtracted first and
    // not folded into the shift, which would cancel badly where the mean is large against the deviation.
    __shared__ Table weights[K * K];
    __shared__ Table center, scale, shift, bias;

    const DepthwiseProblem& p = arguments.params.problem;
    const ChannelCut& cut = arguments.cut;
    const uint32_t channel_block = blockIdx.x % cut.blocks;
    const uint32_t walker_block = blockIdx.x / cut.blocks;
    const bool pre = p.norm == NormPlacement::pre;
    const bool post = !STATISTICS && p.norm == NormPlacement::post;

    for (int i = threadIdx.x; i < static_cast<int>(cut.lanes) * V; i += THREADS) {
        const int64_t channel = static_cast<int64_t>(channel_block) * cut.lanes * V + i;
        if (channel >= p.channels) {
            break;
        }
        FUSED_OPS_UNROLL
        for (int k = 0; k < K * K; ++k) {
            weights[k].at(i) = weight_value(p.weight, channel, k / K, k % K);
        }
        if (pre || post) {
            center.at(i) = channel_value(p.mean, channel, 0.0f);
            scale.at(i) =
                channel_value(p.norm_weight, channel, 1.0f) * reciprocal_deviation(p.var, channel, p.eps);
            shift.at(i) = channel_value(p.norm_bias, channel, 0.0f);
        }
        bias.at(i) = channel_value(p.bias, channel, 0.0f);
    }
    __syncthreads();

    const uint32_t lane = threadIdx.x % cut.lanes;
    const uint32_t block_walker = threadIdx.x / cut.lanes;
    const uint32_t channel_group = channel_block * cut.lanes + lane;
    const uint32_t walker = walker_block * arguments.walkers_per_block + block_walker;
    const bool active = block_walker < arguments.walkers_per_block && channel_group < cut.groups &&
                        walker < arguments.walkers;
    if (!STATISTICS && !active) {
        return;
    }
    const uint32_t column_tile = walker % arguments.column_tiles;
    const uint32_t image_strip = walker / arguments.column_tiles;
    const int64_t image = image_strip / arguments.strips;
    const int64_t channel = static_cast<int64_t>(channel_group) * V;
    const int64_t first_column = static_cast<int64_t>(column_tile) * TW;
    const int64_t first_row = static_cast<int64_t>(image_strip % arguments.strips) * arguments.strip_rows;
    const int64_t rows_left = p.out_height - first_row;
    const int rows = rows_left < arguments.strip_rows ? static_cast<int>(rows_left)
                                                      : static_cast<int>(arguments.strip_rows);
    const int columns = p.out_width - first_column < TW ? static_cast<int>(p.out_width - first_column) : TW;
    const int steps = active ? rows + WAITING : 0;

    // Bit j: column j of the tile's input lies inside the map.
    uint32_t inside = 0;
    FUSED_OPS_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
        const int64_t column = first_column * S - p.pad_w + j;
        inside |= (column >= 0 && column < p.width ? 1u : 0u) << j;
    }

    const T* x = static_cast<const T*>(p.x.data);
    int64_t x_offset = image * p.x.strides.n + (first_row * S - p.pad_h) * p.x.strides.h +
                       (first_column * S - p.pad_w) * p.x.strides.w + channel;
    const auto offset_of = [&](const Map& map) {
        return map_offset(map.strides, image, first_row, first_column, channel);
    };
    const Map& residual = p.identity ? p.x : p.residual;
    int64_t residual_offset = offset_of(residual);
    int64_t out_offset = offset_of(arguments.params.out);
    int64_t raw_offset = offset_of(arguments.params.raw);

    // Sums of the output rows that need more input rows, the newest first.
    float open[WAITING][TW][V];
    FUSED_OPS_UNROLL
    for (int m = 0; m < WAITING; ++m) {
        FUSED_OPS_UNROLL
        for (int t = 0; t < TW; ++t) {
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                open[m][t][v] = 0.0f;
            }
        }
    }
    [[maybe_unused]] RunningMoments moments[V];

    // Step j reads the input rows j S .. j S + S - 1 of the strip; row j S + phase is tap row phase + m S of
    // output row j - m. The first one finishes output row j - WAITING.
    FUSED_OPS_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
        float finished[TW][V];
        FUSED_OPS_UNROLL
        for (int phase = 0; phase < S; ++phase) {
            const int64_t row = (first_row + step) * S - p.pad_h + phase;
            // The last rows of the strip's last step belong to the next strip.
            const bool row_inside = row >= 0 && row < p.height && (phase == 0 || step < rows + WAITING - 1);
            Vector<T, V> loaded[COLUMNS];
            FUSED_OPS_UNROLL
            for (int j = 0; j < COLUMNS; ++j) {
                loaded[j] = row_inside && (inside >> j & 1u)
                                ? load_vector<T, V>(x + x_offset + j * p.x.strides.w)
                                : zero_vector<T, V>();
            }
            x_offset += p.x.strides.h;
            // The sums move on by one place per step; the first multiply-add of a row writes where it moves
            // to, so that costs no instruction.
            const auto move_on = [&] {
                FUSED_OPS_UNROLL
                for (int t = 0; t < TW; ++t) {
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        finished[t][v] = open[WAITING - 1][t][v];
                        FUSED_OPS_UNROLL
                        for (int m = WAITING - 1; m > 0; --m) {
                            open[m][t][v] = open[m - 1][t][v];
                        }
                        open[0][t][v] = 0.0f;
                    }
                }
            };
            if (row_inside) {
                if (phase == 0) {
                    move_on();
                }
                FUSED_OPS_UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    float values[COLUMNS][PART];
                    FUSED_OPS_UNROLL
                    for (int j = 0; j < COLUMNS; ++j) {
                        FUSED_OPS_UNROLL
                        for (int q = 0; q < PART; ++q) {
                            values[j][q] = to_float(loaded[j].elements[part * PART + q]);
                        }
                    }
                    if (pre) {
                        float part_center[PART], part_scale[PART], part_shift[PART];
                        center.read(part, lane, part_center);
                        scale.read(part, lane, part_scale);
                        shift.read(part, lane, part_shift);
                        FUSED_OPS_UNROLL
                        for (int j = 0; j < COLUMNS; ++j) {
                            FUSED_OPS_UNROLL
                            for (int q = 0; q < PART; ++q) {
                                const float normalised =
                                    (values[j][q] - part_center[q]) * part_scale[q] + part_shift[q];
                                values[j][q] = inside >> j & 1u ? normalised : 0.0f;
                            }
                        }
                    }
                    FUSED_OPS_UNROLL
                    for (int m = WAITING; m >= 0; --m) {
                        const int kh = phase + m * S;
                        if (kh >= K) {
                            continue;
                        }
                        FUSED_OPS_UNROLL
                        for (int kw = 0; kw < K; ++kw) {
                            float tap[PART];
                            weights[kh * K + kw].read(part, lane, tap);
                            FUSED_OPS_UNROLL
                            for (int t = 0; t < TW; ++t) {
                                FUSED_OPS_UNROLL
                                for (int q = 0; q < PART; ++q) {
                                    const int v = part * PART + q;
                                    const float value = values[t * S + kw][q];
                                    if (m == WAITING) {
                                        finished[t][v] += value * tap[q];
                                    } else {
                                        open[m < WAITING ? m : 0][t][v] += value * tap[q];
                                    }
                                }
                            }
                        }
                    }
                }
            } else if (phase == 0) {
                move_on();
            }
        }
        if (step < WAITING) {
            continue;
        }

        [[maybe_unused]] Vector<T, V> added[TW];
        if constexpr (!STATISTICS) {
            if (p.residual_mode != ResidualMode::none) {
                FUSED_OPS_UNROLL
                for (int t = 0; t < TW; ++t) {
                    if (t < columns) {
                        added[t] = load_vector<T, V>(static_cast<const T*>(residual.data) + residual_offset +
                                                     t * residual.strides.w);
                    }
                }
                residual_offset += residual.strides.h;
            }
        }
        FUSED_OPS_UNROLL
        for (int t = 0; t < TW; ++t) {
            if (t >= columns) {
                break;
            }
            float values[V];
            float channel_bias[V];
            bias.read_all(lane, channel_bias);
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                values[v] = finished[t][v] + channel_bias[v];
            }
            if (STATISTICS || arguments.params.raw.data != nullptr) {
                Vector<T, V> rounded;
                FUSED_OPS_UNROLL
                for (int v = 0; v < V; ++v) {
                    rounded.elements[v] = from_float<T>(values[v]);
                }
                if (arguments.params.raw.data != nullptr) {
                    store_vector<T, V>(static_cast<T*>(arguments.params.raw.data) + raw_offset +
                                           t * arguments.params.raw.strides.w,
                                       rounded);
                }
                if constexpr (STATISTICS) {
                    // Moments of what is stored, or would be: the normalised values then have mean 0.
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        moments[v].add(to_float(rounded.elements[v]), t == 0 && step == WAITING);
                    }
                }
            }
            if constexpr (!STATISTICS) {
                if (post && p.batch_stats) {
                    // Convolved a second time rather than stored: the same values as the statistics saw.
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        values[v] = to_float(from_float<T>(values[v]));
                    }
                }
                if (post) {
                    FUSED_OPS_UNROLL
                    for (int part = 0; part < PARTS; ++part) {
                        float part_center[PART], part_scale[PART], part_shift[PART];
                        center.read(part, lane, part_center);
                        scale.read(part, lane, part_scale);
                        shift.read(part, lane, part_shift);
                        FUSED_OPS_UNROLL
                        for (int q = 0; q < PART; ++q) {
                            float& value = values[part * PART + q];
                            value = (value - part_center[q]) * part_scale[q] + part_shift[q];
                        }
                    }
                }
                store_vector<T, V>(
                    static_cast<T*>(arguments.params.out.data) + out_offset +
                        t * arguments.params.out.strides.w,
                    activate_with_residual<T, V>(values, added[t], p.residual_mode, p.activation));
            }
        }
        raw_offset += arguments.params.raw.strides.h;
        out_offset += arguments.params.out.strides.h;
    }

    if constexpr (STATISTICS) {
        __shared__ MomentsExchange<V> exchange;
        const float count = active ? static_cast<float>(rows * columns) : 0.0f;
        float mean[V], m2[V];
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            moments[v].finish(count, mean[v], m2[v]);
        }
        store_moments(exchange, cut, arguments.walkers_per_block, walker_block, channel_block, p.channels,
                      count, mean, m2, arguments.part_count, arguments.part_mean, arguments.part_m2);
    }
}

}  // namespace

namespace depthwise {

template <>
const char* launch_forward<Scalar, FUSED_OPS_KERNEL>(const ForwardArguments& arguments, int vector,
                                                     int columns, uint32_t blocks, bool statistics,
                                                     void* stream) {
    constexpr int K = FUSED_OPS_KERNEL;
    if (arguments.params.problem.planes) {
        return launch_planes_forward<Scalar, K>(arguments, vector, blocks, statistics, stream);
    }
    const int stride = arguments.params.problem.stride;
    void (*kernel)(ForwardArguments) = nullptr;
#define FUSED_OPS_INSTANCE(S, V, TW)                                         \
    if (stride == S && vector == V && columns == TW) {                       \
        kernel = statistics ? depthwise_forward<Scalar, K, S, V, TW, true>   \
                            : depthwise_forward<Scalar, K, S, V, TW, false>; \
    }
#if FUSED_OPS_KERNEL == 3
#    if FUSED_OPS_SCALAR != 0
    FUSED_OPS_INSTANCE(1, 8, 2)
#    endif
    FUSED_OPS_INSTANCE(1, 4, 4)
    FUSED_OPS_INSTANCE(1, 2, 4)
    FUSED_OPS_INSTANCE(1, 1, 4)
    FUSED_OPS_INSTANCE(2, 4, 2)
    FUSED_OPS_INSTANCE(2, 2, 4)
    FUSED_OPS_INSTANCE(2, 1, 4)
#elif FUSED_OPS_KERNEL == 5
    FUSED_OPS_INSTANCE(1, 4, 4)
    FUSED_OPS_INSTANCE(1, 2, 4)
    FUSED_OPS_INSTANCE(1, 1, 4)
    FUSED_OPS_INSTANCE(2, 4, 2)
    FUSED_OPS_INSTANCE(2, 2, 4)
    FUSED_OPS_INSTANCE(2, 1, 4)
#else
    FUSED_OPS_INSTANCE(1, 2, 4)
    FUSED_OPS_INSTANCE(1, 1, 4)
    FUSED_OPS_INSTANCE(2, 2, 2)
    FUSED_OPS_INSTANCE(2, 1, 4)
#endif
#undef FUSED_OPS_INSTANCE
    if (kernel == nullptr) {
        return "no forward kernel was compiled for this vector and columns";
    }
    return launch_kernel(statistics ? "depthwise_forward_statistics" : "depthwise_forward", kernel, blocks,
                         THREADS, 0, stream, arguments);
}

}  // namespace depthwise

}  // namespace fused_ops
