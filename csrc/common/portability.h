// What a kernel file needs from its compiler, CUDA's or a plain C++20 one, and nothing of torch.
//
// Compiled by nvcc this is the CUDA runtime. Compiled by g++ with FUSED_OPS_EMULATOR defined it is the
// emulator (csrc/emulator/emulator.h), which runs the same kernel text on CPU threads. Instructions that only
// a GPU has stand behind small functions with a portable body for the second case.
#pragma once

#include <cstdint>

#if defined(FUSED_OPS_EMULATOR)
#    include "../emulator/emulator.h"
#    define FUSED_OPS_HOST_DEVICE inline
#    define FUSED_OPS_DEVICE inline
#else
#    include <cuda_runtime.h>
#    define FUSED_OPS_HOST_DEVICE __host__ __device__ __forceinline__
#    define FUSED_OPS_DEVICE __device__ __forceinline__
#endif

// Kernels index register arrays only with constants, so every such loop has to be unrolled on the GPU. Host
// compilers, which need no unrolling to be right, don't know this pragma.
#if defined(__CUDA_ARCH__)
#    define FUSED_OPS_UNROLL _Pragma("unroll")
#    define FUSED_OPS_NO_UNROLL _Pragma("unroll 1")
#else
#    define FUSED_OPS_UNROLL
#    define FUSED_OPS_NO_UNROLL
#endif

namespace fused_ops {

#if defined(FUSED_OPS_EMULATOR)

template <typename Arguments>
const char* launch_kernel(void (*kernel)(Arguments), uint32_t blocks, uint32_t threads, void* /*stream*/,
                          const Arguments& arguments) {
    return emulator::launch(blocks, threads, [&] { kernel(arguments); });
}

inline int multiprocessor_count() {
    return emulator::multiprocessors;
}

#else

// Launches on the current device and returns null, or CUDA's text about what went wrong.
template <typename Arguments>
const char* launch_kernel(void (*kernel)(Arguments), uint32_t blocks, uint32_t threads, void* stream,
                          const Arguments& arguments) {
    void* values[] = {const_cast<Arguments*>(&arguments)};
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                               dim3(threads), values, 0, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int multiprocessor_count() {
    int device = 0;
    int count = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        return 1;
    }
    return count;
}

#endif

}  // namespace fused_ops
