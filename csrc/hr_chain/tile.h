// What the HR chain's kernels over full-resolution maps share: tiles with their halo in shared memory, in
// pairs of channels per thread.
#pragma once

#include "../common/activation.h"
#include "../common/matrix.h"
#include "plan.h"

namespace fused_ops::hr_chain {

// Where a tile of ROWS x TILE_COLUMNS low-resolution pixels lies.
struct Tile {
    int64_t image;
    int row, column;  // its first low-resolution pixel
};

template <int ROWS>
FUSED_OPS_DEVICE Tile tile_of(const TileCut& cut, uint32_t index) {
    const uint32_t in_image = index % (cut.down * cut.across);
    return {index / (cut.down * cut.across), static_cast<int>(in_image / cut.across) * ROWS,
            static_cast<int>(in_image % cut.across) * TILE_COLUMNS};
}

// Starts copying the pixels that the 3x3 convolutions of a tile read, (2 ROWS + 2) x HALO_COLUMNS of CHANNELS
// channels from `first_channel` on, zero outside the map.
template <typename T, int ROWS, int CHANNELS, int THREADS>
FUSED_OPS_DEVICE void copy_tile(T* shared, const Map& map, const HRChainProblem& p, const Tile& tile,
                                int first_channel, bool wide) {
    constexpr int OCTETS = CHANNELS / 8;
    const T* const image = static_cast<const T*>(map.data) + tile.image * map.strides.n;
    for (int item = threadIdx.x; item < (2 * ROWS + 2) * HALO_COLUMNS * OCTETS; item += THREADS) {
        const int pixel = item / OCTETS;
        const int channel = first_channel + item % OCTETS * 8;
        const int row = 2 * tile.row - 1 + pixel / HALO_COLUMNS;
        const int column = 2 * tile.column - 1 + pixel % HALO_COLUMNS;
        const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
        const int count = inside ? static_cast<int>(p.channels) - channel : 0;
        const T* const source =
            count > 0 ? image + row * map.strides.h + column * map.strides.w + channel : image;
        copy_channels(shared + item * 8, source, count, wide);
    }
}

// A filter as floats, (9, CHANNELS); zero where there is no such channel.
template <int CHANNELS, int THREADS>
FUSED_OPS_DEVICE void load_filter(float* shared, const DepthwiseWeight& weight, int64_t channels,
                                  int first_channel) {
    for (int item = threadIdx.x; item < 9 * CHANNELS; item += THREADS) {
        const int64_t channel = first_channel + item % CHANNELS;
        const int tap = item / CHANNELS;
        shared[item] = channel < channels
                           ? load_element(weight.data, weight.type,
                                          channel * weight.c_stride + tap / 3 * weight.h_stride +
                                              tap % 3 * weight.w_stride)
                           : 0.0f;
    }
}

// A value of a channel, or `otherwise` where the model has none or there is no such channel.
FUSED_OPS_DEVICE float value_of(const ChannelValues& values, int64_t index, int64_t count, float otherwise) {
    return values.data != nullptr && index < count
               ? load_element(values.data, values.type, index * values.stride)
               : otherwise;
}

// One over the square root of a channel's variance.
FUSED_OPS_DEVICE float inverse_deviation(const HRChainProblem& p, int64_t channel) {
    return 1.0f / sqrtf(value_of(p.var, channel, p.channels, 1.0f) + p.eps);
}

// Two channels of all taps of a filter in shared memory.
template <int CHANNELS>
FUSED_OPS_DEVICE void read_taps(float (&taps)[9][2], const float* filter, int channel) {
    FUSED_OPS_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
        taps[tap][0] = filter[tap * CHANNELS + channel];
        taps[tap][1] = filter[tap * CHANNELS + channel + 1];
    }
}

// Two channels of four neighbouring pixels of a row in shared memory.
template <typename T, int CHANNELS>
FUSED_OPS_DEVICE void read_row(float (&values)[4][2], const T* first) {
    FUSED_OPS_UNROLL
    for (int column = 0; column < 4; ++column) {
        const uint32_t word = load_pair(first + column * CHANNELS);
        values[column][0] = first_of<T>(word);
        values[column][1] = second_of<T>(word);
    }
}

// Stores two channels of a pixel, as far as there are.
template <typename T>
FUSED_OPS_DEVICE void store_channels(T* address, float first, float second, int64_t channels_left,
                                     bool pair) {
    const Vector<T, 2> both{{from_float<T>(first), from_float<T>(second)}};
    if (pair) {
        if (channels_left > 0) {
            store_vector(address, both);
        }
        return;
    }
    if (channels_left > 0) {
        store_vector(address, Vector<T, 1>{{both.elements[0]}});
    }
    if (channels_left > 1) {
        store_vector(address + 1, Vector<T, 1>{{both.elements[1]}});
    }
}

}  // namespace fused_ops::hr_chain
