// What the launch sequences (sequence.cu) hand to the kernel units: geometry and arguments of one launch
// each.
#pragma once

#include <cstdint>

#include "../common/portability.h"
#include "params.h"

namespace fused_ops::depthwise {

constexpr int THREADS = 128;
// Threads of a block side by side over channels. More would leave fewer columns to a block, and so more halo;
// 16 lanes of 4 bytes are still whole 64-byte halves of a line.
constexpr int CHANNEL_LANES = 16;

// Channels are cut in blocks of `lanes` threads with `vector` channels each.
struct ChannelCut {
    uint32_t groups;  // channels / vector
    uint32_t blocks;
    uint32_t lanes;
};

// How blocks cover the planes of one channel of NCHW maps. A segment is a tile of one plane; a block has
// `segments_at_once` of them in shared memory, `rounds` times one after the other, and strips x lanes threads
// walk down each.
struct PlaneCut {
    uint32_t tile_rows, tile_columns;  // of a segment, on the output or its gradient
    uint32_t row_tiles, column_tiles;  // of a plane
    uint32_t lanes, strips, strip_rows;
    uint32_t segments_at_once, rounds, segments;
    uint32_t shared_rows, pitch;  // of a segment with its halo in shared memory, in floats

    FUSED_OPS_HOST_DEVICE uint32_t floats() const { return segments_at_once * shared_rows * pitch; }
};

// Geometry of the forward convolution: walker = (image, strip, column tile), `walkers_per_block` neighbouring
// ones in a block.
struct ForwardArguments {
    DepthwiseForwardParams params;
    PlaneCut planes;  // for NCHW maps, in place of what follows up to `walkers`
    ChannelCut cut;
    uint32_t walkers_per_block;
    uint32_t column_tiles;
    uint32_t strips;
    uint32_t strip_rows;
    uint32_t walkers;
    // With STATISTICS: one part per block and channel.
    float* part_count;  // (parts)
    float* part_mean;   // (parts, channels)
    float* part_m2;
};

// Geometry of the backward convolution: segment = (image, strip, block of columns); a block has
// `segments_per_block` of them at once with `tiles_per_segment` walkers each, `rounds` times one after the
// other.
struct BackwardArguments {
    DepthwiseBackwardParams params;
    PlaneCut planes;  // for NCHW maps, in place of what follows up to `segments`
    ChannelCut cut;
    uint32_t walkers_per_block;
    uint32_t tiles_per_segment;
    uint32_t segments_per_block;
    uint32_t rounds;
    uint32_t column_blocks;
    uint32_t strips;
    uint32_t strip_rows;  // rows of the gradient
    uint32_t segments;
    // The walk starts at this row and column of x, not above 0, where a tap of row or column 0 of the
    // gradient falls on it.
    int32_t first_row, first_column;
    bool need_x, need_weight, need_bias, need_sums;
    float inverse_count;
    const float* sums;  // (2, channels), for a norm after the convolution with batch statistics
    float* parts;       // (parts, part_rows, channels): weight taps, bias, the two sums; as far as needed
    uint32_t part_rows;
};

// Geometry of elementwise kernels: a block owns `iterations` times `walkers` neighbouring positions of the
// map. On planes a position is a vector of columns, of which `width` make a row; planes without gaps between
// their rows are one row.
struct PointwiseArguments {
    bool planes;
    ChannelCut cut;
    uint32_t walkers;
    uint32_t iterations;
    int64_t positions, channels;
    uint32_t height, width;
    // `walkers` positions further on.
    uint32_t step_w, step_h;
    int64_t step_n;

    Map source, residual, grad, target;
    ChannelValues norm_weight, norm_bias, mean, var;
    float eps;
    Activation activation;
    ResidualMode residual_mode;
    float inverse_count;
    const float* sums;
    float* part_count;
    float* parts;
    float* part_m2;
};

struct MergeMomentsArguments {
    const float* count;
    const float* mean;
    const float* m2;
    uint32_t parts;
    int64_t channels;
    float total;
    ChannelValues out_mean, out_var;
    float* out_unbiased;
};

// Rows of the parts: kernel * kernel weight taps if weight_rows, bias if bias_rows, the two sums if sum_rows.
struct MergeSumsArguments {
    const float* parts;
    uint32_t count;
    int64_t channels;
    uint32_t weight_rows, bias_rows, sum_rows;
    uint32_t kernel;
    DepthwiseWeight weight;
    ChannelValues bias, norm_weight, norm_bias;
    float* sums;
};

enum class PointwiseKernel { moments, normalise, norm_sums, finish };

// One definition per element type and kernel size, each in its own object file.
template <typename T, int K>
const char* launch_forward(const ForwardArguments& arguments, int vector, int columns, uint32_t blocks,
                           bool statistics, void* stream);
template <typename T, int K>
const char* launch_backward(const BackwardArguments& arguments, int vector, int columns, uint32_t blocks,
                            void* stream);
// The same for NCHW maps, which the two above hand on.
template <typename T, int K>
const char* launch_planes_forward(const ForwardArguments& arguments, int vector, uint32_t blocks,
                                  bool statistics, void* stream);
template <typename T, int K>
const char* launch_planes_backward(const BackwardArguments& arguments, int vector, uint32_t blocks,
                                   void* stream);
template <typename T>
const char* launch_pointwise(PointwiseKernel kernel, const PointwiseArguments& arguments, int vector,
                             uint32_t blocks, void* stream);
const char* launch_merge_moments(const MergeMomentsArguments& arguments, void* stream);
const char* launch_merge_sums(const MergeSumsArguments& arguments, void* stream);

// Shared memory of the backward convolution for the gradient's rows, in floats: a ring of rows of `columns`
// columns, which at the end holds the sums of at least one row of the parts.
FUSED_OPS_HOST_DEVICE uint32_t backward_ring_floats(int kernel, int stride, uint32_t columns,
                                                    uint32_t channels, int vector) {
    const uint32_t ring = static_cast<uint32_t>((kernel - 1) / stride + 2) * columns * channels;
    const uint32_t least = static_cast<uint32_t>(THREADS * vector);
    return ring > least ? ring : least;
}

}  // namespace fused_ops::depthwise
