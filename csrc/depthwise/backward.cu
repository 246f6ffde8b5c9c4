// Gradients of the depthwise convolution with its norm, activation and residual, in one pass. The gradient in
// front of the convolution (d below) is made from the incoming gradient and the convolution's own output and
// lives only in shared memory. Feature maps with neighbouring channels (channels_last).
//
// The threads of a block walk down a strip together. Before each step they put one more row of d in a ring of
// rows in shared memory, each element computed once; then every thread adds what the ring holds into its own
// positions of x's gradient and into its weight gradients, reading each row of d once for both. So the
// registers hold no ring, only K x K x V weight gradients and one step's rows:
//
//     tile of a thread    strip_rows x U positions of d, S strip_rows x S U positions of x, V channels
//     block of threads    lanes (<= 16) threads side by side over channels, times segments_per_block segments
//                         (image, strip, block of columns) of tiles_per_segment walkers each; `rounds` times,
//                         where partial sums of every block would weigh much beside the maps
//     shared memory       (K - 1) / S + 2 rows of segments x (tiles U + (K - 1) / S) positions of d x the
//                         block's channels in float; the K x K weights and six vectors of those channels
//
// One row of the ring is free to be written while the others are read, so one barrier per step is enough. x
// and what is added only once per position (bias sum, residual gradient, the norm's sums) have owners and no
// halo: position p of d belongs to the walker that has the centre of its window, S p - pad + K / 2.
#include "device.h"
#include "unit.h"

namespace fused_ops {

namespace {

using namespace depthwise;

// Blocks that must fit on a multiprocessor: as many as leave room for the weight gradients without spills.
template <typename T, int K, int S, int V>
constexpr int MIN_BLOCKS =
    K == 7 ? (V == 1 ? 3 : 2) : (V == 1 ? 4 : (V == 2 || (S == 1 && sizeof(T) == 2) ? 3 : 2));

template <typename T, int K, int S, int V, int U>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<T, K, S, V>)
    depthwise_backward(const __grid_constant__ BackwardArguments arguments) {
    using Table = ChannelTable<V>;
    // Rows and columns of d before position p that x's rows and columns at p take part in.
    constexpr int REACH = (K - 1) / S;
    constexpr int SLOTS = REACH + 2;
    constexpr int SPAN = U + REACH;
    constexpr int XU = S * U;
    // Positions of d that a thread loads at once.
    constexpr int BATCH = V == 4 ? U : U + 1;

    __shared__ Table weights[K * K];
    __shared__ NormGradient<V> norm;
    FUSED_OPS_DYNAMIC_SHARED(ring);

    const DepthwiseBackwardParams& params = arguments.params;
    const DepthwiseProblem& p = params.problem;
    const ChannelCut& cut = arguments.cut;
    const uint32_t channel_block = blockIdx.x % cut.blocks;
    const uint32_t part = blockIdx.x / cut.blocks;
    const bool pre = p.norm == NormPlacement::pre;
    const bool post = p.norm == NormPlacement::post;
    const uint32_t width = cut.lanes * V;

    for (int i = threadIdx.x; i < static_cast<int>(width); i += THREADS) {
        const int64_t channel = static_cast<int64_t>(channel_block) * width + i;
        if (channel >= p.channels) {
            break;
        }
        FUSED_OPS_UNROLL
        for (int k = 0; k < K * K; ++k) {
            weights[k].at(i) = weight_value(p.weight, channel, k / K, k % K);
        }
        if (pre || post) {
            norm.fill(i, channel, p, arguments.sums, arguments.inverse_count);
        }
    }
    __syncthreads();

    // Which segment this thread works on, and where: `tile` is its walker within the segment.
    const uint32_t lane = threadIdx.x % cut.lanes;
    const uint32_t walker = threadIdx.x / cut.lanes;
    const uint32_t tiles = arguments.tiles_per_segment;
    const uint32_t block_segment = walker / tiles;
    const uint32_t tile = walker % tiles;
    const uint32_t channel_group = channel_block * cut.lanes + lane;
    const bool has_place = block_segment < arguments.segments_per_block && channel_group < cut.groups;
    const uint32_t channel = channel_group * V;
    const int height = static_cast<int>(p.height);
    const int map_width = static_cast<int>(p.width);
    const int out_height = static_cast<int>(p.out_height);
    const int out_width = static_cast<int>(p.out_width);
    const int pad_h = static_cast<int>(p.pad_h);
    const int pad_w = static_cast<int>(p.pad_w);
    const int segment_columns = static_cast<int>(tiles) * U + REACH;
    const int row_columns = static_cast<int>(arguments.segments_per_block) * segment_columns;
    // This lane's channels in the segment's first column of the ring's first row.
    float* const segment_ring = ring + block_segment * segment_columns * width + lane * V;
    const uint32_t row_floats = row_columns * width;

    const bool identity = p.identity && p.residual_mode != ResidualMode::none;
    const bool add_residual = p.residual_mode == ResidualMode::before && p.activation != Activation::none;
    const Map& residual = p.identity ? p.x : p.residual;
    const bool has_raw = params.raw.data != nullptr;
    const bool need_x = arguments.need_x;
    const bool need_weight = arguments.need_weight;
    const bool post_sums = post && arguments.need_sums;
    const bool pre_sums = pre && arguments.need_sums;

    float weight_grad[K * K][V] = {};
    // Sums of d, and the two sums of the norm, of the second without the factor rstd.
    float own[3][V] = {};

    int slot = 0;
    FUSED_OPS_NO_UNROLL
    for (uint32_t round = 0; round < arguments.rounds; ++round) {
        if (round != 0) {
            // The rows before the first step are written without a barrier; the last step may still read
            // them.
            __syncthreads();
        }
        const uint32_t segment =
            (part * arguments.rounds + round) * arguments.segments_per_block + block_segment;
        const bool active = has_place && segment < arguments.segments;
        const uint32_t image_strip = segment / arguments.column_blocks;
        const uint32_t image = image_strip / arguments.strips;
        const int strip = image_strip % arguments.strips;
        // The segment's first row and column of x, and those of d with which they have tap 0 in common.
        const int x_row0 = arguments.first_row + strip * static_cast<int>(arguments.strip_rows) * S;
        const int x_column0 =
            arguments.first_column + static_cast<int>(segment % arguments.column_blocks * tiles) * XU;
        const int d_row0 = (x_row0 + pad_h) / S;
        const int d_column0 = (x_column0 + pad_w) / S - REACH;
        const int x_column = x_column0 + static_cast<int>(tile) * XU;
        // Bit j: column j of the tile's x lies inside the map.
        uint32_t inside = 0;
        FUSED_OPS_UNROLL
        for (int j = 0; j < XU; ++j) {
            inside |= (x_column + j >= 0 && x_column + j < map_width ? 1u : 0u) << j;
        }

        const auto before_activation = [&](const Vector<T, V>& grad, const Vector<T, V>& raw, int row,
                                           int column, float (&value_grad)[V], float (&centred)[V]) {
            norm.before_activation(
                lane, p, grad, raw,
                [&] { return load_vector<T, V>(map_address<T>(residual, image, row, column, channel)); },
                value_grad, centred);
        };

        const int iterations = static_cast<int>(arguments.strip_rows);
        FUSED_OPS_NO_UNROLL
        for (int i = -REACH; i < iterations; ++i) {
            // One more row of d. Neighbouring walkers load neighbouring columns.
            const int d_row = d_row0 + i;
            const int centre_row = d_row * S - pad_h + K / 2 - x_row0;
            const bool own_row = centre_row >= 0 && centre_row < iterations * S;
            const bool row_inside = active && d_row >= 0 && d_row < out_height;
            float* const row_ring = segment_ring + slot * row_floats;
            FUSED_OPS_NO_UNROLL
            for (int start = tile; active && start < segment_columns;
                 start += BATCH * static_cast<int>(tiles)) {
                Vector<T, V> grad[BATCH], raw[BATCH];
                uint32_t valid = 0;
                FUSED_OPS_UNROLL
                for (int n = 0; n < BATCH; ++n) {
                    const int column = start + n * static_cast<int>(tiles);
                    const int d_column = d_column0 + column;
                    const bool ok =
                        row_inside && column < segment_columns && d_column >= 0 && d_column < out_width;
                    valid |= (ok ? 1u : 0u) << n;
                    grad[n] =
                        ok ? load_vector<T, V>(map_address<T>(params.grad, image, d_row, d_column, channel))
                           : zero_vector<T, V>();
                    raw[n] =
                        ok && has_raw
                            ? load_vector<T, V>(map_address<T>(params.raw, image, d_row, d_column, channel))
                            : zero_vector<T, V>();
                }
                FUSED_OPS_UNROLL
                for (int n = 0; n < BATCH; ++n) {
                    const int column = start + n * static_cast<int>(tiles);
                    if (column >= segment_columns) {
                        break;
                    }
                    float d[V] = {};
                    if (valid >> n & 1u) {
                        float value_grad[V], centred[V];
                        before_activation(grad[n], raw[n], d_row, d_column0 + column, value_grad, centred);
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            d[v] = value_grad[v];
                        }
                        if (post) {
                            norm.before_norm(lane, d, centred);
                        }
                        const int centre_column = (d_column0 + column) * S - pad_w + K / 2 - x_column0;
                        if (own_row && centre_column >= 0 && centre_column < static_cast<int>(tiles) * XU) {
                            FUSED_OPS_UNROLL
                            for (int v = 0; v < V; ++v) {
                                own[0][v] += d[v];
                            }
                            if (post_sums) {
                                FUSED_OPS_UNROLL
                                for (int v = 0; v < V; ++v) {
                                    own[1][v] += value_grad[v];
                                    own[2][v] += value_grad[v] * centred[v];
                                }
                            }
                            if (params.residual_grad.data != nullptr) {
                                Vector<T, V> result;
                                FUSED_OPS_UNROLL
                                for (int v = 0; v < V; ++v) {
                                    result.elements[v] = from_float<T>(value_grad[v]);
                                }
                                store_vector<T, V>(mutable_address<T>(params.residual_grad, image, d_row,
                                                                      d_column0 + column, channel),
                                                   result);
                            }
                        }
                    }
                    write_shared(row_ring + column * width, d);
                }
            }
            const int newest = slot;
            slot = slot + 1 == SLOTS ? 0 : slot + 1;
            if (i < 0) {
                continue;
            }

            Vector<T, V> loaded[S][XU];
            FUSED_OPS_UNROLL
            for (int a = 0; a < S; ++a) {
                const int row = x_row0 + i * S + a;
                const bool ok = active && row >= 0 && row < height && need_weight;
                const T* const source = map_address<T>(p.x, image, row, x_column, channel);
                FUSED_OPS_UNROLL
                for (int j = 0; j < XU; ++j) {
                    loaded[a][j] = ok && (inside >> j & 1u) ? load_vector<T, V>(source + j * p.x.strides.w)
                                                            : zero_vector<T, V>();
                }
            }
            // The newest row of d.
            __syncthreads();
            if (!active) {
                continue;
            }

            // Row x_row0 + i S + a of x meets row d_row - m of d at tap row a + m S, and column x_column + u
            // S + b meets column u - n of the tile at tap column b + n S.
            FUSED_OPS_UNROLL
            for (int a = 0; a < S; ++a) {
                const int row = x_row0 + i * S + a;
                if (row < 0 || row >= height) {
                    continue;
                }
                // What the convolution reads: the normalised x, and zero outside it.
                float z[XU][V];
                FUSED_OPS_UNROLL
                for (int j = 0; j < XU; ++j) {
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        z[j][v] = to_float(loaded[a][j].elements[v]);
                    }
                }
                if (pre && need_weight) {
                    float own_mean[V], own_scale[V], own_beta[V];
                    norm.mean.read_all(lane, own_mean);
                    norm.scale.read_all(lane, own_scale);
                    norm.beta.read_all(lane, own_beta);
                    FUSED_OPS_UNROLL
                    for (int j = 0; j < XU; ++j) {
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            z[j][v] = inside >> j & 1u ? (z[j][v] - own_mean[v]) * own_scale[v] + own_beta[v]
                                                       : 0.0f;
                        }
                    }
                }
                float x_grad[XU][V] = {};
                const auto convolve = [&]<bool X, bool WEIGHT>() {
                    FUSED_OPS_UNROLL
                    for (int m = 0; a + m * S < K; ++m) {
                        const int kh = a + m * S;
                        const int read_slot = newest - m < 0 ? newest - m + SLOTS : newest - m;
                        const float* const source = segment_ring + read_slot * row_floats + tile * U * width;
                        [[maybe_unused]] float taps[K][V];
                        if constexpr (X) {
                            FUSED_OPS_UNROLL
                            for (int kw = 0; kw < K; ++kw) {
                                weights[kh * K + kw].read_all(lane, taps[kw]);
                            }
                        }
                        // One column of d at a time: it takes fewer registers than one tap at a time.
                        FUSED_OPS_UNROLL
                        for (int j = 0; j < SPAN; ++j) {
                            float d[V];
                            read_shared(source + j * width, d);
                            FUSED_OPS_UNROLL
                            for (int kw = 0; kw < K; ++kw) {
                                const int u = j - REACH + kw / S;
                                if (u < 0 || u >= U) {
                                    continue;
                                }
                                FUSED_OPS_UNROLL
                                for (int v = 0; v < V; ++v) {
                                    if constexpr (X) {
                                        x_grad[u * S + kw % S][v] += d[v] * taps[kw][v];
                                    }
                                    if constexpr (WEIGHT) {
                                        weight_grad[kh * K + kw][v] += z[u * S + kw % S][v] * d[v];
                                    }
                                }
                            }
                        }
                    }
                };
                if (need_x && need_weight) {
                    convolve.template operator()<true, true>();
                } else if (need_x) {
                    convolve.template operator()<true, false>();
                } else if (need_weight) {
                    convolve.template operator()<false, true>();
                }

                if (!need_x) {
                    continue;
                }
                T* const target = mutable_address<T>(params.x_grad, image, row, x_column, channel);
                FUSED_OPS_UNROLL
                for (int j = 0; j < XU; ++j) {
                    if (!(inside >> j & 1u)) {
                        continue;
                    }
                    float value[V];
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        value[v] = x_grad[j][v];
                    }
                    if (pre_sums) {
                        // Loaded anew, from L1: keeping it from above costs registers that the kernel lacks.
                        const Vector<T, V> again =
                            load_vector<T, V>(map_address<T>(p.x, image, row, x_column + j, channel));
                        float own_mean[V];
                        norm.mean.read_all(lane, own_mean);
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            own[1][v] += value[v];
                            own[2][v] += value[v] * (to_float(again.elements[v]) - own_mean[v]);
                        }
                    }
                    if (pre) {
                        float own_scale[V];
                        norm.scale.read_all(lane, own_scale);
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            value[v] *= own_scale[v];
                        }
                    }
                    if (params.x_grad.data == nullptr) {
                        continue;
                    }
                    if (identity) {
                        // x is the residual too, and position (row, column) that of the output.
                        const Vector<T, V> grad =
                            load_vector<T, V>(map_address<T>(params.grad, image, row, x_column + j, channel));
                        float value_grad[V];
                        if (add_residual) {
                            float centred[V];
                            before_activation(grad,
                                              load_vector<T, V>(map_address<T>(params.raw, image, row,
                                                                               x_column + j, channel)),
                                              row, x_column + j, value_grad, centred);
                        } else {
                            FUSED_OPS_UNROLL
                            for (int v = 0; v < V; ++v) {
                                value_grad[v] = to_float(grad.elements[v]);
                            }
                        }
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            value[v] += value_grad[v];
                        }
                    }
                    Vector<T, V> result;
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        result.elements[v] = from_float<T>(value[v]);
                    }
                    store_vector<T, V>(target + j * params.x_grad.strides.w, result);
                }
            }
        }
    }

    if (arguments.part_rows != 0) {
        if (has_place && arguments.need_sums) {
            float own_rstd[V];
            norm.rstd.read_all(lane, own_rstd);
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                own[2][v] *= own_rstd[v];
            }
        }
        store_sums(ring, backward_ring_floats(K, S, row_columns, width, V), weight_grad, own,
                   need_weight ? K * K : 0, arguments.need_bias ? 1 : 0, arguments.need_sums ? 2 : 0, cut,
                   arguments.walkers_per_block, part, channel_block, p.channels, arguments.parts);
    }
}

}  // namespace

namespace depthwise {

template <>
const char* launch_backward<Scalar, FUSED_OPS_KERNEL>(const BackwardArguments& arguments, int vector,
                                                      int columns, uint32_t blocks, void* stream) {
    constexpr int K = FUSED_OPS_KERNEL;
    if (arguments.params.problem.planes) {
        return launch_planes_backward<Scalar, K>(arguments, vector, blocks, stream);
    }
    const int stride = arguments.params.problem.stride;
    void (*kernel)(BackwardArguments) = nullptr;
#define FUSED_OPS_INSTANCE(S, V, U)                      \
    if (stride == S && vector == V && columns == U) {    \
        kernel = depthwise_backward<Scalar, K, S, V, U>; \
    }
#if FUSED_OPS_KERNEL == 3
    FUSED_OPS_INSTANCE(1, 4, 4)
    FUSED_OPS_INSTANCE(2, 4, 2)
#endif
    FUSED_OPS_INSTANCE(1, 2, 4)
    FUSED_OPS_INSTANCE(1, 1, 4)
    FUSED_OPS_INSTANCE(2, 2, 2)
    FUSED_OPS_INSTANCE(2, 1, 2)
#undef FUSED_OPS_INSTANCE
    if (kernel == nullptr) {
        return "no backward kernel was compiled for this vector and columns";
    }
    const uint32_t row_columns =
        arguments.segments_per_block * (arguments.tiles_per_segment * columns + (K - 1) / stride);
    const uint32_t floats =
        backward_ring_floats(K, stride, row_columns, arguments.cut.lanes * vector, vector);
    return launch_kernel("depthwise_backward", kernel, blocks, THREADS, floats * sizeof(float), stream,
                         arguments);
}

}  // namespace depthwise

}  // namespace fused_ops
