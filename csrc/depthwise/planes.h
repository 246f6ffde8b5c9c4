// What kernels on planes (NCHW maps) share on the device. A thread block works on one channel, so its sums
// are those of all threads; they are taken in a fixed order.
#pragma once

#include "device.h"

namespace fused_ops::depthwise {

constexpr int WARP_THREADS = 32;
constexpr int WARPS = THREADS / WARP_THREADS;

struct Moments {
    float count, mean, m2;
};

FUSED_OPS_DEVICE Moments merge(const Moments& a, const Moments& b) {
    const float count = a.count + b.count;
    const float share = count > 0.0f ? b.count / count : 0.0f;
    const float difference = b.mean - a.mean;
    return {count, a.mean + difference * share, a.m2 + b.m2 + difference * difference * a.count * share};
}

// Merges the moments of the block's threads, each of `count` values, and writes them as part `part`. All
// threads call it; the first one has some values.
FUSED_OPS_DEVICE void store_plane_moments(const RunningMoments& running, uint32_t count, uint32_t part,
                                          int64_t channel, int64_t channels, float* part_count,
                                          float* part_mean, float* part_m2) {
    __shared__ Moments of_warps[WARPS];
    __shared__ float reference;
    if (threadIdx.x == 0) {
        reference = running.first;
    }
    __syncthreads();
    Moments own{static_cast<float>(count), 0.0f, 0.0f};
    if (count > 0) {
        // Means relative to one value of the block stay small where all are large, and keep their digits.
        running.finish(own.count, own.mean, own.m2, reference);
    }
    FUSED_OPS_UNROLL
    for (int offset = WARP_THREADS / 2; offset > 0; offset /= 2) {
        const Moments other = {__shfl_down_sync(~0u, own.count, offset),
                               __shfl_down_sync(~0u, own.mean, offset),
                               __shfl_down_sync(~0u, own.m2, offset)};
        own = merge(own, other);
    }
    if (threadIdx.x % WARP_THREADS == 0) {
        of_warps[threadIdx.x / WARP_THREADS] = own;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < WARPS; ++warp) {
            own = merge(own, of_warps[warp]);
        }
        const int64_t index = static_cast<int64_t>(part) * channels + channel;
        store_float(part_mean + index, reference + own.mean);
        store_float(part_m2 + index, own.m2);
        if (channel == 0) {
            store_float(part_count + part, own.count);
        }
    }
}

// Adds up COUNT values over a warp: lane l is left with the sums of values l P .. l P + P - 1 in its first
// P = COUNT / 32. Two lanes swap halves of what they still hold and keep the sums of one half each, so that
// it takes COUNT shuffles, where every sum by itself would take five. A template, so that all indices are
// constant.
template <int OFFSET = WARP_THREADS / 2, int COUNT>
FUSED_OPS_DEVICE void sum_over_warp(float (&values)[COUNT]) {
    constexpr int HALF = COUNT / WARP_THREADS * OFFSET;
    const bool upper = (threadIdx.x & OFFSET) != 0;
    FUSED_OPS_UNROLL
    for (int i = 0; i < HALF; ++i) {
        const float sent = upper ? values[i] : values[i + HALF];
        const float kept = upper ? values[i + HALF] : values[i];
        values[i] = kept + __shfl_xor_sync(~0u, sent, OFFSET);
    }
    if constexpr (OFFSET > 1) {
        sum_over_warp<OFFSET / 2>(values);
    }
}

// Adds up what the block's threads hold and writes it as part `part`: TAPS weight gradients if `weight_rows`,
// then of `own` the first if `bias_rows`, then the other two if `sum_rows`. All threads call it.
template <int TAPS>
FUSED_OPS_DEVICE void store_plane_sums(const float (&taps)[TAPS], const float (&own)[3], uint32_t weight_rows,
                                       uint32_t bias_rows, uint32_t sum_rows, uint32_t part, int64_t channel,
                                       int64_t channels, float* parts) {
    constexpr int PER_LANE = (TAPS + 3 + WARP_THREADS - 1) / WARP_THREADS;
    constexpr int COUNT = PER_LANE * WARP_THREADS;
    __shared__ float of_warps[WARPS][COUNT];
    float values[COUNT] = {};
    FUSED_OPS_UNROLL
    for (int i = 0; i < TAPS + 3; ++i) {
        values[i] = i < TAPS ? taps[i < TAPS ? i : 0] : own[i < TAPS ? 0 : i - TAPS];
    }
    sum_over_warp(values);
    FUSED_OPS_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        of_warps[threadIdx.x / WARP_THREADS][threadIdx.x % WARP_THREADS * PER_LANE + i] = values[i];
    }
    __syncthreads();
    const uint32_t i = threadIdx.x;
    const bool is_tap = i < TAPS;
    const bool wanted = is_tap ? weight_rows != 0 : (i == TAPS ? bias_rows != 0 : sum_rows != 0);
    if (i < TAPS + 3 && wanted) {
        float sum = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) {
            sum += of_warps[warp][i];
        }
        const uint32_t rows = weight_rows + bias_rows + sum_rows;
        const uint32_t row = is_tap ? i : weight_rows + (i == TAPS ? 0 : bias_rows + i - TAPS - 1);
        store_float(parts + (static_cast<int64_t>(part) * rows + row) * channels + channel, sum);
    }
}

// Where a segment of the block lies: its image, -1 for none, and its first row and column, counted as
// PlaneCut's tiles are.
struct alignas(16) SegmentPlace {
    int image, row, column;
};

// The segments of a round. All threads call it, between barriers.
FUSED_OPS_DEVICE void place_segments(const PlaneCut& cut, uint32_t part, uint32_t round,
                                     SegmentPlace (&places)[THREADS]) {
    if (threadIdx.x < cut.segments_at_once) {
        const uint32_t segment = (part * cut.rounds + round) * cut.segments_at_once + threadIdx.x;
        const uint32_t image_row = segment / cut.column_tiles;
        places[threadIdx.x] = {
            segment < cut.segments ? static_cast<int>(image_row / cut.row_tiles) : -1,
            static_cast<int>(image_row % cut.row_tiles * cut.tile_rows),
            static_cast<int>(segment % cut.column_tiles * cut.tile_columns),
        };
    }
}

// Fills the segments' tiles in shared memory, V columns at a time. The first vector of a row begins `shift`
// columns before the tile, where the map is aligned. `load(place, row, column)` loads what is needed for a
// vector, row and column counted on the tile; BATCH of them are under way at once. `value(loaded, floats)`
// makes the tile's numbers of it.
template <int V, int BATCH, typename Load, typename Value>
FUSED_OPS_DEVICE void stage(const PlaneCut& cut, const SegmentPlace (&places)[THREADS], int shift,
                            float* tiles, const Load& load, const Value& value) {
    const uint32_t vectors = (cut.pitch + shift + V - 1) / V;
    const uint32_t lanes = vectors < THREADS ? vectors : THREADS;
    const uint32_t step = THREADS / lanes;
    const uint32_t rows = cut.segments_at_once * cut.shared_rows;
    const uint32_t first = threadIdx.x / lanes;
    if (first >= step) {
        return;
    }
    const uint32_t segment_step = step / cut.shared_rows;
    const uint32_t row_step = step % cut.shared_rows;
    FUSED_OPS_NO_UNROLL
    for (uint32_t vector = threadIdx.x % lanes; vector < vectors; vector += lanes) {
        const int column = static_cast<int>(vector * V) - shift;
        uint32_t segment = first / cut.shared_rows;
        uint32_t row = first % cut.shared_rows;
        FUSED_OPS_NO_UNROLL
        for (uint32_t begin = first; begin < rows; begin += BATCH * step) {
            decltype(load(places[0], 0, 0)) loaded[BATCH];
            FUSED_OPS_UNROLL
            for (int n = 0; n < BATCH; ++n) {
                if (begin + n * step < rows) {
                    loaded[n] = load(places[segment], static_cast<int>(row), column);
                }
                segment += segment_step;
                row += row_step;
                if (row >= cut.shared_rows) {
                    row -= cut.shared_rows;
                    ++segment;
                }
            }
            FUSED_OPS_UNROLL
            for (int n = 0; n < BATCH; ++n) {
                if (begin + n * step >= rows) {
                    break;
                }
                float values[V];
                value(loaded[n], values);
                float* const target = tiles + (begin + n * step) * cut.pitch;
                FUSED_OPS_UNROLL
                for (int v = 0; v < V; ++v) {
                    if (column + v >= 0 && column + v < static_cast<int>(cut.pitch)) {
                        target[column + v] = values[v];
                    }
                }
            }
        }
    }
}

// Which columns of a segment a thread has, and which of its rows.
struct PlaneWalker {
    uint32_t segment, lane, first_row, rows;

    FUSED_OPS_DEVICE explicit PlaneWalker(const PlaneCut& cut)
        : segment(threadIdx.x / cut.lanes / cut.strips),
          lane(threadIdx.x % cut.lanes),
          first_row(threadIdx.x / cut.lanes % cut.strips * cut.strip_rows) {
        const uint32_t left = cut.tile_rows - first_row;
        rows = segment >= cut.segments_at_once ? 0 : (left < cut.strip_rows ? left : cut.strip_rows);
    }
};

// COUNT neighbouring floats of shared memory from an address that is aligned to V of them.
template <int V, int COUNT>
FUSED_OPS_DEVICE void read_columns(const float* address, float (&result)[COUNT]) {
    static_assert(COUNT % V == 0);
    FUSED_OPS_UNROLL
    for (int begin = 0; begin < COUNT; begin += V) {
        float vector[V];
        read_shared(address + begin, vector);
        FUSED_OPS_UNROLL
        for (int v = 0; v < V; ++v) {
            result[begin + v] = vector[v];
        }
    }
}

constexpr FUSED_OPS_HOST_DEVICE int round_up(int value, int multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

}  // namespace fused_ops::depthwise
