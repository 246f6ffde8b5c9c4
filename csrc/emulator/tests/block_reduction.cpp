// A block-wide sum with shared memory, barriers and warp shuffles: it tests the emulator itself.
// Built with WITHOUT_BARRIER, one barrier is missing, and ThreadSanitizer must report the race.
#include <cstdio>
#include <cstdlib>

#include "../../common/portability.h"
#include "../../common/vector.h"

namespace {

constexpr uint32_t THREADS = 256;

struct Arguments {
    const float* input;
    float* sums;
    int length;
};

// One block sums one row of `length` values: THREADS partial sums, one per warp, one per block.
__global__ void __launch_bounds__(THREADS) sum_rows(const __grid_constant__ Arguments arguments) {
    __shared__ float warp_sums[THREADS / 32];
    const float* row = arguments.input + static_cast<int64_t>(blockIdx.x) * arguments.length;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < arguments.length; i += THREADS) {
        sum += fused_ops::load_vector<float, 1>(row + i).elements[0];
    }
    for (uint32_t delta = 16; delta > 0; delta /= 2) {
        sum += __shfl_down_sync(0xffffffffu, sum, delta);
    }
    if (threadIdx.x % 32 == 0) {
        warp_sums[threadIdx.x / 32] = sum;
    }
#if !defined(WITHOUT_BARRIER)
    __syncthreads();
#endif
    if (threadIdx.x < 32) {
        float total = threadIdx.x < THREADS / 32 ? warp_sums[threadIdx.x] : 0.0f;
        for (uint32_t lanes = 16; lanes > 0; lanes /= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, lanes);
        }
        if (threadIdx.x == 0) {
            fused_ops::Vector<float, 1> result{{total}};
            fused_ops::store_vector(arguments.sums + blockIdx.x, result);
        }
    }
    // The next row reuses the shared memory.
    __syncthreads();
}

int check(fused_ops::emulator::Mode mode, const char* name) {
    constexpr int ROWS = 3;
    constexpr int LENGTH = 1000;
    std::vector<float> input(ROWS * LENGTH);
    std::vector<float> sums(ROWS, -1.0f);
    for (int i = 0; i < ROWS * LENGTH; ++i) {
        input[i] = static_cast<float>(i % 17 - 5);
    }
    fused_ops::emulator::mode = mode;
    const Arguments arguments{input.data(), sums.data(), LENGTH};
    if (const char* error =
            fused_ops::launch_kernel("sum_rows", &sum_rows, ROWS, THREADS, 0, nullptr, arguments)) {
        std::printf("%s: %s\n", name, error);
        return 1;
    }
    for (int row = 0; row < ROWS; ++row) {
        float expected = 0.0f;
        for (int i = 0; i < LENGTH; ++i) {
            expected += input[row * LENGTH + i];
        }
        if (sums[row] != expected) {
            std::printf("%s: row %d sums to %g and not to %g\n", name, row, sums[row], expected);
            return 1;
        }
    }
    std::printf("%s: right\n", name);
    return 0;
}

}  // namespace

int main() {
    int failures = check(fused_ops::emulator::Mode::concurrent, "concurrent");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    // The sanitizers don't follow coroutines, which leave a stack and come back to it.
    failures += check(fused_ops::emulator::Mode::sequential, "sequential");
#endif
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
