// The HR chain's launch sequences: what is launched, with which geometry, in which memory.
#include "../common/cluster.h"
#include "../common/scalar.h"
#include "../common/sequence.h"
#include "../depthwise/plan.h"
#include "plan.h"

namespace fused_ops {

namespace {

using namespace hr_chain;

const char* check(const HRChainProblem& p) {
    if (p.type == ScalarType::float32) {
        return "the kernels multiply in float16 or bfloat16";
    }
    if (p.fc1.type != p.type || p.fc2.type != p.type) {
        return "fc1 and fc2 must have the element type of x";
    }
    if (p.batch == 0) {
        return "the batch is empty";
    }
    if (padded_channels(p.channels) == 0) {
        return "x has more than 128 channels";
    }
    if (p.batch * p.low_height * p.low_width > LARGEST_COUNT) {
        return "the map is too large: it has more than 2^31 low-resolution pixels";
    }
    return nullptr;
}

bool is_aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Whether every pixel of a map has whole, aligned vectors of eight channels; so has a map that is not there.
bool is_wide(const HRChainProblem& p, const Map& map) {
    return map.data == nullptr || (is_aligned(map.data) && p.channels % 8 == 0 && map.strides.n % 8 == 0 &&
                                   map.strides.h % 8 == 0 && map.strides.w % 8 == 0);
}

bool is_wide(const LayerWeight& weight, int64_t columns) {
    return is_aligned(weight.data) && columns % 8 == 0;
}

// Calls `function` with a value of the element type.
template <typename Function>
const char* with_type(ScalarType type, const Function& function) {
#if !defined(FUSED_OPS_FLOAT16_ONLY)
    if (type == ScalarType::bfloat16) {
        return function(bfloat16{});
    }
#endif
    return type == ScalarType::float16 ? function(float16{}) : "no kernel was compiled for the element type";
}

// The statistics of the strided convolution: the depthwise operator's first stage.
DepthwiseForwardParams statistics_of(const HRChainForwardParams& params) {
    const HRChainProblem& p = params.problem;
    DepthwiseForwardParams result{};
    DepthwiseProblem& q = result.problem;
    q.batch = p.batch;
    q.height = p.height;
    q.width = p.width;
    q.channels = p.channels;
    q.out_height = p.low_height;
    q.out_width = p.low_width;
    q.kernel = 3;
    q.stride = 2;
    q.pad_h = q.pad_w = 1;
    q.type = p.type;
    q.norm = NormPlacement::post;
    q.batch_stats = true;
    q.eps = p.eps;
    q.x = p.x;
    q.weight = p.low_weight;
    q.mean = p.mean;
    q.var = p.var;
    q.stages = STATISTICS_STAGE;
    q.workspace = p.workspace;
    result.raw = params.low;
    // Asked for, and not written by this stage.
    result.out = params.low.data != nullptr ? params.low : params.out;
    result.unbiased_var = params.unbiased_var;
    return result;
}

struct BackwardSequence {
    LowBackwardArguments low{};
    MapsBackwardArguments maps{};
    bool has_low = false, has_maps = false;

    const char* plan(const HRChainBackwardParams& params) {
        const HRChainProblem& p = params.problem;
        FUSED_OPS_TRY(check(p));
        const bool to_low = params.x_grad.data != nullptr || params.low_weight_grad.data != nullptr;
        const bool of_norm = params.norm_weight_grad.data != nullptr || params.norm_bias_grad.data != nullptr;
        const bool of_layers = params.fc1_weight_grad.data != nullptr ||
                               params.fc1_bias_grad.data != nullptr || params.fc2_weight_grad.data != nullptr;
        const bool of_high = params.high_weight_grad.data != nullptr ||
                             params.high_bias_grad.data != nullptr || params.fc2_bias_grad.data != nullptr;
        if (to_low && params.low_grad.data == nullptr) {
            return "memory for the gradient of the norm's output is missing";
        }
        low.params = params;
        low.params.low_grad.data = to_low ? params.low_grad.data : nullptr;
        low.weights = of_layers || of_norm || (to_low && p.batch_stats);
        has_low = to_low || low.weights;
        const int64_t warps = ceil_divide(p.hidden, WARP_UNITS);
        const int padded = padded_channels(p.channels);
        low.depth = ceil_divide(warps, most_warps(padded));
        if (low.depth > (clusters_are_supported() ? LARGEST_CLUSTER : 1)) {
            return "there are too many hidden units for this GPU";
        }
        low.warps = ceil_divide(warps, low.depth);
        low.tiles = ceil_divide(p.batch * p.low_height * p.low_width, LOW_PIXELS);
        low.repeats = clusters_are_supported() ? LARGEST_CLUSTER / low.depth : 1;
        low.repeats = low.repeats < low.tiles ? low.repeats : low.tiles;
        const uint32_t blocks = low.depth * low.repeats;
        const auto multiprocessors = static_cast<uint32_t>(multiprocessor_count());
        const uint32_t by_threads = padded <= 64 ? most_warps(padded) / low.warps : 1;
        const uint32_t by_memory = static_cast<uint32_t>(shared_memory_of_multiprocessor()) /
                                   (low_backward_bytes(padded, low.warps) + 1024);
        const uint32_t resident = by_threads < by_memory ? by_threads : by_memory;
        // Each part costs as much traffic as hidden / 4 tiles take twenty times over; more parts than one
        // block per multiprocessor writes are not worth more.
        const uint32_t least = multiprocessors / blocks;
        const uint32_t most = multiprocessors * resident / blocks;
        const auto cheap = static_cast<uint32_t>(4 * static_cast<uint64_t>(low.tiles) / p.hidden);
        low.parts = cheap < most ? cheap : most;
        low.parts = low.parts > least ? low.parts : least;
        low.parts = low.parts > 0 ? low.parts : 1;
        low.rounds = ceil_divide(low.tiles, int64_t{low.parts} * low.repeats);
        low.parts = ceil_divide(low.tiles, int64_t{low.rounds} * low.repeats);
        low.wide_maps = is_wide(p, params.grad) && is_wide(p, params.low) && is_wide(p, low.params.low_grad);
        low.wide_fc1 = is_wide(p.fc1, p.channels);

        has_maps = to_low || of_high;
        maps.params = params;
        constexpr int64_t ROWS = 8;
        maps.tiles.down = ceil_divide(p.low_height, ROWS);
        maps.tiles.across = ceil_divide(p.low_width, TILE_COLUMNS);
        maps.tiles.count = maps.tiles.down * maps.tiles.across * static_cast<uint32_t>(p.batch);
        maps.channel_blocks = ceil_divide(p.channels, p.channels <= 16 ? 16 : 32);
        // A part takes 20 floats of each channel, written and read: a hundredth of what 16 tiles move.
        maps.rounds =
            ceil_divide(int64_t{maps.tiles.count} * maps.channel_blocks, 4 * int64_t{multiprocessors});
        maps.rounds = maps.rounds > 4 ? maps.rounds : 4;
        maps.parts = ceil_divide(maps.tiles.count, maps.rounds);
        maps.wide_maps = is_wide(p, params.grad) && is_wide(p, p.x) && is_wide(p, params.x_grad) &&
                         is_wide(p, params.low) && is_wide(p, params.low_grad);
        maps.inverse_count = 1.0f / static_cast<float>(p.batch * p.low_height * p.low_width);

        // Memory that is not there yet is counted from null.
        float* const sums = params.sums != nullptr ? params.sums : p.workspace;
        float* next = p.workspace + 2 * p.channels;
        float* const start = next;
        const auto take = [&](int64_t floats) {
            float* const taken = next;
            next += floats;
            return taken;
        };
        const int64_t matrix = p.hidden * p.channels;
        if (low.weights) {
            finish = {params, nullptr, nullptr, nullptr, low.parts, take(matrix), take(p.hidden), sums};
            finish.parts_fc1 = low.parts_fc1 = take(low.parts * matrix);
            finish.parts_fc2 = low.parts_fc2 = take(low.parts * matrix);
            finish.parts_bias = low.parts_bias = take(low.parts * p.hidden);
        }
        float* const end = next;
        // The second stage needs nothing of the first but the sums.
        next = start;
        maps.sums = sums;
        maps.high_taps = params.high_weight_grad.data != nullptr ? 9 : 0;
        maps.parts_high =
            of_high ? take(int64_t{maps.parts} * (maps.high_taps + HIGH_BIAS_ROWS) * p.channels) : nullptr;
        maps.parts_low =
            params.low_weight_grad.data != nullptr ? take(int64_t{maps.parts} * 9 * p.channels) : nullptr;
        floats = (end > next ? end : next) - p.workspace;
        return nullptr;
    }

    const char* launch(const HRChainBackwardParams& params, void* stream) const {
        const HRChainProblem& p = params.problem;
        if (has_low && (p.stages & STATISTICS_STAGE) != 0) {
            FUSED_OPS_TRY(with_type(
                p.type, [&](auto scalar) { return launch_low_backward<decltype(scalar)>(low, stream); }));
            if (low.weights) {
                FUSED_OPS_TRY(launch_finish(finish, stream));
            }
        }
        if (!has_maps || (p.stages & RESULT_STAGE) == 0) {
            return nullptr;
        }
        FUSED_OPS_TRY(with_type(
            p.type, [&](auto scalar) { return launch_maps_backward<decltype(scalar)>(maps, stream); }));
        depthwise::MergeSumsArguments merge{};
        merge.count = maps.parts;
        merge.channels = p.channels;
        merge.weight_rows = 9;
        merge.kernel = 3;
        if (maps.parts_high != nullptr) {
            depthwise::MergeSumsArguments high = merge;
            high.parts = maps.parts_high;
            high.weight_rows = maps.high_taps;
            high.weight = params.high_weight_grad;
            high.bias_rows = HIGH_BIAS_ROWS - 1;
            high.bias = params.high_bias_grad;
            high.sum_rows = 1;
            high.norm_bias = params.fc2_bias_grad;
            FUSED_OPS_TRY(depthwise::launch_merge_sums(high, stream));
        }
        if (maps.parts_low != nullptr) {
            merge.parts = maps.parts_low;
            merge.weight = params.low_weight_grad;
            FUSED_OPS_TRY(depthwise::launch_merge_sums(merge, stream));
        }
        return nullptr;
    }

    FinishArguments finish{};
    int64_t floats = 0;
};

}  // namespace

const char* hr_chain_forward_workspace(const HRChainForwardParams& params, int64_t& floats) {
    floats = 0;
    FUSED_OPS_TRY(check(params.problem));
    if (params.problem.batch_stats && (params.problem.stages & STATISTICS_STAGE) != 0) {
        return depthwise_forward_workspace(statistics_of(params), floats);
    }
    return nullptr;
}

const char* launch_hr_chain_forward(const HRChainForwardParams& params, void* stream) {
    const HRChainProblem& p = params.problem;
    FUSED_OPS_TRY(check(p));
    if (p.batch_stats && (p.stages & STATISTICS_STAGE) != 0) {
        FUSED_OPS_TRY(launch_depthwise_forward(statistics_of(params), stream));
    }
    if ((p.stages & RESULT_STAGE) == 0) {
        return nullptr;
    }
    ForwardArguments arguments{};
    arguments.params = params;
    if (p.batch_stats) {
        // Written by the statistics.
        arguments.params.low.data = nullptr;
    }
    arguments.wide_maps = is_wide(p, p.x) && is_wide(p, params.out) && is_wide(p, arguments.params.low);
    arguments.wide_fc1 = is_wide(p.fc1, p.channels);
    arguments.wide_fc2 = is_wide(p.fc2, p.hidden);
    return with_type(p.type,
                     [&](auto scalar) { return launch_forward<decltype(scalar)>(arguments, stream); });
}

const char* hr_chain_backward_workspace(const HRChainBackwardParams& params, int64_t& floats) {
    BackwardSequence sequence;
    const char* const error = sequence.plan(params);
    floats = sequence.floats;
    return error;
}

const char* launch_hr_chain_backward(const HRChainBackwardParams& params, void* stream) {
    BackwardSequence sequence;
    FUSED_OPS_TRY(sequence.plan(params));
    return sequence.launch(params, stream);
}

}  // namespace fused_ops
