// What the launch sequences (sequence.cu) hand to the HR chain's kernel units: geometry and arguments of one
// launch each. A tile is `rows` x 8 neighbouring pixels of the low-resolution map; pixel (i, j) of it stands
// for the full-resolution pixels (2i + a, 2j + b), a and b 0 or 1, whose two 3x3 convolutions read the 4x4
// pixels around.
#pragma once

#include <cstdint>

#include "../common/portability.h"
#include "params.h"

namespace fused_ops::hr_chain {

constexpr int TILE_COLUMNS = 8;
constexpr int HALO_COLUMNS = 2 * TILE_COLUMNS + 2;

// Tiles of all images.
struct TileCut {
    uint32_t down, across, count;
};

struct ForwardArguments {
    HRChainForwardParams params;
    TileCut tiles;
    // Whether vectors of eight channels or hidden units are whole and aligned, in the maps and in each
    // matrix.
    bool wide_maps, wide_fc1, wide_fc2;
};

// The sums for the full-resolution filter's bias are also fc2's.
constexpr int HIGH_BIAS_ROWS = 2;

// One cluster of `depth` x `repeats` blocks per part: its blocks take `depth` slices of the hidden units, and
// tiles of 32 low-resolution pixels in turn, `repeats` at once.
struct LowBackwardArguments {
    HRChainBackwardParams params;
    uint32_t depth, repeats, parts;
    uint32_t tiles, rounds;
    uint32_t warps;  // of a block; each has 16 hidden units
    bool wide_maps, wide_fc1;
    bool weights;       // whether parts are written
    float* parts_fc1;   // (parts, hidden, channels): sums of hidden gradient times normalised value
    float* parts_fc2;   // (parts, hidden, channels): sums of hidden value times gradient
    float* parts_bias;  // (parts, hidden)
};

struct MapsBackwardArguments {
    HRChainBackwardParams params;
    TileCut tiles;
    uint32_t parts, rounds, channel_blocks;
    bool wide_maps;
    float inverse_count;
    const float* sums;
    uint32_t high_taps;  // 9, or 0 where the full-resolution filter needs no gradient
    float* parts_high;   // (parts, high_taps + HIGH_BIAS_ROWS, channels); null where nothing needs them
    float* parts_low;    // (parts, 9, channels): taps; the same
};

struct FinishArguments {
    HRChainBackwardParams params;
    const float *parts_fc1, *parts_fc2, *parts_bias;
    uint32_t parts;
    float* fc1_sums;   // (hidden, channels)
    float* bias_sums;  // (hidden)
    float* sums;       // (2, channels)
};

// One definition per element type, each in its own object file.
template <typename T>
const char* launch_forward(const ForwardArguments& arguments, void* stream);
template <typename T>
const char* launch_low_backward(const LowBackwardArguments& arguments, void* stream);
template <typename T>
const char* launch_maps_backward(const MapsBackwardArguments& arguments, void* stream);
const char* launch_finish(const FinishArguments& arguments, void* stream);

// Channels rounded up to what kernels are compiled for; 0 above 128.
FUSED_OPS_HOST_DEVICE int padded_channels(int64_t channels) {
    return channels <= 16    ? 16
           : channels <= 32  ? 32
           : channels <= 64  ? 64
           : channels <= 96  ? 96
           : channels <= 128 ? 128
                             : 0;
}

// Rows of shared memory are this much longer than their elements, so that eight of them lie in different
// banks.
constexpr int ROW_PADDING = 8;

constexpr int LOW_PIXELS = 32;
constexpr int WARP_UNITS = 16;
// Warps of a block of the low-resolution backward: their weight gradients fill the registers.
FUSED_OPS_HOST_DEVICE int most_warps(int padded) {
    return padded <= 64 ? 16 : 8;
}

// Bytes of shared memory of the low-resolution backward: the norm's and fc1's vectors, fc1, the hidden
// gradients, three operands (or the map gradient in their place), and pixels on their way: four of the
// gradient and one of the branch.
FUSED_OPS_HOST_DEVICE uint32_t low_backward_bytes(int padded, uint32_t warps) {
    const uint32_t units = warps * WARP_UNITS;
    const uint32_t pitch = padded + ROW_PADDING;
    const uint32_t working = 16 * padded + 4 * units +
                             2 * (units * pitch + units * (LOW_PIXELS + ROW_PADDING) +
                                  3 * LOW_PIXELS * pitch + 5 * LOW_PIXELS * padded);
    // At the end one matrix of weight gradients takes the place of all this.
    const uint32_t gradients = 4 * units * padded;
    return working > gradients ? working : gradients;
}

}  // namespace fused_ops::hr_chain
