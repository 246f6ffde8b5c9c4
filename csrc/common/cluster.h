// Clusters: neighbouring blocks of a launch that run at the same time and read each other's shared memory, on
// GPUs from compute capability 9.0 on. Elsewhere a cluster is one block.
#pragma once

#include <cstdint>

#include "portability.h"

namespace fused_ops {

// Blocks of a cluster at most, on every GPU that has clusters.
constexpr uint32_t LARGEST_CLUSTER = 8;

FUSED_OPS_DEVICE uint32_t cluster_rank() {
#if defined(FUSED_OPS_EMULATOR)
    return emulator::block->rank;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

FUSED_OPS_DEVICE uint32_t cluster_size() {
#if defined(FUSED_OPS_EMULATOR)
    return static_cast<uint32_t>(emulator::block->cluster->size());
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
#else
    return 1;
#endif
}

// A barrier of all threads of the cluster; what they wrote to shared memory before it is seen after it.
FUSED_OPS_DEVICE void synchronise_cluster() {
#if defined(FUSED_OPS_EMULATOR)
    emulator::pass(cluster_size() > 1 ? *emulator::block->cluster_barrier : *emulator::block->barrier);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (cluster_size() > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
                     :
                     :
                     : "memory");
    } else {
        __syncthreads();
    }
#else
    __syncthreads();
#endif
}

// What block `rank` of the cluster has in its dynamic shared memory where this one has `own`.
FUSED_OPS_DEVICE const float* of_block(const float* own, uint32_t rank) {
#if defined(FUSED_OPS_EMULATOR)
    return (*emulator::block->cluster)[rank].dynamic_shared.data() + (own - emulator::dynamic_shared);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
    return reinterpret_cast<const float*>(address);
#else
    return rank == 0 ? own : nullptr;
#endif
}

#if defined(FUSED_OPS_EMULATOR)

inline bool clusters_are_supported() {
    return emulator::clusters;
}

template <typename Arguments>
const char* launch_clusters(const char* name, void (*kernel)(Arguments), uint32_t blocks, uint32_t cluster,
                            uint32_t threads, uint32_t shared_bytes, void* /*stream*/,
                            const Arguments& arguments) {
    return emulator::launch(name, emulator::Grid{blocks, threads, shared_bytes, cluster},
                            [&] { kernel(arguments); });
}

#else

inline bool clusters_are_supported() {
    return device_attribute(cudaDevAttrClusterLaunch, 0) != 0;
}

// launch_kernel with `cluster` blocks in each cluster; `blocks` is a multiple of it.
template <typename Arguments>
const char* launch_clusters(const char* name, void (*kernel)(Arguments), uint32_t blocks, uint32_t cluster,
                            uint32_t threads, uint32_t shared_bytes, void* stream,
                            const Arguments& arguments) {
    if (cluster == 1) {
        return launch_kernel(name, kernel, blocks, threads, shared_bytes, stream, arguments);
    }
    cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaSuccess) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = cluster;
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = 1;
        void* values[] = {const_cast<Arguments*>(&arguments)};
        error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), values);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#endif

}  // namespace fused_ops
