// Products on tensor cores of 16-bit types, and what feeds them: fragments of a warp, copies to shared
// memory.
//
// A fragment is a tile spread over the 32 lanes of a warp. With g = lane / 4 and t = lane % 4, of a product
// (16 x 16) (16 x 8):
//
//     rows of A     four words: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right
//                   neighbour
//     B             two words: (2t, g), (2t + 8, g), each with its lower neighbour
//     C and result  four floats: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//
// So the results of two products side by side are, rounded and paired, the rows of A of the next one.
// Every function here is called by all lanes of a warp together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "portability.h"
#include "scalar.h"
#include "vector.h"

namespace fused_ops {

// Bytes of an address in shared memory are read and written in words; T is float16 or bfloat16.
template <typename T>
FUSED_OPS_DEVICE uint32_t load_pair(const T* shared) {
#if defined(FUSED_OPS_EMULATOR)
    uint32_t word;
    std::memcpy(&word, shared, sizeof word);
    return word;
#else
    return *reinterpret_cast<const uint32_t*>(shared);
#endif
}

template <typename T>
FUSED_OPS_DEVICE void store_pair(T* shared, uint32_t word) {
#if defined(FUSED_OPS_EMULATOR)
    std::memcpy(shared, &word, sizeof word);
#else
    *reinterpret_cast<uint32_t*>(shared) = word;
#endif
}

template <typename T>
FUSED_OPS_DEVICE uint32_t pack_pair(float first, float second) {
    return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

template <typename T>
FUSED_OPS_DEVICE float first_of(uint32_t word) {
    return to_float(T{static_cast<uint16_t>(word)});
}

template <typename T>
FUSED_OPS_DEVICE float second_of(uint32_t word) {
    return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// result += A B, of element type T, summed in float.
template <typename T>
FUSED_OPS_DEVICE void multiply(float (&result)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(FUSED_OPS_EMULATOR)
    const emulator::Words mine{{a[0], a[1], a[2], a[3], b0, b1}};
    emulator::Words all[emulator::WARP];
    emulator::gather(mine, all);
    const uint32_t lane = threadIdx.x % 32;
    const auto half = [](uint32_t word, uint32_t odd) {
        return to_float(T{static_cast<uint16_t>(word >> 16 * odd)});
    };
    for (uint32_t entry = 0; entry < 4; ++entry) {
        const uint32_t row = lane / 4 + entry / 2 * 8;
        const uint32_t column = lane % 4 * 2 + entry % 2;
        float sum = 0.0f;
        for (uint32_t k = 0; k < 16; ++k) {
            const uint32_t from_a = row % 8 * 4 + k % 8 / 2;
            const uint32_t from_b = column * 4 + k % 8 / 2;
            sum += half(all[from_a].words[row / 8 + k / 8 * 2], k % 2) *
                   half(all[from_b].words[4 + k / 8], k % 2);
        }
        result[entry] += sum;
    }
#elif defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(result[0]), "+f"(result[1]), "+f"(result[2]), "+f"(result[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(result[0]), "+f"(result[1]), "+f"(result[2]), "+f"(result[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif
}

// Four 8 x 8 matrices from shared memory, row r of matrix m at the address that lane 8 m + r passes, aligned
// to 16 bytes. Word m holds elements 2t and 2t + 1 of row g; with TRANSPOSED of column g.
template <bool TRANSPOSED, typename T>
FUSED_OPS_DEVICE void load_matrices(uint32_t (&words)[4], const T* row) {
#if defined(FUSED_OPS_EMULATOR)
    const uint64_t address = reinterpret_cast<uintptr_t>(row);
    if (address % 16 != 0) {
        emulator::misaligned_bytes = 16;
    }
    const emulator::Words mine{{static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)}};
    emulator::Words all[emulator::WARP];
    emulator::gather(mine, all);
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (uint32_t odd = 0; odd < 2; ++odd) {
            const uint32_t along = lane % 4 * 2 + odd;
            const uint32_t which = matrix * 8 + (TRANSPOSED ? along : lane / 4);
            const auto base =
                static_cast<uintptr_t>(all[which].words[0] | uint64_t{all[which].words[1]} << 32);
            const T element = reinterpret_cast<const T*>(base)[TRANSPOSED ? lane / 4 : along];
            pair[odd] = element.bits;
        }
        words[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
#elif defined(__CUDA_ARCH__)
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address)
                     : "memory");
    }
#endif
}

// A 16 x 16 tile of A that lies in shared memory with rows of `pitch` elements.
template <typename T>
FUSED_OPS_DEVICE void load_a(uint32_t (&words)[4], const T* tile, int pitch) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(words, tile + lane % 16 * pitch + lane / 16 * 8);
}

// The same of a tile that lies transposed: its columns are rows of `pitch` elements.
template <typename T>
FUSED_OPS_DEVICE void load_a_transposed(uint32_t (&words)[4], const T* tile, int pitch) {
    const int lane = threadIdx.x % 32;
    load_matrices<true>(words, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
}

// A 16 x 16 tile of B, as two of 16 x 8 side by side (words 0 and 1, 2 and 3), whose columns are rows of
// `pitch` elements in shared memory.
template <typename T>
FUSED_OPS_DEVICE void load_b(uint32_t (&words)[4], const T* tile, int pitch) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(words, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
}

// The same of a tile whose rows are rows of `pitch` elements.
template <typename T>
FUSED_OPS_DEVICE void load_b_transposed(uint32_t (&words)[4], const T* tile, int pitch) {
    const int lane = threadIdx.x % 32;
    load_matrices<true>(words, tile + lane % 16 * pitch + lane / 16 * 8);
}

// Copies 16 bytes from global to shared memory, or writes zeros where not `inside`; both aligned to 16 bytes.
// What it wrote may be read after finish_copies and a barrier.
template <typename T>
FUSED_OPS_DEVICE void copy_eight(T* shared, const T* global, bool inside) {
#if defined(FUSED_OPS_EMULATOR)
    const Vector<T, 8> value = inside ? load_vector<T, 8>(global) : zero_vector<T, 8>();
    std::memcpy(shared, &value, sizeof value);
#elif defined(__CUDA_ARCH__)
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(global), "r"(inside ? 16 : 0)
                 : "memory");
#endif
}

FUSED_OPS_DEVICE void finish_copies() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" : : : "memory");
#endif
}

// Eight neighbouring channels of which the first `count` exist, the others zero: one copy where `wide`, which
// promises alignment and `count` of 8 or at most 0; else element by element.
template <typename T>
FUSED_OPS_DEVICE void copy_channels(T* shared, const T* global, int count, bool wide) {
    if (wide) {
        copy_eight(shared, global, count > 0);
        return;
    }
    FUSED_OPS_UNROLL
    for (int v = 0; v < 8; ++v) {
        shared[v] = v < count ? load_vector<T, 1>(global + v).elements[0] : T{};
    }
}

}  // namespace fused_ops
