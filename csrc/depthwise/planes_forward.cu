// Depthwise convolution, forward, as forward.cu, on maps whose columns are neighbours (NCHW).
//
// A block has segments (tiles of planes) of one channel in shared memory, in float and with their halo: each
// input is read, normalised and padded with zeros once. Then a thread owns V neighbouring output columns and
// walks down a strip of rows of a segment, with the weights and the sums of (K - 1) / S + 1 output rows in
// registers; a row of shared memory is read once for all of them:
//
//     tile of a thread   strip_rows x V outputs, V as many columns as one access of every map has
//     block of threads   lanes threads side by side over columns, times strips, times segments_at_once
//     shared memory      segments_at_once tiles of ((tile_rows - 1) S + K) rows and
//                        (lanes - 1) V S + round_up((V - 1) S + K, V) columns of floats, about 16 KiB
//
// Outputs of neighbouring lanes are neighbours in memory, so stores are whole sectors on narrow maps too.
#include "planes.h"
#include "unit.h"

namespace fused_ops {

namespace {

using namespace depthwise;

// Blocks that must fit on a multiprocessor: as many as leave room for all registers.
template <int K, int V>
constexpr int MIN_BLOCKS = K == 7 ? 4 : (K == 5 ? (V == 4 ? 5 : 6) : 8);

template <typename T, int K, int S, int V, bool STATISTICS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<K, V>)
    planes_forward(const __grid_constant__ ForwardArguments arguments) {
    constexpr int COLUMNS = round_up((V - 1) * S + K, V);
    // Output rows that still wait for input when one is finished.
    constexpr int WAITING = (K - 1) / S;
    __shared__ float shared_weights[K * K];
    __shared__ SegmentPlace places[THREADS];
    FUSED_OPS_DYNAMIC_SHARED(tiles);

    const DepthwiseProblem& p = arguments.params.problem;
    const PlaneCut& cut = arguments.planes;
    const Map& raw = arguments.params.raw;
    const int64_t channel = blockIdx.x % p.channels;
    const uint32_t part = static_cast<uint32_t>(blockIdx.x / p.channels);
    const bool pre = p.norm == NormPlacement::pre;
    const bool post = !STATISTICS && p.norm == NormPlacement::post;
    if (threadIdx.x < K * K) {
        shared_weights[threadIdx.x] = weight_value(p.weight, channel, threadIdx.x / K, threadIdx.x % K);
    }
    place_segments(cut, part, 0, places);
    // (value - center) * scale + shift is BatchNorm; see forward.cu.
    float center = 0.0f, scale = 1.0f, shift = 0.0f;
    if (pre || post) {
        center = channel_value(p.mean, channel, 0.0f);
        scale = channel_value(p.norm_weight, channel, 1.0f) * reciprocal_deviation(p.var, channel, p.eps);
        shift = channel_value(p.norm_bias, channel, 0.0f);
    }
    const float bias = channel_value(p.bias, channel, 0.0f);
    __syncthreads();

    const int pad_h = static_cast<int>(p.pad_h);
    const int pad_w = static_cast<int>(p.pad_w);
    struct Piece {
        Vector<T, V> vector;
        bool inside;
    };
    const auto load = [&](const SegmentPlace& place, int tile_row, int tile_column) {
        const int row = place.row * S - pad_h + tile_row;
        const int column = place.column * S - pad_w + tile_column;
        const bool inside = place.image >= 0 && row >= 0 && row < p.height && column >= 0 && column < p.width;
        return Piece{inside ? load_vector<T, V>(map_address<T, true>(p.x, place.image, row, column, channel))
                            : zero_vector<T, V>(),
                     inside};
    };
    stage<V, 4>(cut, places, -pad_w & (V - 1), tiles, load, [&](const Piece& piece, float (&values)[V]) {
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            values[v] = to_float(piece.vector.elements[v]);
            if (pre) {
                // Zero padding applies to the normalised input.
                values[v] = piece.inside ? (values[v] - center) * scale + shift : 0.0f;
            }
        }
    });
    __syncthreads();

    const PlaneWalker walker(cut);
    const SegmentPlace place = places[walker.segment];
    const int64_t column = place.column + static_cast<int64_t>(walker.lane) * V;
    const int first_row = place.row + static_cast<int>(walker.first_row);
    const int rows_left = static_cast<int>(p.out_height) - first_row;
    int rows = static_cast<int>(walker.rows);
    rows = rows_left < rows ? rows_left : rows;
    rows = rows > 0 && place.image >= 0 && column < p.out_width ? rows : 0;
    float weights[K * K];
    FUSED_OPS_UNROLL
    for (int k = 0; k < K * K; ++k) {
        weights[k] = shared_weights[k];
    }
    const float* source =
        tiles + (walker.segment * cut.shared_rows + walker.first_row * S) * cut.pitch + walker.lane * V * S;
    const Map& residual = p.identity ? p.x : p.residual;
    const auto offset_of = [&](const Map& map) {
        return map_offset<true>(map.strides, place.image, first_row, column, channel);
    };
    int64_t residual_offset = offset_of(residual);
    int64_t out_offset = offset_of(arguments.params.out);
    int64_t raw_offset = offset_of(raw);

    // Sums of the output rows that need more input rows, the newest first.
    float open[WAITING][V] = {};
    [[maybe_unused]] RunningMoments moments;

    // Step j reads the input rows j S .. j S + S - 1 of the strip; row j S + phase is tap row phase + m S of
    // output row j - m. The first one finishes output row j - WAITING.
    const int steps = rows > 0 ? rows + WAITING : 0;
    FUSED_OPS_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
        float finished[V];
        FUSED_OPS_UNROLL
        for (int phase = 0; phase < S; ++phase) {
            if (phase > 0 && step == steps - 1) {
                break;
            }
            float values[COLUMNS];
            read_columns<V>(source, values);
            source += cut.pitch;
            FUSED_OPS_UNROLL
            for (int m = WAITING; m >= 0; --m) {
                const int kh = phase + m * S;
                if (kh >= K) {
                    continue;
                }
                float (&target)[V] = m == WAITING ? finished : open[m < WAITING ? m : 0];
                if (phase == 0) {
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        target[v] = m > 0 ? open[m > 0 ? m - 1 : 0][v] : 0.0f;
                    }
                }
                // The same for all threads but those of a shorter strip: no work for rows of other strips.
                if (step < m || step - m >= rows) {
                    continue;
                }
                FUSED_OPS_UNROLL
                for (int kw = 0; kw < K; ++kw) {
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        target[v] += values[v * S + kw] * weights[kh * K + kw];
                    }
                }
            }
        }
        if (step < WAITING) {
            continue;
        }
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            finished[v] += bias;
        }
        if (STATISTICS || raw.data != nullptr || (post && p.batch_stats)) {
            Vector<T, V> rounded;
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                rounded.elements[v] = from_float<T>(finished[v]);
                if constexpr (STATISTICS) {
                    // Moments of what is stored, or would be: the normalised values then have mean 0.
                    moments.add(to_float(rounded.elements[v]), v == 0 && step == WAITING);
                }
                if (post && p.batch_stats) {
                    // Convolved a second time rather than stored: the same values as the statistics saw.
                    finished[v] = to_float(rounded.elements[v]);
                }
            }
            if (raw.data != nullptr) {
                store_vector<T, V>(static_cast<T*>(raw.data) + raw_offset, rounded);
                raw_offset += raw.strides.h;
            }
        }
        if constexpr (!STATISTICS) {
            if (post) {
                FUSED_OPS_UNROLL
                for (int v = 0; v < V; ++v) {
                    finished[v] = (finished[v] - center) * scale + shift;
                }
            }
            const Vector<T, V> added =
                p.residual_mode != ResidualMode::none
                    ? load_vector<T, V>(static_cast<const T*>(residual.data) + residual_offset)
                    : zero_vector<T, V>();
            residual_offset += residual.strides.h;
            store_vector<T, V>(static_cast<T*>(arguments.params.out.data) + out_offset,
                               activate_with_residual<T, V>(finished, added, p.residual_mode, p.activation));
            out_offset += arguments.params.out.strides.h;
        }
    }

    if constexpr (STATISTICS) {
        store_plane_moments(moments, rows * V, part, channel, p.channels, arguments.part_count,
                            arguments.part_mean, arguments.part_m2);
    }
}

}  // namespace

namespace depthwise {

template <>
const char* launch_planes_forward<Scalar, FUSED_OPS_KERNEL>(const ForwardArguments& arguments, int vector,
                                                            uint32_t blocks, bool statistics, void* stream) {
    constexpr int K = FUSED_OPS_KERNEL;
    const int stride = arguments.params.problem.stride;
    void (*kernel)(ForwardArguments) = nullptr;
#define FUSED_OPS_INSTANCE(S, V)                                                                         \
    if (stride == S && vector == V) {                                                                    \
        kernel =                                                                                         \
            statistics ? planes_forward<Scalar, K, S, V, true> : planes_forward<Scalar, K, S, V, false>; \
    }
    FUSED_OPS_INSTANCE(1, 4)
    FUSED_OPS_INSTANCE(1, 2)
    FUSED_OPS_INSTANCE(1, 1)
    FUSED_OPS_INSTANCE(2, 4)
    FUSED_OPS_INSTANCE(2, 2)
    FUSED_OPS_INSTANCE(2, 1)
#undef FUSED_OPS_INSTANCE
    if (kernel == nullptr) {
        return "no forward kernel on planes was compiled for this vector";
    }
    return launch_kernel(statistics ? "depthwise_forward_statistics" : "depthwise_forward", kernel, blocks,
                         THREADS, arguments.planes.floats() * sizeof(float), stream, arguments);
}

}  // namespace depthwise

}  // namespace fused_ops
