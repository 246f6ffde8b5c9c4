// Gradients of the depthwise convolution, as backward.cu, on maps whose columns are neighbours (NCHW).
//
// A block has the gradient in front of the convolution (d below) on segments of one channel in shared memory,
// with its halo, each element computed once. Then a thread owns S V neighbouring columns of x and walks down
// a strip of rows, x read once from memory for both its own gradient and the weights':
//
//     tile of a thread   strip_rows x V positions of d, S strip_rows x S V positions of x
//     block of threads   lanes threads side by side over columns, times strips, times segments_at_once;
//                        `rounds` times, where partial sums of every block would weigh much beside the maps
//     shared memory      segments_at_once tiles of (tile_rows + (K - 1) / S) x ((lanes - 1) V + round_up(V +
//                        (K - 1) / S, V)) floats, about 16 KiB
//
// What is added only once per position (bias sum, residual gradient, the norm's sums) has owners, as there.
#include "planes.h"
#include "unit.h"

namespace fused_ops {

namespace {

using namespace depthwise;

// Blocks that must fit on a multiprocessor.
template <int K>
constexpr int MIN_BLOCKS = K == 7 ? 3 : 4;

template <typename T, int K, int S, int V>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<K>)
    planes_backward(const __grid_constant__ BackwardArguments arguments) {
    // Rows and columns of d before position p that x's rows and columns at p take part in.
    constexpr int REACH = (K - 1) / S;
    constexpr int SPAN = V + REACH;
    constexpr int COLUMNS = round_up(SPAN, V);
    // Rows of taps, each read at once: registers hold the weights' gradients.
    constexpr int TAP_PITCH = round_up(K, 4);
    alignas(16) __shared__ float taps[K * TAP_PITCH];
    __shared__ NormGradient<1> norm;
    __shared__ SegmentPlace places[THREADS];
    FUSED_OPS_DYNAMIC_SHARED(tiles);

    const DepthwiseBackwardParams& params = arguments.params;
    const DepthwiseProblem& p = params.problem;
    const PlaneCut& cut = arguments.planes;
    const int64_t channel = blockIdx.x % p.channels;
    const uint32_t part = static_cast<uint32_t>(blockIdx.x / p.channels);
    const bool pre = p.norm == NormPlacement::pre;
    const bool post = p.norm == NormPlacement::post;
    const bool identity = p.identity && p.residual_mode != ResidualMode::none;
    const bool add_residual = p.residual_mode == ResidualMode::before && p.activation != Activation::none;
    const Map& residual = p.identity ? p.x : p.residual;
    const bool has_raw = params.raw.data != nullptr;
    const bool need_weight = arguments.need_weight;
    const bool post_sums = post && arguments.need_sums;
    const bool pre_sums = pre && arguments.need_sums;
    const int pad_h = static_cast<int>(p.pad_h);
    const int pad_w = static_cast<int>(p.pad_w);
    const int height = static_cast<int>(p.height);
    const int width = static_cast<int>(p.width);
    const int out_height = static_cast<int>(p.out_height);
    const int out_width = static_cast<int>(p.out_width);
    // Row and column 0 of the walk over x, and those of d with which they have tap 0 in common.
    const int x_row0 = arguments.first_row;
    const int x_column0 = arguments.first_column;
    const int d_row0 = (x_row0 + pad_h) / S;
    const int d_column0 = (x_column0 + pad_w) / S;

    if (threadIdx.x < K * K) {
        const int row = threadIdx.x / K;
        const int column = threadIdx.x % K;
        taps[row * TAP_PITCH + column] = weight_value(p.weight, channel, row, column);
    }
    if (threadIdx.x == 0 && (pre || post)) {
        norm.fill(0, channel, p, arguments.sums, arguments.inverse_count);
    }

    float weight_grad[K * K] = {};
    // Sums of d, and the two sums of the norm, of the second without the factor rstd.
    float own[3] = {};

    const auto load_at = [&](const Map& map, int image, int row, int column) {
        return load_vector<T, V>(map_address<T, true>(map, image, row, column, channel));
    };
    // The gradient before the activation at V columns, and c there (see NormGradient).
    const auto before_activation = [&](const Vector<T, V>& grad, const Vector<T, V>& raw, int image, int row,
                                       int column, float (&value_grad)[V], float (&centred)[V]) {
        norm.before_activation(
            0, p, grad, raw, [&] { return load_at(residual, image, row, column); }, value_grad, centred);
    };

    struct Piece {
        Vector<T, V> grad, raw;
        int image, row, column;  // the image is -1 outside the map
        uint32_t owned;          // bit v: column v belongs to this segment
    };
    const auto load = [&](const SegmentPlace& place, int tile_row, int tile_column) {
        Piece piece{zero_vector<T, V>(), zero_vector<T, V>(), -1, 0, 0, 0};
        piece.row = d_row0 - REACH + place.row + tile_row;
        piece.column = d_column0 - REACH + place.column + tile_column;
        if (place.image < 0 || piece.row < 0 || piece.row >= out_height || piece.column < 0 ||
            piece.column >= out_width) {
            return piece;
        }
        piece.image = place.image;
        piece.grad = load_at(params.grad, piece.image, piece.row, piece.column);
        if (has_raw) {
            piece.raw = load_at(params.raw, piece.image, piece.row, piece.column);
        }
        // The segment that has the centre of a position's window owns it.
        const int row = piece.row * S - pad_h + K / 2 - x_row0 - place.row * S;
        if (row >= 0 && row < static_cast<int>(cut.tile_rows) * S) {
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                const int column = (piece.column + v) * S - pad_w + K / 2 - x_column0 - place.column * S;
                const bool is_owned = column >= 0 && column < static_cast<int>(cut.tile_columns) * S;
                piece.owned |= (is_owned ? 1u : 0u) << v;
            }
        }
        return piece;
    };
    const auto value = [&](const Piece& piece, float (&d)[V]) {
        if (piece.image < 0) {
            FUSED_OPS_UNROLL
            for (int v = 0; v < V; ++v) {
                d[v] = 0.0f;
            }
            return;
        }
        float value_grad[V], centred[V];
        before_activation(piece.grad, piece.raw, piece.image, piece.row, piece.column, value_grad, centred);
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            d[v] = value_grad[v];
        }
        if (post) {
            norm.before_norm(0, d, centred);
        }
        T* const residual_grad =
            mutable_address<T, true>(params.residual_grad, piece.image, piece.row, piece.column, channel);
        Vector<T, V> rounded;
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            rounded.elements[v] = from_float<T>(value_grad[v]);
            if (!(piece.owned >> v & 1u)) {
                continue;
            }
            own[0] += d[v];
            if (post_sums) {
                own[1] += value_grad[v];
                own[2] += value_grad[v] * centred[v];
            }
            if (params.residual_grad.data != nullptr && piece.owned != (1u << V) - 1) {
                store_vector<T, 1>(residual_grad + v, Vector<T, 1>{{rounded.elements[v]}});
            }
        }
        if (params.residual_grad.data != nullptr && piece.owned == (1u << V) - 1) {
            store_vector<T, V>(residual_grad, rounded);
        }
    };

    const PlaneWalker walker(cut);
    const float* const tile =
        tiles + (walker.segment * cut.shared_rows + walker.first_row + REACH) * cut.pitch + walker.lane * V;
    FUSED_OPS_NO_UNROLL
    for (uint32_t round = 0; round < cut.rounds; ++round) {
        if (round != 0) {
            // The previous round's segments may still be read.
            __syncthreads();
        }
        place_segments(cut, part, round, places);
        __syncthreads();
        stage<V, 2>(cut, places, (d_column0 - REACH) & (V - 1), tiles, load, value);
        __syncthreads();

        const SegmentPlace place = places[walker.segment];
        const int first_row = x_row0 + (place.row + static_cast<int>(walker.first_row)) * S;
        const int x_column = x_column0 + (place.column + static_cast<int>(walker.lane) * V) * S;
        const int rows = place.image >= 0 ? static_cast<int>(walker.rows) : 0;
        // Vector j of the thread's columns of x lies inside the map.
        const auto column_inside = [&](int j) { return x_column + j * V >= 0 && x_column + j * V < width; };
        struct Row {
            Vector<T, V> vectors[S];
        };
        const auto load_x = [&](int row) {
            Row loaded;
            FUSED_OPS_UNROLL
            for (int j = 0; j < S; ++j) {
                loaded.vectors[j] = need_weight && row >= 0 && row < height && column_inside(j)
                                        ? load_at(p.x, place.image, row, x_column + j * V)
                                        : zero_vector<T, V>();
            }
            return loaded;
        };
        Row next[S];
        FUSED_OPS_UNROLL
        for (int a = 0; a < S; ++a) {
            next[a] = rows > 0 ? load_x(first_row + a) : Row{};
        }
        FUSED_OPS_NO_UNROLL
        for (int i = 0; i < rows; ++i) {
            // Row first_row + i S + a of x meets row i - m of d at tap row a + m S, and column u S + b of the
            // thread meets column u - n of d at tap column b + n S.
            FUSED_OPS_UNROLL
            for (int a = 0; a < S; ++a) {
                const int row = first_row + i * S + a;
                const Row loaded = next[a];
                if (i + 1 < rows) {
                    next[a] = load_x(row + S);
                }
                if (row < 0 || row >= height) {
                    continue;
                }
                // What the convolution reads: the normalised x, and zero outside it.
                float z[S * V];
                FUSED_OPS_UNROLL
                for (int j = 0; j < S * V; ++j) {
                    z[j] = to_float(loaded.vectors[j / V].elements[j % V]);
                }
                if (pre && need_weight) {
                    float own_mean[1], own_scale[1], own_beta[1];
                    norm.mean.read_all(0, own_mean);
                    norm.scale.read_all(0, own_scale);
                    norm.beta.read_all(0, own_beta);
                    FUSED_OPS_UNROLL
                    for (int j = 0; j < S * V; ++j) {
                        z[j] =
                            column_inside(j / V) ? (z[j] - own_mean[0]) * own_scale[0] + own_beta[0] : 0.0f;
                    }
                }
                float x_grad[S * V] = {};
                const auto convolve = [&]<bool X, bool WEIGHT>() {
                    FUSED_OPS_UNROLL
                    for (int m = 0; a + m * S < K; ++m) {
                        const int kh = a + m * S;
                        float d[COLUMNS];
                        read_columns<V>(tile + (i - m) * static_cast<int>(cut.pitch), d);
                        [[maybe_unused]] float row_taps[TAP_PITCH];
                        if constexpr (X) {
                            read_columns<4>(taps + kh * TAP_PITCH, row_taps);
                        }
                        FUSED_OPS_UNROLL
                        for (int kw = 0; kw < K; ++kw) {
                            FUSED_OPS_UNROLL
                            for (int u = 0; u < V; ++u) {
                                const float value = d[u + REACH - kw / S];
                                if constexpr (X) {
                                    x_grad[u * S + kw % S] += value * row_taps[kw];
                                }
                                if constexpr (WEIGHT) {
                                    weight_grad[kh * K + kw] += value * z[u * S + kw % S];
                                }
                            }
                        }
                    }
                };
                if (arguments.need_x && need_weight) {
                    convolve.template operator()<true, true>();
                } else if (arguments.need_x) {
                    convolve.template operator()<true, false>();
                } else if (need_weight) {
                    convolve.template operator()<false, true>();
                }

                FUSED_OPS_UNROLL
                for (int j = 0; j < S; ++j) {
                    if (!arguments.need_x || !column_inside(j)) {
                        continue;
                    }
                    const int column = x_column + j * V;
                    float values[V];
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        values[v] = x_grad[j * V + v];
                    }
                    if (pre_sums) {
                        // Loaded anew, from L1: where the weights need no gradient it was not loaded.
                        const Vector<T, V> again = load_at(p.x, place.image, row, column);
                        float own_mean[V];
                        norm.mean.read_all(0, own_mean);
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            own[1] += values[v];
                            own[2] += values[v] * (to_float(again.elements[v]) - own_mean[v]);
                        }
                    }
                    if (params.x_grad.data == nullptr) {
                        continue;
                    }
                    if (pre) {
                        float own_scale[V];
                        norm.scale.read_all(0, own_scale);
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            values[v] *= own_scale[v];
                        }
                    }
                    if (identity) {
                        // x is the residual too, and position (row, column) that of the output.
                        const Vector<T, V> grad = load_at(params.grad, place.image, row, column);
                        float value_grad[V], centred[V];
                        if (add_residual) {
                            before_activation(grad, load_at(params.raw, place.image, row, column),
                                              place.image, row, column, value_grad, centred);
                        } else {
                            FUSED_OPS_UNROLL
                            for (int v = 0; v < V; ++v) {
                                value_grad[v] = to_float(grad.elements[v]);
                            }
                        }
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            values[v] += value_grad[v];
                        }
                    }
                    Vector<T, V> result;
                    FUSED_OPS_UNROLL
                    for (int v = 0; v < V; ++v) {
                        result.elements[v] = from_float<T>(values[v]);
                    }
                    store_vector<T, V>(
                        mutable_address<T, true>(params.x_grad, place.image, row, column, channel), result);
                }
            }
        }
    }

    if (arguments.part_rows != 0) {
        if (arguments.need_sums) {
            float own_rstd[1];
            norm.rstd.read_all(0, own_rstd);
            own[2] *= own_rstd[0];
        }
        store_plane_sums(weight_grad, own, need_weight ? K * K : 0, arguments.need_bias ? 1 : 0,
                         arguments.need_sums ? 2 : 0, part, channel, p.channels, arguments.parts);
    }
}

}  // namespace

namespace depthwise {

template <>
const char* launch_planes_backward<Scalar, FUSED_OPS_KERNEL>(const BackwardArguments& arguments, int vector,
                                                             uint32_t blocks, void* stream) {
    constexpr int K = FUSED_OPS_KERNEL;
    const int stride = arguments.params.problem.stride;
    void (*kernel)(BackwardArguments) = nullptr;
#define FUSED_OPS_INSTANCE(S, V)                   \
    if (stride == S && vector == V) {              \
        kernel = planes_backward<Scalar, K, S, V>; \
    }
    FUSED_OPS_INSTANCE(1, 4)
    FUSED_OPS_INSTANCE(1, 2)
    FUSED_OPS_INSTANCE(1, 1)
    FUSED_OPS_INSTANCE(2, 2)
    FUSED_OPS_INSTANCE(2, 1)
#undef FUSED_OPS_INSTANCE
    if (kernel == nullptr) {
        return "no backward kernel on planes was compiled for this vector";
    }
    return launch_kernel("depthwise_backward", kernel, blocks, THREADS,
                         arguments.planes.floats() * sizeof(float), stream, arguments);
}

}  // namespace depthwise

}  // namespace fused_ops
