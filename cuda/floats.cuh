// The float type of a kernel's weights, chosen by -D FLOAT=32 (float32), 16 (float16) or 0x16B
// (bfloat16), and its conversions. No header of the toolkit is needed: bits and inline PTX only.
#pragma once

#define FLOAT_BF16 0x16B

#if FLOAT == 32
typedef unsigned Float;  // bits of one weight
#else
typedef unsigned short Float;
#endif

// Weights in 16 bytes, the widest load and store of one thread.
constexpr int VECTOR = 16 / sizeof(Float);

// Exact: every value of the three types is a float32.
__device__ __forceinline__ float widen(Float bits) {
#if FLOAT == 32
    return __uint_as_float(bits);
#elif FLOAT == FLOAT_BF16
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

// Weight `i` of a vector, as float32.
__device__ __forceinline__ float widen(const uint4& vector, int i) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#if FLOAT == 32
    return __uint_as_float(words[i]);
#elif FLOAT == FLOAT_BF16
    // The upper half is a float32 already, but for the bits of its neighbour.
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
#else
    return widen(static_cast<Float>(words[i / 2] >> (i % 2 * 16)));
#endif
}

// To nearest, ties to even: two weights in one word, the first in its lower half (sm_80 and newer).
__device__ __forceinline__ unsigned narrow(float first, float second) {
    unsigned word;
#if FLOAT == FLOAT_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
    return word;
}
