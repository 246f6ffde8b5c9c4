// Every read and write of global memory that a kernel makes goes through this file: one place for the vector
// width, the read-only path and (in the emulator) the record of which bytes each thread block touches.
#pragma once

#include "portability.h"
#include "scalar.h"

namespace fused_ops {

// The unsigned words that make up a vector access of a given number of bytes.
template <int BYTES>
struct AccessWord;

#if defined(FUSED_OPS_EMULATOR)
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
#endif

template <>
struct AccessWord<2> {
    using type = uint16_t;
};
template <>
struct AccessWord<4> {
    using type = uint32_t;
};
template <>
struct AccessWord<8> {
    using type = uint2;
};
template <>
struct AccessWord<16> {
    using type = uint4;
};

// V neighbouring elements as they lie in memory: one access of V * sizeof(T) bytes, aligned to that.
template <typename T, int V>
struct alignas(V * sizeof(T)) Vector {
    static_assert(V * sizeof(T) <= 16, "a thread accesses at most 16 bytes at once");
    using Word = typename AccessWord<V * sizeof(T)>::type;
    T elements[V];
};

// Reads through the read-only path: the memory must not be written by the same launch.
template <typename T, int V>
FUSED_OPS_DEVICE Vector<T, V> load_vector(const T* address) {
    using Word = typename Vector<T, V>::Word;
    union {
        Word word;
        Vector<T, V> vector;
    } both;
#if defined(FUSED_OPS_EMULATOR)
    emulator::record_read(address, sizeof(Word));
    std::memcpy(&both.vector, address, sizeof(Word));
#else
    both.word = __ldg(reinterpret_cast<const Word*>(address));
#endif
    return both.vector;
}

// For memory that the same launch writes.
template <typename T, int V>
FUSED_OPS_DEVICE Vector<T, V> load_written_vector(const T* address) {
    using Word = typename Vector<T, V>::Word;
    union {
        Word word;
        Vector<T, V> vector;
    } both;
#if defined(FUSED_OPS_EMULATOR)
    emulator::record_read(address, sizeof(Word));
    std::memcpy(&both.vector, address, sizeof(Word));
#else
    both.word = *reinterpret_cast<const Word*>(address);
#endif
    return both.vector;
}

template <typename T, int V>
FUSED_OPS_DEVICE void store_vector(T* address, const Vector<T, V>& value) {
    using Word = typename Vector<T, V>::Word;
#if defined(FUSED_OPS_EMULATOR)
    emulator::record_write(address, sizeof(Word));
    std::memcpy(address, &value, sizeof(Word));
#else
    union {
        Word word;
        Vector<T, V> vector;
    } both;
    both.vector = value;
    *reinterpret_cast<Word*>(address) = both.word;
#endif
}

template <typename T, int V>
FUSED_OPS_DEVICE Vector<T, V> zero_vector() {
    Vector<T, V> result;
    FUSED_OPS_UNROLL
    for (int v = 0; v < V; ++v) {
        result.elements[v] = T{};
    }
    return result;
}

// One element, of a type known only at run time, as a float.
FUSED_OPS_DEVICE float load_element(const void* base, ScalarType type, int64_t index) {
    switch (type) {
        case ScalarType::float16:
            return to_float(load_vector<float16, 1>(static_cast<const float16*>(base) + index).elements[0]);
        case ScalarType::bfloat16:
            return to_float(load_vector<bfloat16, 1>(static_cast<const bfloat16*>(base) + index).elements[0]);
        default:
            return load_vector<float, 1>(static_cast<const float*>(base) + index).elements[0];
    }
}

FUSED_OPS_DEVICE void store_element(void* base, ScalarType type, int64_t index, float value) {
    switch (type) {
        case ScalarType::float16:
            store_vector(static_cast<float16*>(base) + index,
                         Vector<float16, 1>{{from_float<float16>(value)}});
            break;
        case ScalarType::bfloat16:
            store_vector(static_cast<bfloat16*>(base) + index,
                         Vector<bfloat16, 1>{{from_float<bfloat16>(value)}});
            break;
        default:
            store_vector(static_cast<float*>(base) + index, Vector<float, 1>{{value}});
    }
}

}  // namespace fused_ops
