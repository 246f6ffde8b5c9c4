// Depthwise 3x3 convolution, stride 1, dilation 1, forward, with BatchNorm by running statistics before or
// after it, an activation and a residual, for feature maps with neighbouring channels (channels_last).
//
// One thread owns V neighbouring channels and TW neighbouring output columns and walks down a strip of output
// rows. An input row is loaded and converted once and added into the three output rows that it touches, so
// the registers hold three rows of sums and one row of input:
//
//     tile of a thread   strip_rows x TW outputs x V channels, from (strip_rows + 2) x (TW + 2) inputs
//     block of threads   channel_lanes (<= 32) threads side by side over channels, times
//                        column_lanes (128 / channel_lanes) walkers, each one (image, strip, column tile)
//     shared memory      the 9 weights and the affine vectors of the block's channels, in float
//
// Lanes run fastest over channels, then over column tiles: both are contiguous in memory, so a warp's
// accesses are whole lines whatever the channel count is. Zero padding applies to the normalised input: a
// padded position contributes 0 and never the norm of 0.
#include "../common/activation.h"
#include "../common/portability.h"
#include "../common/vector.h"
#include "params.h"

// One object file per element type, so that they compile side by side; 0 float32, 1 float16, 2 bfloat16.
// The file compiled without a type holds the checks and the choice between them.
#if !defined(FUSED_OPS_SCALAR)
#    define FUSED_OPS_SCALAR -1
#endif

namespace fused_ops {

namespace depthwise {

// The parameters, with what the launcher derives from them.
struct ForwardArguments {
    DepthwiseForwardParams params;
    uint32_t channel_groups;  // channels / V
    uint32_t channel_blocks;  // blocks side by side over the channels
    uint32_t channel_lanes;   // channel groups per block
    uint32_t column_lanes;    // walkers per block
    uint32_t column_tiles;    // tiles of TW output columns in a row
    uint32_t strips;          // strips of strip_rows output rows in an image
    uint32_t strip_rows;
    uint32_t walkers;  // images * strips * column_tiles
};

const char* launch_float32(const DepthwiseForwardParams& params, void* stream);
const char* launch_float16(const DepthwiseForwardParams& params, void* stream);
const char* launch_bfloat16(const DepthwiseForwardParams& params, void* stream);

}  // namespace depthwise

#if FUSED_OPS_SCALAR >= 0

namespace {

#    if FUSED_OPS_SCALAR == 0
using Scalar = float;
#    elif FUSED_OPS_SCALAR == 1
using Scalar = float16;
#    else
using Scalar = bfloat16;
#    endif

using depthwise::ForwardArguments;

constexpr int THREADS = 128;
constexpr int MAX_CHANNEL_LANES = 32;

// Blocks that must fit on a multiprocessor. Left to itself the compiler aims at more and spills.
template <int V>
constexpr int MIN_BLOCKS = V == 1 ? 7 : (V == 2 ? 5 : 3);

// Per-channel constants in shared memory. A lane reads PART floats at once; the parts of neighbouring lanes
// are neighbours, so that 16-byte reads of a quarter of a warp touch every bank once.
template <int V>
struct ChannelTable {
    static constexpr int PART = V < 4 ? V : 4;
    static constexpr int PARTS = V / PART;
    static constexpr int SIZE = MAX_CHANNEL_LANES * V;

    // Where the value of channel `channel` (counted from the block's first) lies.
    static FUSED_OPS_DEVICE int slot(int channel) {
        const int lane = channel / V;
        const int v = channel % V;
        return ((v / PART) * MAX_CHANNEL_LANES + lane) * PART + v % PART;
    }

    static FUSED_OPS_DEVICE void read(const float* table, int part, int lane, float (&values)[PART]) {
        struct alignas(PART * sizeof(float)) Block {
            float values[PART];
        };
        const Block block = *reinterpret_cast<const Block*>(table + (part * MAX_CHANNEL_LANES + lane) * PART);
        FUSED_OPS_UNROLL
        for (int q = 0; q < PART; ++q) {
            values[q] = block.values[q];
        }
    }
};

FUSED_OPS_DEVICE float channel_value(const ChannelValues& values, int64_t channel, float otherwise) {
    return values.data == nullptr ? otherwise
                                  : load_element(values.data, values.type, channel * values.stride);
}

// PRE: BatchNorm on the input, as it is loaded. Without it the epilogue carries BatchNorm's affine form (that
// of the identity where there is no norm). RESIDUAL: a residual is added, from memory or from the input's own
// centre.
template <typename T, int V, int TW, bool PRE, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<V>)
    depthwise3x3_forward(const __grid_constant__ ForwardArguments arguments) {
    using Table = ChannelTable<V>;
    constexpr int PART = Table::PART;
    constexpr int PARTS = Table::PARTS;
    constexpr int COLUMNS = TW + 2;

    // center, scale, shift: (value - center) * scale + shift is BatchNorm. The mean is subtracted first and
    // not folded into the shift, which would cancel badly where the mean is large against the deviation.
    alignas(16) __shared__ float weights[9][Table::SIZE];
    alignas(16) __shared__ float center[Table::SIZE];
    alignas(16) __shared__ float scale[Table::SIZE];
    alignas(16) __shared__ float shift[Table::SIZE];
    alignas(16) __shared__ float bias[Table::SIZE];

    const DepthwiseForwardParams& p = arguments.params;
    const uint32_t channel_block = blockIdx.x % arguments.channel_blocks;
    const uint32_t walker_block = blockIdx.x / arguments.channel_blocks;
    const int64_t first_channel = static_cast<int64_t>(channel_block) * arguments.channel_lanes * V;

    for (int i = threadIdx.x; i < static_cast<int>(arguments.channel_lanes) * V; i += THREADS) {
        const int64_t channel = first_channel + i;
        if (channel >= p.channels) {
            break;
        }
        const int slot = Table::slot(i);
        FUSED_OPS_UNROLL
        for (int k = 0; k < 9; ++k) {
            weights[k][slot] = load_element(
                p.weight.data, p.weight.type,
                channel * p.weight.c_stride + (k / 3) * p.weight.h_stride + (k % 3) * p.weight.w_stride);
        }
        float channel_center = 0.0f;
        float channel_scale = 1.0f;
        float channel_shift = 0.0f;
        if (p.norm != NormPlacement::none) {
            channel_center = channel_value(p.mean, channel, 0.0f);
            channel_scale = channel_value(p.norm_weight, channel, 1.0f) /
                            sqrtf(channel_value(p.var, channel, 1.0f) + p.eps);
            channel_shift = channel_value(p.norm_bias, channel, 0.0f);
        }
        const float channel_bias = channel_value(p.bias, channel, 0.0f);
        center[slot] = PRE ? channel_center : channel_center - channel_bias;
        scale[slot] = channel_scale;
        shift[slot] = channel_shift;
        bias[slot] = channel_bias;
    }
    __syncthreads();

    const uint32_t lane = threadIdx.x % arguments.channel_lanes;
    const uint32_t column_lane = threadIdx.x / arguments.channel_lanes;
    const uint32_t channel_group = channel_block * arguments.channel_lanes + lane;
    const uint64_t walker = static_cast<uint64_t>(walker_block) * arguments.column_lanes + column_lane;
    if (column_lane >= arguments.column_lanes || channel_group >= arguments.channel_groups ||
        walker >= arguments.walkers) {
        return;
    }
    const uint32_t column_tile = static_cast<uint32_t>(walker) % arguments.column_tiles;
    const uint32_t image_strip = static_cast<uint32_t>(walker) / arguments.column_tiles;
    const int64_t image = image_strip / arguments.strips;
    const int64_t channel = static_cast<int64_t>(channel_group) * V;
    const int64_t first_column = static_cast<int64_t>(column_tile) * TW;
    const int64_t first_row = static_cast<int64_t>(image_strip % arguments.strips) * arguments.strip_rows;
    const int64_t rows_left = p.out_height - first_row;
    const int rows = rows_left < arguments.strip_rows ? static_cast<int>(rows_left)
                                                      : static_cast<int>(arguments.strip_rows);
    const int columns = p.out_width - first_column < TW ? static_cast<int>(p.out_width - first_column) : TW;

    // Bit j: column j of the tile's input lies inside the map.
    uint32_t inside = 0;
    FUSED_OPS_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
        const int64_t column = first_column - p.pad_w + j;
        inside |= (column >= 0 && column < p.width ? 1u : 0u) << j;
    }

    const T* x = static_cast<const T*>(p.x);
    int64_t x_offset = image * p.x_strides.n + (first_row - p.pad_h) * p.x_strides.h +
                       (first_column - p.pad_w) * p.x_strides.w + channel;
    const T* residual = static_cast<const T*>(p.residual);
    int64_t residual_offset = image * p.residual_strides.n + first_row * p.residual_strides.h +
                              first_column * p.residual_strides.w + channel;
    T* out = static_cast<T*>(p.out) + image * p.out_strides.n + first_row * p.out_strides.h +
             first_column * p.out_strides.w + channel;

    // Sums of the two output rows that need more input rows: [0] has seen one of its three, [1] two.
    float open[2][TW][V];
    // The residual of the output row that is being finished. For `identity` it is the centre of the input row
    // before the newest one: exactly the row that the output row is centred on.
    [[maybe_unused]] Vector<T, V> held[TW];
    FUSED_OPS_UNROLL
    for (int t = 0; t < TW; ++t) {
        held[t] = zero_vector<T, V>();
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            open[0][t][v] = 0.0f;
            open[1][t][v] = 0.0f;
        }
    }

    // Input row `step` of the strip is tap row 0 of output row `step`, 1 of the one before, and 2 of the one
    // before that, which it finishes. The sums move on by one place per row; the first multiply-add of a row
    // writes where it moves to, so that costs no instruction.
    FUSED_OPS_NO_UNROLL
    for (int step = 0; step < rows + 2; ++step) {
        const int64_t row = first_row - p.pad_h + step;
        const bool row_inside = row >= 0 && row < p.height;
        Vector<T, V> loaded[COLUMNS];
        FUSED_OPS_UNROLL
        for (int j = 0; j < COLUMNS; ++j) {
            loaded[j] = row_inside && (inside >> j & 1u) ? load_vector<T, V>(x + x_offset + j * p.x_strides.w)
                                                         : zero_vector<T, V>();
        }
        x_offset += p.x_strides.h;
        if constexpr (RESIDUAL) {
            if (!p.identity && step >= 2) {
                FUSED_OPS_UNROLL
                for (int t = 0; t < TW; ++t) {
                    if (t < columns) {
                        held[t] = load_vector<T, V>(residual + residual_offset + t * p.residual_strides.w);
                    }
                }
                residual_offset += p.residual_strides.h;
            }
        }

        float finished[TW][V];
        if (row_inside) {
            FUSED_OPS_UNROLL
            for (int part = 0; part < PARTS; ++part) {
                float taps[9][PART];
                FUSED_OPS_UNROLL
                for (int k = 0; k < 9; ++k) {
                    Table::read(weights[k], part, lane, taps[k]);
                }
                [[maybe_unused]] float part_center[PART];
                [[maybe_unused]] float part_scale[PART];
                [[maybe_unused]] float part_shift[PART];
                if constexpr (PRE) {
                    Table::read(center, part, lane, part_center);
                    Table::read(scale, part, lane, part_scale);
                    Table::read(shift, part, lane, part_shift);
                }
                FUSED_OPS_UNROLL
                for (int j = 0; j < COLUMNS; ++j) {
                    FUSED_OPS_UNROLL
                    for (int q = 0; q < PART; ++q) {
                        const int v = part * PART + q;
                        float value = to_float(loaded[j].elements[v]);
                        if constexpr (PRE) {
                            value = (value - part_center[q]) * part_scale[q] + part_shift[q];
                            value = inside >> j & 1u ? value : 0.0f;
                        }
                        if (j < TW) {
                            finished[j][v] = open[1][j][v] + value * taps[6][q];
                            open[1][j][v] = open[0][j][v] + value * taps[3][q];
                            open[0][j][v] = value * taps[0][q];
                        }
                        FUSED_OPS_UNROLL
                        for (int kw = 1; kw < 3; ++kw) {
                            const int t = j - kw;
                            if (t >= 0 && t < TW) {
                                finished[t][v] += value * taps[6 + kw][q];
                                open[1][t][v] += value * taps[3 + kw][q];
                                open[0][t][v] += value * taps[kw][q];
                            }
                        }
                    }
                }
            }
        } else {
            FUSED_OPS_UNROLL
            for (int t = 0; t < TW; ++t) {
                FUSED_OPS_UNROLL
                for (int v = 0; v < V; ++v) {
                    finished[t][v] = open[1][t][v];
                    open[1][t][v] = open[0][t][v];
                    open[0][t][v] = 0.0f;
                }
            }
        }

        if (step >= 2) {
            FUSED_OPS_UNROLL
            for (int t = 0; t < TW; ++t) {
                if (t >= columns) {
                    break;
                }
                float values[V];
                FUSED_OPS_UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    if constexpr (PRE) {
                        float part_bias[PART];
                        Table::read(bias, part, lane, part_bias);
                        FUSED_OPS_UNROLL
                        for (int q = 0; q < PART; ++q) {
                            values[part * PART + q] = finished[t][part * PART + q] + part_bias[q];
                        }
                    } else {
                        float part_center[PART];
                        float part_scale[PART];
                        float part_shift[PART];
                        Table::read(center, part, lane, part_center);
                        Table::read(scale, part, lane, part_scale);
                        Table::read(shift, part, lane, part_shift);
                        FUSED_OPS_UNROLL
                        for (int q = 0; q < PART; ++q) {
                            values[part * PART + q] =
                                (finished[t][part * PART + q] - part_center[q]) * part_scale[q] +
                                part_shift[q];
                        }
                    }
                }
                if constexpr (RESIDUAL) {
                    if (p.residual_mode == ResidualMode::before) {
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            values[v] += to_float(held[t].elements[v]);
                        }
                    }
                }
                activate_all(values, p.activation);
                if constexpr (RESIDUAL) {
                    if (p.residual_mode == ResidualMode::after) {
                        FUSED_OPS_UNROLL
                        for (int v = 0; v < V; ++v) {
                            values[v] += to_float(held[t].elements[v]);
                        }
                    }
                }
                Vector<T, V> result;
                FUSED_OPS_UNROLL
                for (int v = 0; v < V; ++v) {
                    result.elements[v] = from_float<T>(values[v]);
                }
                store_vector<T, V>(out + t * p.out_strides.w, result);
            }
            out += p.out_strides.h;
        }
        if constexpr (RESIDUAL) {
            if (p.identity) {
                FUSED_OPS_UNROLL
                for (int t = 0; t < TW; ++t) {
                    held[t] = loaded[t + 1];
                }
            }
        }
    }
}

uint32_t ceil_divide(uint32_t a, uint32_t b) {
    return (a + b - 1) / b;
}

// Rows per strip: long strips read fewer rows twice (the 2 above and below), short ones make more blocks.
// As long as the map allows up to 28 rows, halved until every multiprocessor has four blocks.
uint32_t choose_strip_rows(int64_t out_height, uint64_t walkers_per_strip, uint32_t walkers_per_block,
                           uint64_t channel_blocks) {
    const uint64_t wanted = 4ull * static_cast<uint64_t>(multiprocessor_count());
    uint32_t rows = out_height < 28 ? static_cast<uint32_t>(out_height) : 28u;
    while (rows > 4) {
        const uint64_t strips = (static_cast<uint64_t>(out_height) + rows - 1) / rows;
        if (strips * walkers_per_strip / walkers_per_block * channel_blocks >= wanted) {
            break;
        }
        rows = (rows + 1) / 2;
    }
    return rows;
}

template <int V, int TW>
const char* launch_tile(const DepthwiseForwardParams& params, void* stream) {
    ForwardArguments arguments;
    arguments.params = params;
    arguments.channel_groups = static_cast<uint32_t>(params.channels / V);
    arguments.channel_blocks = ceil_divide(arguments.channel_groups, MAX_CHANNEL_LANES);
    arguments.channel_lanes = ceil_divide(arguments.channel_groups, arguments.channel_blocks);
    arguments.column_lanes = THREADS / arguments.channel_lanes;
    arguments.column_tiles = static_cast<uint32_t>((params.out_width + TW - 1) / TW);
    arguments.strip_rows =
        params.strip_rows > 0
            ? static_cast<uint32_t>(params.strip_rows)
            : choose_strip_rows(params.out_height,
                                static_cast<uint64_t>(params.batch) * arguments.column_tiles,
                                arguments.column_lanes, arguments.channel_blocks);
    arguments.strips =
        static_cast<uint32_t>((params.out_height + arguments.strip_rows - 1) / arguments.strip_rows);

    // Walkers and blocks are counted in 32 bits inside the kernel, where a 64-bit division costs a tenth of a
    // short strip's work. A batch too large for that goes in several launches.
    const uint64_t per_image = static_cast<uint64_t>(arguments.strips) * arguments.column_tiles;
    const uint64_t most_walkers = 0x7fffffffull / arguments.channel_blocks;
    if (per_image > most_walkers) {
        return "the map is too large for the CUDA kernel: one image has more than 2^31 tiles";
    }
    const int64_t images_per_launch = static_cast<int64_t>(most_walkers / per_image);
    const int64_t element = sizeof(Scalar);
    for (int64_t image = 0; image < params.batch; image += images_per_launch) {
        const int64_t images =
            params.batch - image < images_per_launch ? params.batch - image : images_per_launch;
        DepthwiseForwardParams& chunk = arguments.params;
        chunk.batch = images;
        chunk.x = static_cast<const char*>(params.x) + image * params.x_strides.n * element;
        if (params.residual != nullptr) {
            chunk.residual =
                static_cast<const char*>(params.residual) + image * params.residual_strides.n * element;
        }
        chunk.out = static_cast<char*>(params.out) + image * params.out_strides.n * element;
        arguments.walkers = static_cast<uint32_t>(images * per_image);
        const uint32_t blocks =
            ceil_divide(arguments.walkers, arguments.column_lanes) * arguments.channel_blocks;
        const bool residual = params.residual_mode != ResidualMode::none;
        const bool pre = params.norm == NormPlacement::pre;
        auto* kernel = pre ? (residual ? depthwise3x3_forward<Scalar, V, TW, true, true>
                                       : depthwise3x3_forward<Scalar, V, TW, true, false>)
                           : (residual ? depthwise3x3_forward<Scalar, V, TW, false, true>
                                       : depthwise3x3_forward<Scalar, V, TW, false, false>);
        if (const char* error = launch_kernel(kernel, blocks, THREADS, stream, arguments)) {
            return error;
        }
    }
    return nullptr;
}

// Whether V elements can be accessed at once at every position of a map.
bool vector_is_legal(int vector, const void* base, const MapStrides& strides) {
    return reinterpret_cast<uintptr_t>(base) % (vector * sizeof(Scalar)) == 0 && strides.n % vector == 0 &&
           strides.h % vector == 0 && strides.w % vector == 0;
}

bool vector_is_legal(int vector, const DepthwiseForwardParams& params) {
    return vector * sizeof(Scalar) <= 16 && params.channels % vector == 0 &&
           vector_is_legal(vector, params.x, params.x_strides) &&
           vector_is_legal(vector, params.out, params.out_strides) &&
           (params.residual == nullptr || vector_is_legal(vector, params.residual, params.residual_strides));
}

const char* launch(const DepthwiseForwardParams& params, void* stream) {
    int vector = params.vector_width;
    if (vector == 0) {
        vector = 8;
        while (!vector_is_legal(vector, params)) {
            vector /= 2;
        }
    } else if (!vector_is_legal(vector, params)) {
        return "vector_width does not divide the channels, the strides or the alignment";
    }
    // Narrow tiles for wide vectors and for narrow maps: the accumulators must fit the registers.
    const int columns = params.tile_columns != 0 ? params.tile_columns : (vector == 8 ? 2 : 4);
    switch (vector * 16 + columns) {
#    if FUSED_OPS_SCALAR != 0
        case 8 * 16 + 2:
            return launch_tile<8, 2>(params, stream);
#    endif
        case 4 * 16 + 4:
            return launch_tile<4, 4>(params, stream);
        case 2 * 16 + 4:
            return launch_tile<2, 4>(params, stream);
        case 1 * 16 + 4:
            return launch_tile<1, 4>(params, stream);
        default:
            return "no kernel was compiled for this vector_width and tile_columns";
    }
}

}  // namespace

namespace depthwise {

#    if FUSED_OPS_SCALAR == 0
const char* launch_float32(const DepthwiseForwardParams& params, void* stream) {
    return launch(params, stream);
}
#    elif FUSED_OPS_SCALAR == 1
const char* launch_float16(const DepthwiseForwardParams& params, void* stream) {
    return launch(params, stream);
}
#    else
const char* launch_bfloat16(const DepthwiseForwardParams& params, void* stream) {
    return launch(params, stream);
}
#    endif

}  // namespace depthwise

#else

const char* check_depthwise_forward(const DepthwiseForwardParams& p) {
    if (p.batch < 0 || p.height < 1 || p.width < 1 || p.channels < 1) {
        return "the input has an empty channel or spatial dimension";
    }
    if (p.pad_h < 0 || p.pad_w < 0) {
        return "padding is negative";
    }
    if (p.out_height != p.height + 2 * p.pad_h - 2 || p.out_width != p.width + 2 * p.pad_w - 2) {
        return "the output's size is not that of a 3x3 convolution of stride 1 with this padding";
    }
    if (p.out_height < 1 || p.out_width < 1) {
        return "the padded input is smaller than the 3x3 kernel";
    }
    // Positions and tiles are counted in 32 bits within one image's row, column or channel range.
    constexpr int64_t LIMIT = int64_t{1} << 30;
    if (p.out_height >= LIMIT || p.out_width >= LIMIT || p.channels >= LIMIT) {
        return "a dimension of the map has more than 2^30 elements";
    }
    if (p.weight.data == nullptr || (p.batch > 0 && (p.x == nullptr || p.out == nullptr))) {
        return "input, weight or output is missing";
    }
    if (p.norm != NormPlacement::none && (p.mean.data == nullptr || p.var.data == nullptr)) {
        return "the norm has no running mean and variance";
    }
    if (p.identity && (p.residual_mode == ResidualMode::none || p.residual != nullptr)) {
        return "identity stands for the residual: it needs a residual mode and no residual tensor";
    }
    if (p.identity && (p.pad_h != 1 || p.pad_w != 1)) {
        return "identity needs padding 1, which keeps the size of the map";
    }
    if (!p.identity && (p.residual_mode == ResidualMode::none) != (p.residual == nullptr) && p.batch > 0) {
        return "a residual needs a residual mode, and a residual mode a residual";
    }
    return nullptr;
}

const char* launch_depthwise_forward(const DepthwiseForwardParams& params, void* stream) {
    if (const char* error = check_depthwise_forward(params)) {
        return error;
    }
    if (params.batch == 0) {
        return nullptr;
    }
    switch (params.type) {
        case ScalarType::float32:
            return depthwise::launch_float32(params, stream);
        case ScalarType::float16:
            return depthwise::launch_float16(params, stream);
        case ScalarType::bfloat16:
            return depthwise::launch_bfloat16(params, stream);
    }
    return "the element type is none of float32, float16, bfloat16";
}

#endif

}  // namespace fused_ops
