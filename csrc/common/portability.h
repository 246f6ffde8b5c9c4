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

// Names the floats of shared memory whose number the launch decides; 16-byte aligned.
#if defined(FUSED_OPS_EMULATOR)
#    define FUSED_OPS_DYNAMIC_SHARED(NAME) float* const NAME = ::fused_ops::emulator::dynamic_shared
#else
#    define FUSED_OPS_DYNAMIC_SHARED(NAME)         \
        extern __shared__ float4 dynamic_shared[]; \
        float* const NAME = reinterpret_cast<float*>(dynamic_shared)
#endif

namespace fused_ops {

#if defined(FUSED_OPS_EMULATOR)

template <typename Arguments>
const char* launch_kernel(const char* name, void (*kernel)(Arguments), uint32_t blocks, uint32_t threads,
                          uint32_t shared_bytes, void* /*stream*/, const Arguments& arguments) {
    return emulator::launch(name, blocks, threads, shared_bytes, [&] { kernel(arguments); });
}

inline int multiprocessor_count() {
    return emulator::multiprocessors;
}

inline int shared_memory_of_multiprocessor() {
    return 100 * 1024;
}

#else

// Launches on the current device (`name` is for the emulator's record), with `shared_bytes` of shared memory
// beside the kernel's own, and returns null, or CUDA's text about what went wrong.
template <typename Arguments>
const char* launch_kernel(const char* /*name*/, void (*kernel)(Arguments), uint32_t blocks, uint32_t threads,
                          uint32_t shared_bytes, void* stream, const Arguments& arguments) {
    void* values[] = {const_cast<Arguments*>(&arguments)};
    const void* function = reinterpret_cast<const void*>(kernel);
    // More than 48 KiB, of which the kernel's own may be 16, has to be asked for.
    cudaError_t error = shared_bytes <= 32 * 1024
                            ? cudaSuccess
                            : cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error == cudaSuccess) {
        error = cudaLaunchKernel(function, dim3(blocks), dim3(threads), values, shared_bytes,
                                 static_cast<cudaStream_t>(stream));
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
    int device = 0;
    int value = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
        return otherwise;
    }
    return value;
}

inline int multiprocessor_count() {
    return device_attribute(cudaDevAttrMultiProcessorCount, 1);
}

inline int shared_memory_of_multiprocessor() {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, 48 * 1024);
}

#endif

}  // namespace fused_ops
