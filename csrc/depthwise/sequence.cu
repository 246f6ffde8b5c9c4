// The launch sequences of the depthwise operator: checks, choice of tiles, workspace, and which kernels run
// in which order. Host code only.
//
//     forward    batch statistics after the convolution: convolution with moments, merge, normalise (or the
//                convolution once more, where its output is not stored)
//                batch statistics before it: moments, merge, convolution
//                otherwise: convolution
//     backward   batch statistics after the convolution: sums of the norm, merge, gradients, merge
//                batch statistics before it: gradients, merge, finish
//                otherwise: gradients, merge
#include <numeric>

#include "../common/scalar.h"
#include "../common/sequence.h"
#include "plan.h"

namespace fused_ops {

namespace {

using namespace depthwise;

// For every multiprocessor, where the map has so many.
constexpr uint64_t BLOCKS_WANTED = 4;

int element_size(ScalarType type) {
    return type == ScalarType::float32 ? 4 : 2;
}

bool batch_after(const DepthwiseProblem& p) {
    return p.batch_stats && p.norm == NormPlacement::post;
}

bool batch_before(const DepthwiseProblem& p) {
    return p.batch_stats && p.norm == NormPlacement::pre;
}

const char* check(const DepthwiseProblem& p) {
    if (p.batch < 0 || p.height < 1 || p.width < 1 || p.channels < 1) {
        return "the input has an empty channel or spatial dimension";
    }
    if (p.kernel != 3 && p.kernel != 5 && p.kernel != 7) {
        return "the kernel's size is none of 3, 5 and 7";
    }
    if (p.stride != 1 && p.stride != 2) {
        return "the stride is neither 1 nor 2";
    }
    if (p.pad_h < 0 || p.pad_w < 0) {
        return "padding is negative";
    }
    if (p.height + 2 * p.pad_h < p.kernel || p.width + 2 * p.pad_w < p.kernel) {
        return "the padded input is smaller than the kernel";
    }
    if (p.out_height != (p.height + 2 * p.pad_h - p.kernel) / p.stride + 1 ||
        p.out_width != (p.width + 2 * p.pad_w - p.kernel) / p.stride + 1) {
        return "the output's size is not that of the convolution";
    }
    // Rows, columns and tiles are counted in 32 bits within one image.
    constexpr int64_t LIMIT = int64_t{1} << 28;
    if (p.out_height >= LIMIT || p.out_width >= LIMIT || p.height >= LIMIT || p.width >= LIMIT ||
        p.channels >= LIMIT) {
        return "a dimension of the map has more than 2^28 elements";
    }
    if (p.weight.data == nullptr || (p.batch > 0 && p.x.data == nullptr)) {
        return "input or weight is missing";
    }
    if (p.norm != NormPlacement::none && (p.mean.data == nullptr || p.var.data == nullptr)) {
        return "the norm has no mean and variance";
    }
    if (p.batch_stats && (p.mean.type != ScalarType::float32 || p.var.type != ScalarType::float32)) {
        return "batch statistics are not float32";
    }
    if (p.identity && (p.residual_mode == ResidualMode::none || p.residual.data != nullptr)) {
        return "identity stands for the residual: it needs a residual mode and no "
               "residual tensor";
    }
    if (p.identity && (p.out_height != p.height || p.out_width != p.width)) {
        return "the residual is the input itself, and the output has another size";
    }
    if (p.stages == 0 || (p.stages & ~(STATISTICS_STAGE | RESULT_STAGE)) != 0) {
        return "stages is not a sum of 1 and 2";
    }
    return nullptr;
}

// Whether V elements can be accessed at once at every position of a map.
bool vector_is_legal(int vector, const DepthwiseProblem& p, const Map& map) {
    const MapStrides& strides = map.strides;
    return map.data == nullptr ||
           (reinterpret_cast<uintptr_t>(map.data) % (vector * element_size(p.type)) == 0 &&
            strides.n % vector == 0 && strides.h % vector == 0 &&
            (p.planes ? strides.c : strides.w) % vector == 0);
}

// The widest vector of at most `most` neighbouring elements, and of at most `asked` if that is given, that
// all maps allow and that divides `extent`, the number of neighbours.
template <typename... Maps>
int choose_vector(int most, int asked, int64_t extent, const DepthwiseProblem& p, const Maps&... maps) {
    const auto is_legal = [&](int vector) {
        return (asked <= 0 || vector <= asked) && vector * element_size(p.type) <= 16 &&
               extent % vector == 0 && (vector_is_legal(vector, p, maps) && ...);
    };
    int vector = most;
    while (vector > 1 && !is_legal(vector)) {
        vector /= 2;
    }
    return vector;
}

ChannelCut cut_channels(int64_t channels, int vector) {
    ChannelCut cut;
    cut.groups = static_cast<uint32_t>(channels / vector);
    cut.blocks = ceil_divide(cut.groups, CHANNEL_LANES);
    cut.lanes = ceil_divide(cut.groups, cut.blocks);
    return cut;
}

// Rows per strip: long strips read fewer rows twice (the halo above and below), short ones make more blocks.
// As long as the map allows up to `most` rows, halved until every multiprocessor has four blocks; strips of a
// map are then made equal. `blocks_per_strip` counts blocks in 1/1024.
uint32_t choose_rows(int64_t height, uint64_t blocks_per_strip, int32_t asked, int64_t most = 28) {
    if (asked > 0) {
        return static_cast<uint32_t>(asked < height ? asked : height);
    }
    const uint64_t wanted = BLOCKS_WANTED * 1024 * static_cast<uint64_t>(multiprocessor_count());
    int64_t rows = height < most ? height : most;
    while (rows > 4 && ceil_divide(height, rows) * blocks_per_strip < wanted) {
        rows = (rows + 1) / 2;
    }
    return ceil_divide(height, ceil_divide(height, rows));
}

// Cuts the planes of one channel into segments whose tiles fit in shared memory together with what a block
// needs besides. An output row (or column) needs `span` rows of a tile and is `step` of them from the next.
const char* cut_planes(const DepthwiseProblem& p, int64_t rows, int64_t columns, int vector, int step,
                       int span, PlaneCut& cut) {
    constexpr int64_t MOST_FLOATS = 4096;
    constexpr int MOST_COLUMNS = 192;
    const int most_lanes =
        MOST_COLUMNS / (vector * step) < THREADS ? MOST_COLUMNS / (vector * step) : THREADS;
    const uint32_t lanes = ceil_divide(columns, vector);
    cut.column_tiles = ceil_divide(lanes, most_lanes);
    cut.lanes = ceil_divide(lanes, cut.column_tiles);
    cut.tile_columns = cut.lanes * vector;
    cut.pitch = (cut.lanes - 1) * vector * step + ceil_divide((vector - 1) * step + span, vector) * vector;
    const int64_t most_rows = (MOST_FLOATS / cut.pitch - span) / step + 1;
    const uint64_t planes = static_cast<uint64_t>(p.batch) * p.channels;
    const int64_t asked = p.tile.rows < most_rows ? p.tile.rows : most_rows;
    cut.tile_rows =
        choose_rows(rows, planes * cut.column_tiles * 1024, static_cast<int32_t>(asked), most_rows);
    cut.row_tiles = ceil_divide(rows, cut.tile_rows);
    cut.shared_rows = (cut.tile_rows - 1) * step + span;
    const uint64_t per_plane = static_cast<uint64_t>(cut.row_tiles) * cut.column_tiles;
    if (per_plane * p.channels > static_cast<uint64_t>(LARGEST_COUNT / p.batch)) {
        return "the map is too large: it has more than 2^31 tiles";
    }
    cut.segments = static_cast<uint32_t>(p.batch * per_plane);
    // Small planes share a block, as long as there are enough of them for every multiprocessor.
    const uint64_t wanted = BLOCKS_WANTED * static_cast<uint64_t>(multiprocessor_count());
    const int64_t by_blocks = static_cast<int64_t>(cut.segments * static_cast<uint64_t>(p.channels) / wanted);
    const int64_t by_memory = MOST_FLOATS / (cut.shared_rows * cut.pitch);
    int64_t at_once = THREADS / cut.lanes;
    for (const int64_t limit : {by_blocks, by_memory, static_cast<int64_t>(cut.segments)}) {
        at_once = limit < at_once ? limit : at_once;
    }
    cut.segments_at_once = static_cast<uint32_t>(at_once < 1 ? 1 : at_once);
    cut.strip_rows = ceil_divide(cut.tile_rows, THREADS / (cut.lanes * cut.segments_at_once));
    cut.strips = ceil_divide(cut.tile_rows, cut.strip_rows);
    cut.rounds = 1;
    return nullptr;
}

struct ForwardPlan {
    ForwardArguments arguments;
    int vector, columns;
    uint32_t parts, blocks;
};

int forward_columns(const DepthwiseProblem& p, int vector) {
    if (p.stride == 1) {
        return vector == 8 ? 2 : 4;
    }
    return vector == 4 || (vector == 2 && p.kernel == 7) ? 2 : 4;
}

const char* plan_forward(const DepthwiseForwardParams& params, ForwardPlan& plan) {
    const DepthwiseProblem& p = params.problem;
    const int most = p.planes ? 4 : (p.kernel == 7 ? 2 : (p.kernel == 3 && p.stride == 1 ? 8 : 4));
    plan.vector = choose_vector(most, p.tile.vector, p.planes ? std::gcd(p.width, p.out_width) : p.channels,
                                p, p.x, p.residual, params.out, params.raw);
    plan.columns = p.tile.columns != 0 ? p.tile.columns : forward_columns(p, plan.vector);
    if (plan.columns < 1 || plan.columns > 64) {
        return "columns is not between 1 and 64";
    }
    ForwardArguments& a = plan.arguments;
    a = {};
    a.params = params;
    if (p.planes) {
        FUSED_OPS_TRY(cut_planes(p, p.out_height, p.out_width, plan.vector, p.stride, p.kernel, a.planes));
        plan.parts = ceil_divide(a.planes.segments, a.planes.segments_at_once);
        plan.blocks = plan.parts * static_cast<uint32_t>(p.channels);
        return nullptr;
    }
    a.cut = cut_channels(p.channels, plan.vector);
    a.walkers_per_block = THREADS / a.cut.lanes;
    a.column_tiles = ceil_divide(p.out_width, plan.columns);
    a.strip_rows = choose_rows(
        p.out_height,
        static_cast<uint64_t>(p.batch) * a.column_tiles * a.cut.blocks * 1024 / a.walkers_per_block,
        p.tile.rows);
    a.strips = ceil_divide(p.out_height, a.strip_rows);
    const uint64_t per_image = static_cast<uint64_t>(a.strips) * a.column_tiles;
    if (per_image * a.cut.blocks > static_cast<uint64_t>(LARGEST_COUNT / p.batch)) {
        return "the map is too large: it has more than 2^31 tiles";
    }
    a.walkers = static_cast<uint32_t>(p.batch * per_image);
    plan.parts = ceil_divide(a.walkers, a.walkers_per_block);
    plan.blocks = plan.parts * a.cut.blocks;
    return nullptr;
}

struct BackwardPlan {
    BackwardArguments arguments;
    int vector, columns;
    uint32_t parts, blocks;
};

// Where the walk over x begins and how many rows (or columns) of the gradient it covers. It reaches beyond x
// where padding is wider than half the kernel: the gradient there has owners too.
int64_t walk_extent(int64_t size, int64_t pad, int kernel, int stride, int32_t& first) {
    const int64_t beyond = pad > kernel / 2 ? pad - kernel / 2 : 0;
    first = static_cast<int32_t>(-beyond - (pad - beyond) % stride);
    return (size + beyond - first + stride - 1) / stride;
}

// Parts whose sums, float32 written and read once, weigh at most 7 % of the three maps that every backward
// pass moves. More only where there would be fewer blocks than multiprocessors.
uint32_t most_parts(const DepthwiseProblem& p, uint32_t channel_blocks, uint32_t part_rows) {
    if (part_rows == 0) {
        return UINT32_MAX;
    }
    const int64_t maps = 3 * p.batch * p.out_height * p.out_width * element_size(p.type);
    const int64_t affordable = 7 * maps / (100 * 2 * static_cast<int64_t>(sizeof(float)) * part_rows);
    const int64_t least = ceil_divide(multiprocessor_count(), channel_blocks);
    return static_cast<uint32_t>(affordable > least ? affordable : least);
}

const char* plan_backward(const DepthwiseBackwardParams& params, BackwardPlan& plan) {
    const DepthwiseProblem& p = params.problem;
    plan.vector = choose_vector(p.planes ? 4 / p.stride : (p.kernel == 3 ? 4 : 2), p.tile.vector,
                                p.planes ? std::gcd(p.width, p.out_width) : p.channels, p, p.x, p.residual,
                                params.grad, params.raw, params.x_grad, params.residual_grad);
    plan.columns = p.tile.columns != 0 ? p.tile.columns : (p.stride == 1 ? 4 : 2);
    if (plan.columns < 1 || plan.columns > 64) {
        return "columns is not between 1 and 64";
    }
    BackwardArguments& a = plan.arguments;
    a = {};
    a.params = params;
    a.need_weight = params.weight_grad.data != nullptr;
    a.need_bias = params.bias_grad.data != nullptr;
    const bool norm_grads = params.norm_weight_grad.data != nullptr || params.norm_bias_grad.data != nullptr;
    a.need_sums = !batch_after(p) && (norm_grads || (batch_before(p) && params.x_grad.data != nullptr));
    a.need_x = params.x_grad.data != nullptr || (a.need_sums && p.norm == NormPlacement::pre);
    a.part_rows = (a.need_weight ? p.kernel * p.kernel : 0) + (a.need_bias ? 1 : 0) + (a.need_sums ? 2 : 0);
    const int64_t rows = walk_extent(p.height, p.pad_h, p.kernel, p.stride, a.first_row);
    int64_t columns = walk_extent(p.width, p.pad_w, p.kernel, p.stride, a.first_column);
    if (p.planes) {
        // Vectors of x begin where the walk does.
        if (a.first_column % p.stride != 0) {
            plan.vector = 1;
        }
        const int before = a.first_column & (plan.vector - 1);
        a.first_column -= before;
        columns += before / p.stride;
        PlaneCut& cut = a.planes;
        FUSED_OPS_TRY(cut_planes(p, rows, columns, plan.vector, 1, (p.kernel - 1) / p.stride + 1, cut));
        plan.parts = ceil_divide(cut.segments, cut.segments_at_once);
        cut.rounds = ceil_divide(plan.parts, most_parts(p, static_cast<uint32_t>(p.channels), a.part_rows));
        plan.parts = ceil_divide(plan.parts, cut.rounds);
        plan.blocks = plan.parts * static_cast<uint32_t>(p.channels);
        return nullptr;
    }
    a.cut = cut_channels(p.channels, plan.vector);
    a.walkers_per_block = THREADS / a.cut.lanes;
    const uint32_t tiles = ceil_divide(columns, plan.columns);
    // Equal blocks of columns; where one block takes the whole width, several strips or images share a block
    // of threads, as far as the shared memory of three blocks goes on a multiprocessor, or 48 KiB.
    const int reach = (p.kernel - 1) / p.stride;
    const int width = static_cast<int>(a.cut.lanes) * plan.vector;
    const int tables = (p.kernel * p.kernel + 6) * CHANNEL_LANES * plan.vector;
    const int third = shared_memory_of_multiprocessor() / 3 - 1024;
    const int floats = (third > 48 * 1024 ? third : 48 * 1024) / static_cast<int>(sizeof(float)) - tables;
    const int most_columns = floats / ((reach + 2) * width);
    int most_tiles = (most_columns - reach) / plan.columns;
    if (most_tiles < 1) {
        return "columns is too large for the shared memory";
    }
    most_tiles = most_tiles < static_cast<int>(a.walkers_per_block) ? most_tiles
                                                                    : static_cast<int>(a.walkers_per_block);
    a.column_blocks = ceil_divide(tiles, most_tiles);
    a.tiles_per_segment = ceil_divide(tiles, a.column_blocks);
    const uint32_t by_threads = a.walkers_per_block / a.tiles_per_segment;
    const uint32_t by_memory =
        static_cast<uint32_t>(most_columns) / (a.tiles_per_segment * plan.columns + reach);
    a.segments_per_block = by_threads < by_memory ? by_threads : by_memory;
    a.strip_rows = choose_rows(
        rows, static_cast<uint64_t>(p.batch) * a.column_blocks * a.cut.blocks * 1024 / a.segments_per_block,
        p.tile.rows);
    a.strips = ceil_divide(rows, a.strip_rows);
    const uint64_t per_image = static_cast<uint64_t>(a.strips) * a.column_blocks;
    if (per_image * a.cut.blocks > static_cast<uint64_t>(LARGEST_COUNT / p.batch)) {
        return "the map is too large: it has more than 2^31 tiles";
    }
    a.segments = static_cast<uint32_t>(p.batch * per_image);
    // A small map would leave most segments of its only block idle, and its shared memory unused.
    a.segments_per_block = a.segments_per_block < a.segments ? a.segments_per_block : a.segments;
    plan.parts = ceil_divide(a.segments, a.segments_per_block);
    a.rounds = ceil_divide(plan.parts, most_parts(p, a.cut.blocks, a.part_rows));
    plan.parts = ceil_divide(plan.parts, a.rounds);
    plan.blocks = plan.parts * a.cut.blocks;
    return nullptr;
}

struct PointwisePlan {
    PointwiseArguments arguments;
    int vector;
    uint32_t parts, blocks;
};

template <typename... Maps>
const char* plan_pointwise(const DepthwiseProblem& p, int64_t height, int64_t width, PointwisePlan& plan,
                           const Maps&... maps) {
    // Planes without gaps between their rows are one row, which longer vectors may divide.
    const bool one_row =
        p.planes && ((maps.data == nullptr || maps.strides.h == width || height == 1) && ...);
    if (one_row) {
        width *= height;
        height = 1;
    }
    const auto seen = [&](Map map) {
        map.strides.h = one_row ? 0 : map.strides.h;
        return map;
    };
    plan.vector = choose_vector(8, 0, p.planes ? width : p.channels, p, seen(maps)...);
    width /= p.planes ? plan.vector : 1;
    PointwiseArguments& a = plan.arguments;
    a = {};
    a.planes = p.planes;
    const auto channels = static_cast<uint32_t>(p.channels);
    a.cut = p.planes ? ChannelCut{channels, channels, 1} : cut_channels(p.channels, plan.vector);
    a.walkers = THREADS / a.cut.lanes;
    a.channels = p.channels;
    a.positions = p.batch * height * width;
    a.height = static_cast<uint32_t>(height);
    a.width = static_cast<uint32_t>(width);
    a.step_w = a.walkers % a.width;
    a.step_h = a.walkers / a.width % a.height;
    a.step_n = a.walkers / a.width / a.height;
    // Eight blocks on every multiprocessor, if each thread has at least four positions; more blocks than that
    // only once a thread has 64.
    const int64_t wanted = 8 * static_cast<int64_t>(multiprocessor_count());
    const int64_t iterations = (a.positions * a.cut.blocks / a.walkers + wanted - 1) / wanted;
    a.iterations = static_cast<uint32_t>(iterations < 4 ? 4 : (iterations > 64 ? 64 : iterations));
    const int64_t parts = (a.positions + a.walkers * a.iterations - 1) / (a.walkers * a.iterations);
    if (parts * a.cut.blocks > LARGEST_COUNT) {
        return "the map is too large: it has more than 2^31 tiles";
    }
    plan.parts = static_cast<uint32_t>(parts);
    plan.blocks = plan.parts * a.cut.blocks;
    a.norm_weight = p.norm_weight;
    a.norm_bias = p.norm_bias;
    a.mean = p.mean;
    a.var = p.var;
    a.eps = p.eps;
    a.activation = p.activation;
    a.residual_mode = p.residual_mode;
    a.residual = p.identity ? p.x : p.residual;
    return nullptr;
}

// Calls `function` with a value of the element type.
template <typename Function>
const char* with_type(ScalarType type, const Function& function) {
    switch (type) {
// Programs that only look for races and stray accesses compile one type: the types share one kernel text.
#if !defined(FUSED_OPS_FLOAT16_ONLY)
        case ScalarType::float32:
            return function(float{});
        case ScalarType::bfloat16:
            return function(bfloat16{});
#endif
        case ScalarType::float16:
            return function(float16{});
        default:
            return "no kernel was compiled for the element type";
    }
}

const char* run(const ForwardPlan& plan, bool statistics, void* stream) {
    const DepthwiseProblem& p = plan.arguments.params.problem;
    return with_type(p.type, [&](auto scalar) {
        using T = decltype(scalar);
#if defined(FUSED_OPS_3X3_ONLY)
        const auto launch = launch_forward<T, 3>;
#else
        const auto launch = p.kernel == 3   ? launch_forward<T, 3>
                            : p.kernel == 5 ? launch_forward<T, 5>
                                            : launch_forward<T, 7>;
#endif
        return launch(plan.arguments, plan.vector, plan.columns, plan.blocks, statistics, stream);
    });
}

const char* run(const BackwardPlan& plan, void* stream) {
    const DepthwiseProblem& p = plan.arguments.params.problem;
    return with_type(p.type, [&](auto scalar) {
        using T = decltype(scalar);
#if defined(FUSED_OPS_3X3_ONLY)
        const auto launch = launch_backward<T, 3>;
#else
        const auto launch = p.kernel == 3   ? launch_backward<T, 3>
                            : p.kernel == 5 ? launch_backward<T, 5>
                                            : launch_backward<T, 7>;
#endif
        return launch(plan.arguments, plan.vector, plan.columns, plan.blocks, stream);
    });
}

const char* run(const PointwisePlan& plan, PointwiseKernel kernel, ScalarType type, void* stream) {
    return with_type(type, [&](auto scalar) {
        return launch_pointwise<decltype(scalar)>(kernel, plan.arguments, plan.vector, plan.blocks, stream);
    });
}

// The plans of one forward call, and how its workspace is cut: count (parts), mean and M2 (parts, channels).
struct ForwardSequence {
    ForwardPlan convolution;
    PointwisePlan moments, normalise;
    uint32_t parts = 0;
    bool convolves_twice = false;

    const char* plan(const DepthwiseForwardParams& params) {
        const DepthwiseProblem& p = params.problem;
        FUSED_OPS_TRY(check(p));
        if (!p.identity && p.batch > 0 &&
            (p.residual_mode == ResidualMode::none) != (p.residual.data == nullptr)) {
            return "a residual needs a residual mode, and a residual mode a residual";
        }
        if (p.batch == 0) {
            return p.batch_stats ? "the batch is empty and its statistics are needed" : nullptr;
        }
        if (params.out.data == nullptr) {
            return "output is missing";
        }
        if (p.batch_stats && params.unbiased_var == nullptr) {
            return "the unbiased variance is missing";
        }
        FUSED_OPS_TRY(plan_forward(params, convolution));
        if (batch_before(p)) {
            FUSED_OPS_TRY(plan_pointwise(p, p.height, p.width, moments, p.x));
            moments.arguments.source = p.x;
            parts = moments.parts;
        }
        if (batch_after(p)) {
            parts = convolution.parts;
        }
        convolves_twice = batch_after(p) && params.raw.data == nullptr;
        if (batch_after(p) && !convolves_twice) {
            const Map& residual = p.identity ? p.x : p.residual;
            FUSED_OPS_TRY(
                plan_pointwise(p, p.out_height, p.out_width, normalise, params.raw, residual, params.out));
            normalise.arguments.source = params.raw;
            normalise.arguments.target = params.out;
        }
        return nullptr;
    }

    const char* launch(const DepthwiseForwardParams& params, void* stream) {
        const DepthwiseProblem& p = params.problem;
        if ((p.stages & STATISTICS_STAGE) != 0 && p.batch_stats) {
            float* const count = p.workspace;
            float* const mean = count + parts;
            float* const m2 = mean + parts * p.channels;
            if (batch_before(p)) {
                moments.arguments.part_count = count;
                moments.arguments.parts = mean;
                moments.arguments.part_m2 = m2;
                FUSED_OPS_TRY(run(moments, PointwiseKernel::moments, p.type, stream));
            } else {
                ForwardPlan statistics = convolution;
                statistics.arguments.part_count = count;
                statistics.arguments.part_mean = mean;
                statistics.arguments.part_m2 = m2;
                FUSED_OPS_TRY(run(statistics, true, stream));
            }
            const int64_t values = batch_before(p) ? p.height * p.width : p.out_height * p.out_width;
            const MergeMomentsArguments merge{count,  mean,       m2,
                                              parts,  p.channels, static_cast<float>(p.batch * values),
                                              p.mean, p.var,      params.unbiased_var};
            FUSED_OPS_TRY(launch_merge_moments(merge, stream));
        }
        if ((p.stages & RESULT_STAGE) == 0) {
            return nullptr;
        }
        return batch_after(p) && !convolves_twice ? run(normalise, PointwiseKernel::normalise, p.type, stream)
                                                  : run(convolution, false, stream);
    }
};

// The plans of one backward call. Its workspace: the norm's two sums (2, channels), then the parts of the
// kernel that runs.
struct BackwardSequence {
    BackwardPlan gradients;
    PointwisePlan norm_sums, finish;
    bool has_gradients = false;

    const char* plan(const DepthwiseBackwardParams& params) {
        const DepthwiseProblem& p = params.problem;
        FUSED_OPS_TRY(check(p));
        if (p.batch == 0) {
            return "the batch is empty";
        }
        const bool needs_raw = p.activation != Activation::none || batch_after(p);
        if (params.grad.data == nullptr || (needs_raw && params.raw.data == nullptr)) {
            return "the gradient or the convolution's output is missing";
        }
        const Map& residual = p.identity ? p.x : p.residual;
        if (p.residual_mode == ResidualMode::before && p.activation != Activation::none &&
            residual.data == nullptr) {
            return "the residual before the activation is missing";
        }
        if (p.batch_stats && p.stages != (STATISTICS_STAGE | RESULT_STAGE) && params.sums == nullptr) {
            return "stages apart need memory for the sums";
        }
        FUSED_OPS_TRY(plan_backward(params, gradients));
        has_gradients = gradients.arguments.part_rows != 0 || gradients.arguments.need_x ||
                        params.residual_grad.data != nullptr;
        if (batch_after(p)) {
            FUSED_OPS_TRY(
                plan_pointwise(p, p.out_height, p.out_width, norm_sums, params.grad, params.raw, residual));
            norm_sums.arguments.grad = params.grad;
            norm_sums.arguments.source = params.raw;
        }
        if (batch_before(p) && params.x_grad.data != nullptr) {
            FUSED_OPS_TRY(plan_pointwise(p, p.height, p.width, finish, p.x, params.x_grad));
            finish.arguments.source = p.x;
            finish.arguments.target = params.x_grad;
        }
        return nullptr;
    }

    int64_t part_floats(const DepthwiseProblem& p) const {
        const int64_t first = batch_after(p) ? int64_t{norm_sums.parts} * 2 : 0;
        const int64_t second = int64_t{gradients.parts} * gradients.arguments.part_rows;
        return (first > second ? first : second) * p.channels;
    }

    const char* launch(const DepthwiseBackwardParams& params, void* stream) {
        const DepthwiseProblem& p = params.problem;
        float* const sums = params.sums != nullptr ? params.sums : p.workspace;
        float* const parts = p.workspace + 2 * p.channels;
        const int64_t values = batch_after(p) ? p.out_height * p.out_width : p.height * p.width;
        const float inverse_count = 1.0f / static_cast<float>(p.batch * values);
        MergeSumsArguments merge{};
        merge.parts = parts;
        merge.channels = p.channels;
        merge.kernel = static_cast<uint32_t>(p.kernel);
        merge.weight = params.weight_grad;
        merge.bias = params.bias_grad;
        merge.norm_weight = params.norm_weight_grad;
        merge.norm_bias = params.norm_bias_grad;

        if (batch_after(p) && (p.stages & STATISTICS_STAGE) != 0) {
            norm_sums.arguments.parts = parts;
            FUSED_OPS_TRY(run(norm_sums, PointwiseKernel::norm_sums, p.type, stream));
            MergeSumsArguments both = merge;
            both.count = norm_sums.parts;
            both.sum_rows = 2;
            both.sums = sums;
            FUSED_OPS_TRY(launch_merge_sums(both, stream));
        }
        const int32_t stage = batch_before(p) ? STATISTICS_STAGE : RESULT_STAGE;
        if (has_gradients && (p.stages & stage) != 0) {
            BackwardArguments& a = gradients.arguments;
            a.inverse_count = inverse_count;
            a.sums = sums;
            a.parts = parts;
            FUSED_OPS_TRY(run(gradients, stream));
            if (a.part_rows != 0) {
                merge.count = gradients.parts;
                merge.weight_rows = a.need_weight ? p.kernel * p.kernel : 0;
                merge.bias_rows = a.need_bias ? 1 : 0;
                merge.sum_rows = a.need_sums ? 2 : 0;
                merge.sums = a.need_sums ? sums : nullptr;
                FUSED_OPS_TRY(launch_merge_sums(merge, stream));
            }
        }
        if (batch_before(p) && params.x_grad.data != nullptr && (p.stages & RESULT_STAGE) != 0) {
            finish.arguments.sums = sums;
            finish.arguments.inverse_count = inverse_count;
            FUSED_OPS_TRY(run(finish, PointwiseKernel::finish, p.type, stream));
        }
        return nullptr;
    }
};

}  // namespace

const char* depthwise_forward_workspace(const DepthwiseForwardParams& params, int64_t& floats) {
    ForwardSequence sequence;
    const char* error = sequence.plan(params);
    floats = sequence.parts * (2 * params.problem.channels + 1);
    return error;
}

const char* launch_depthwise_forward(const DepthwiseForwardParams& params, void* stream) {
    ForwardSequence sequence;
    if (const char* error = sequence.plan(params)) {
        return error;
    }
    return params.problem.batch == 0 ? nullptr : sequence.launch(params, stream);
}

const char* depthwise_backward_workspace(const DepthwiseBackwardParams& params, int64_t& floats) {
    BackwardSequence sequence;
    const char* error = sequence.plan(params);
    floats = error != nullptr ? 0 : sequence.part_floats(params.problem) + 2 * params.problem.channels;
    return error;
}

const char* launch_depthwise_backward(const DepthwiseBackwardParams& params, void* stream) {
    BackwardSequence sequence;
    if (const char* error = sequence.plan(params)) {
        return error;
    }
    return sequence.launch(params, stream);
}

}  // namespace fused_ops
