// Float weights -> 4-bit codes and one absmax per block: the bytes of rust/quantize.rs.
//
//     absmax[b] = max |w[i]|, i in block b         code(w) = number of boundaries < w * (1 / absmax)
//     byte i = code(w[2i]) << 4 | code(w[2i + 1])
//
// The last block may be incomplete: it divides by max(absmax, 1e-38) and stores that. With
// DOUBLE_QUANT the absmax are also summed, exactly: double_quantize.cu makes the mean of them.
//
//   one thread  = 16 bytes of weights (more if a block has more than 32 times that), loaded once
//   one block   = LANES neighbouring threads of one warp, which shuffle their maxima
//   a CTA       = 256 threads, STEPS times; its absmax go through shared memory, to be stored in a row
//   bound       : bytes, 2.56 per bfloat16 weight, by a model: while an A100's memory delivers a weight
//                 to each thread of a warp, its SM can issue 24 instructions, and 19 are needed, 2 of
//                 them shared loads without conflicts
//
// A NaN or an infinity is counted in `refused` and leaves a NaN or infinite absmax behind: whoever
// reads `refused` refuses; a CUDA graph that never does decodes to NaN, never to wrong numbers.
#include "codebook.cuh"
#include "floats.cuh"

constexpr int THREADS = 256;
constexpr int LANES = BLOCK_SIZE / VECTOR < 32 ? BLOCK_SIZE / VECTOR : 32;  // threads per block
constexpr int VECTORS = BLOCK_SIZE / (LANES * VECTOR);                      // vectors per thread
constexpr int GROUPS = THREADS / LANES;                                     // blocks per step
// Long blocks keep enough bytes in flight with one step. 4 * 64 blocks are at most 256, so that sums
// of their 24-bit mantissas fit 32 bits, and thread t can finish block t.
constexpr int STEPS = VECTORS == 1 ? 4 : 1;
constexpr int BLOCKS = STEPS * GROUPS;  // blocks per CTA
static_assert(BLOCKS <= THREADS, "one thread finishes each block");
static_assert(BLOCKS == BLOCKS_PER_CTA, "the host counts CTAs by this number");

// A table look-up and one comparison instead of a search. Cells are 1/15 wide and hold at most one
// boundary each; x -> cell never decreases; so boundaries of lower cells lie below x, those of
// higher cells do not, and the own cell's is compared. Adding 2^23 rounds to an integer, whose
// bits 2 to 6 are the cell and, as they stand, the byte offset of its entry. (rust/cuda.rs)
__device__ __forceinline__ unsigned nearest_code(float x, const unsigned* cells) {
    const unsigned offset = __float_as_uint(__fmaf_rn(x, CELL_SCALE, CELL_OFFSET)) & 0x7cu;
    const unsigned* cell = cells + offset / 4;
    return cell[32] + (x > __uint_as_float(cell[0]) ? 1u : 0u);
}

__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The incomplete last block; its lanes take one byte in turn.
__device__ __forceinline__ void store_tail(
    const Float* weights, int count, float absmax, int lane, const unsigned* cells, unsigned char* codes
) {
    for (int byte = lane; 2 * byte < count; byte += LANES) {
        unsigned code[2] = {ZERO_CODE, ZERO_CODE};
        for (int i = 0; i < 2 && 2 * byte + i < count; ++i) {
            code[i] = nearest_code(__fdiv_rn(widen(weights[2 * byte + i]), absmax), cells);
        }
        codes[byte] = static_cast<unsigned char>(code[0] << 4 | code[1]);
    }
}

// A block with a NaN or an infinity: how many, and the smallest index as the largest distance from
// the end, so that zeroes are the right start for both numbers.
__device__ __forceinline__ void refuse(
    const Float* weights, long long first, long long count, unsigned long long* refused
) {
#pragma unroll 1
    for (long long i = first; i < first + BLOCK_SIZE && i < count; ++i) {
        if (magnitude(widen(weights[i])) >= 0x7f800000u) {
            atomicAdd(&refused[0], 1ull);
            atomicMax(&refused[1], static_cast<unsigned long long>(count - i));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_nf4(
    const Float* __restrict__ weights,        // [count], 16-byte aligned
    long long count,                          //
    unsigned char* __restrict__ codes,        // [ceil(count / 2)], 4-byte aligned
    float* __restrict__ absmax,               // [ceil(count / BLOCK_SIZE)]
    unsigned long long* __restrict__ refused,  // [2], zero before: NaN or infinite weights; see refuse()
    unsigned long long* __restrict__ sums     // [254], zero before: sums of mantissas by exponent
) {
    __shared__ unsigned cells[64];
    __shared__ unsigned absmax_shared[BLOCKS];
    if (threadIdx.x < 64) cells[threadIdx.x] = CELLS[threadIdx.x];
    __syncthreads();

    const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    for (int step = 0; step < STEPS; ++step) {
        const long long block = (static_cast<long long>(blockIdx.x) * STEPS + step) * GROUPS + group;
        const long long first = block * BLOCK_SIZE;
        const bool whole = first + BLOCK_SIZE <= count;
        uint4 vectors[VECTORS];
        unsigned largest = 0;
        if (whole) {
            const uint4* source = reinterpret_cast<const uint4*>(weights + first) + lane;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) vectors[v] = source[v * LANES];
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) largest = max(largest, magnitude(widen(vectors[v], i)));
            }
        } else {
#pragma unroll 1
            for (long long i = first + lane; i < count; i += LANES) {
                largest = max(largest, magnitude(widen(weights[i])));
            }
        }
        // Magnitudes order like their bits, and NaN and infinity above all numbers.
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2) {
            largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
        }
        float scale = __uint_as_float(largest);
        if (whole) {
            const float inverse = __frcp_rn(fmaxf(scale, SMALLEST_ABSMAX));
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                unsigned word = 0;
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    const unsigned code = nearest_code(__fmul_rn(widen(vectors[v], i), inverse), cells);
                    word |= code << (i / 2 * 8 + (i % 2 ? 0 : 4));
                }
                const long long vector = first / VECTOR + v * LANES + lane;
#if FLOAT == 32
                reinterpret_cast<unsigned short*>(codes)[vector] = static_cast<unsigned short>(word);
#else
                reinterpret_cast<unsigned*>(codes)[vector] = word;
#endif
            }
        } else if (first < count) {
            // A NaN stays: fmaxf would drop it.
            if (largest < 0x7f800000u) scale = fmaxf(scale, SMALLEST_ABSMAX);
            store_tail(weights + first, static_cast<int>(count - first), scale, lane, cells, codes + first / 2);
        }
        if (lane == 0) absmax_shared[step * GROUPS + group] = __float_as_uint(scale);
    }
    __syncthreads();

    const long long block = static_cast<long long>(blockIdx.x) * BLOCKS + threadIdx.x;
    const bool mine = threadIdx.x < BLOCKS && block * BLOCK_SIZE < count;
    const unsigned bits = mine ? absmax_shared[threadIdx.x] : 0u;
    if (mine) {
        absmax[block] = __uint_as_float(bits);
        if (bits >= 0x7f800000u) refuse(weights, block * BLOCK_SIZE, count, refused);
    }
#if DOUBLE_QUANT
    // Integers add up to the same sum in any order. One bin per exponent: float32 numbers of
    // exponent e >= 1 are mantissa * 2^(e - 150); subnormal ones share the bin of e = 1.
    __shared__ unsigned bins[256];
    bins[threadIdx.x] = 0;
    __syncthreads();
    const unsigned exponent = bits >> 23;
    if (mine && exponent < 255) {
        const unsigned mantissa = (bits & 0x7fffffu) | (exponent ? 0x800000u : 0u);
        atomicAdd(&bins[exponent ? exponent - 1 : 0], mantissa);
    }
    __syncthreads();
    if (bins[threadIdx.x]) atomicAdd(&sums[threadIdx.x], static_cast<unsigned long long>(bins[threadIdx.x]));
#endif
}
