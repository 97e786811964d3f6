// 4-bit codes -> floats: LEVEL[code] * absmax[block] in float32, rounded once: rust/dequantize.rs.
//
// With DOUBLE_QUANT, absmax[b] = map[code8[b]] * nested_absmax[b / 256] + offset, each operation rounded.
//
//   a CTA      = one tile of TILE weights; its absmax are decoded once, into shared memory
//   one thread = 16 bytes of output per step; a warp reads and writes whole sectors in a row
//   bound      : bytes, 0.516 read and 2 written per bfloat16 weight; the map and what else a tile
//                reads again add 1.3 % to a large tile
//
// Shared loads never conflict: 16 levels lie in 16 banks, neighbouring threads read neighbouring absmax,
// and random entries of the map are not read from shared memory but shuffled between registers.
#include "codebook.cuh"
#include "floats.cuh"

constexpr int THREADS = 256;
constexpr int BLOCKS = TILE / BLOCK_SIZE;  // blocks per tile
constexpr int NESTED_BLOCK = 256;
constexpr int GROUPS = (BLOCKS + NESTED_BLOCK - 1) / NESTED_BLOCK + 1;  // groups that a tile may touch
constexpr int UNROLL = 4;                  // loads in flight per thread
static_assert(TILE % (THREADS * VECTOR * UNROLL) == 0, "every thread takes the same number of steps");
static_assert(TILE % BLOCK_SIZE == 0, "blocks do not cross tiles");

#if FLOAT == 32
typedef unsigned short Codes;  // of one 16-byte vector of output
#else
typedef unsigned Codes;
#endif

#if DOUBLE_QUANT
typedef unsigned char Absmax;
#else
typedef float Absmax;
#endif

__device__ __forceinline__ uint4 decode(unsigned codes, float absmax, const float* levels) {
    float weights[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const unsigned code = codes >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15u;
        weights[i] = __fmul_rn(levels[code], absmax);
    }
#if FLOAT == 32
    return make_uint4(__float_as_uint(weights[0]), __float_as_uint(weights[1]),
                      __float_as_uint(weights[2]), __float_as_uint(weights[3]));
#else
    return make_uint4(narrow(weights[0], weights[1]), narrow(weights[2], weights[3]),
                      narrow(weights[4], weights[5]), narrow(weights[6], weights[7]));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_nf4(
    const unsigned char* __restrict__ codes,    // two per byte, 4-byte aligned, from weight 0 of the matrix
    const Absmax* __restrict__ absmax,          // one per block, from block 0 of the matrix
    const float* __restrict__ nested_absmax,    // one per 256 blocks
    const float* __restrict__ nested_offset,    // [1]
    const float* __restrict__ nested_map,       // [256]
    long long first,                            // first weight to decode, a multiple of BLOCK_SIZE
    long long count,                            // how many
    Float* __restrict__ out                     // [count], 16-byte aligned
) {
    __shared__ float levels[16];
    __shared__ float absmax_shared[BLOCKS];
    if (threadIdx.x < 16) levels[threadIdx.x] = __uint_as_float(LEVELS[threadIdx.x]);
    const long long start = static_cast<long long>(blockIdx.x) * TILE;
    const long long left = count - start;  // weights from here on
    const long long first_block = (first + start) / BLOCK_SIZE;
#if DOUBLE_QUANT
    // Lane l holds entries l, l + 32, ... of the map.
    __shared__ float map_shared[256];
    __shared__ float nested_shared[GROUPS];
    __shared__ float offset_shared;
    map_shared[threadIdx.x] = nested_map[threadIdx.x];
    const long long first_group = first_block / NESTED_BLOCK;
    const long long last_block = first_block + (min(left, static_cast<long long>(TILE)) - 1) / BLOCK_SIZE;
    if (threadIdx.x < GROUPS && first_group + threadIdx.x <= last_block / NESTED_BLOCK) {
        nested_shared[threadIdx.x] = nested_absmax[first_group + threadIdx.x];
    }
    if (threadIdx.x == 0) offset_shared = nested_offset[0];
    __syncthreads();
    const int lane = threadIdx.x % 32;
    float map[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) map[i] = map_shared[32 * i + lane];
    const float offset = offset_shared;
#pragma unroll 1
    for (int i = threadIdx.x; i - lane < BLOCKS; i += THREADS) {  // whole warps: they shuffle
        const bool mine = i < BLOCKS && static_cast<long long>(i) * BLOCK_SIZE < left;
        const long long block = first_block + i;
        const unsigned code = mine ? absmax[block] : 0;
        float entry = 0.0f;
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            const float candidate = __shfl_sync(0xffffffffu, map[j], code % 32);
            if (code / 32 == j) entry = candidate;
        }
        if (mine) {
            // Two roundings, as on the CPU; a fused multiply-add would differ in the last bit.
            const float nested = nested_shared[block / NESTED_BLOCK - first_group];
            absmax_shared[i] = __fadd_rn(__fmul_rn(entry, nested), offset);
        }
    }
#else
    for (int i = threadIdx.x; i < BLOCKS && static_cast<long long>(i) * BLOCK_SIZE < left; i += THREADS) {
        absmax_shared[i] = absmax[first_block + i];
    }
#endif
    __syncthreads();

    const Codes* source = reinterpret_cast<const Codes*>(codes + (first + start) / 2) + threadIdx.x;
    uint4* target = reinterpret_cast<uint4*>(out + start) + threadIdx.x;
    if (left >= TILE) {
#pragma unroll 1
        for (int step = 0; step < TILE / (THREADS * VECTOR); step += UNROLL) {
            unsigned words[UNROLL];
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) words[i] = source[(step + i) * THREADS];
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) {
                const int vector = (step + i) * THREADS;
                const float scale = absmax_shared[(vector + threadIdx.x) * VECTOR / BLOCK_SIZE];
                target[vector] = decode(words[i], scale, levels);
            }
        }
        return;
    }
    // The last tile: whole vectors, then one weight at a time.
#pragma unroll 1
    for (int vector = threadIdx.x; vector * VECTOR < left; vector += THREADS) {
        const int at = vector * VECTOR;
        const float scale = absmax_shared[at / BLOCK_SIZE];
        if (at + VECTOR <= left) {
            target[vector - threadIdx.x] = decode(source[vector - threadIdx.x], scale, levels);
        } else {
            const unsigned char* bytes = codes + (first + start) / 2;
            for (int i = at; i < left; ++i) {
                const unsigned code = i % 2 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4;
                const float weight = __fmul_rn(levels[code], scale);
#if FLOAT == 32
                out[start + i] = __float_as_uint(weight);
#else
                out[start + i] = static_cast<Float>(narrow(weight, weight));
#endif
            }
        }
    }
}
