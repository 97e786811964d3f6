// absmax -> one 8-bit code per block and one float per 256 blocks: the bytes of rust/double_quantize.rs.
//
//     offset = mean(absmax)                   nested_absmax[g] = max |absmax[b] - offset|, b in group g
//     code(b) = nearest entry of the dynamic map to (absmax[b] - offset) * (1 / nested_absmax[g])
//
//   one warp = one group of 256 blocks; a lane holds 2 vectors of 4
//   bound    : latency; it reads 1/16 of a bfloat16 weight's bytes, just written by quantize_nf4.cu
#include "codebook.cuh"

constexpr int THREADS = 256;
constexpr int GROUP = 256;
constexpr int LIMBS = 10;  // 32-bit limbs of a sum: 254 exponents + 24 bits + 32 bits of count < 320
static_assert(THREADS / 32 == GROUPS_PER_CTA, "the host counts CTAs by this number");

// Where bin s lies in shared memory: ten threads read every 32nd one without bank conflicts.
__device__ __forceinline__ int place(int s) { return s + s / 32; }

// One 32-bit limb's share of the sum of bins[s] * 2^s, before carries: bins 32 i to 32 i + 31.
// bins < 2^(24 + 32), so the share is below 2^88.
__device__ __forceinline__ void share_of_limb(
    const unsigned long long* bins, int limb, unsigned long long& low, unsigned long long& high
) {
    low = high = 0;
#pragma unroll 4
    for (int i = 0; i < 32 && 32 * limb + i < 254; ++i) {
        const unsigned long long bin = bins[place(32 * limb + i)], shifted = bin << i;
        low += shifted;
        high += (i ? bin >> (64 - i) : 0) + (low < shifted ? 1 : 0);
    }
}

// sum * 2^-149 / count, rounded once to nearest, ties to even, for a sum in limbs, lowest first.
// Schoolbook division: the two leading limbs of the quotient hold at least 33 bits, 24 are wanted, and
// all that follows can only break a tie.
__device__ __forceinline__ float rounded_mean(const unsigned* sum, unsigned long long count) {
    unsigned long long quotient = 0, remainder = 0;
    int limb = LIMBS - 1;
    // Ends below limb 0 at the latest: there is one fraction limb, since any sum is 0 or at least 1.
#pragma unroll 1
    for (; limb >= -1; --limb) {
        const unsigned long long dividend = remainder << 32 | (limb >= 0 ? sum[limb] : 0u);
        quotient = quotient << 32 | dividend / count;
        remainder = dividend % count;
        if (quotient >> 32) break;
    }
    limb = max(limb, -1);
    bool sticky = remainder != 0;
#pragma unroll 1
    for (int i = 0; i < limb; ++i) sticky |= sum[i] != 0;
    if (quotient == 0) return 0.0f;  // only sums far below half of the smallest subnormal number

    const int top = 63 - __clzll(quotient);
    const int scale = max(top + 32 * limb - 23, 0);  // exponent of the result's last bit, from 2^-149
    const int drop = scale - 32 * limb;
    const unsigned long long half = 1ull << (drop - 1), rest = quotient & (2 * half - 1);
    unsigned mantissa = static_cast<unsigned>(quotient >> drop);
    mantissa += rest > half || (rest == half && (sticky || mantissa & 1u));
    // The mantissa's leading bit, if it has one, adds 1 to the exponent field; so does its overflow.
    return __uint_as_float((static_cast<unsigned>(scale) << 23) + mantissa);
}

// How many of the 255 midpoints lie below x, from the root of their tree to a leaf.
__device__ __forceinline__ unsigned nearest_code(float x, const float* midpoints) {
    unsigned node = 1;
#pragma unroll
    for (int level = 0; level < 8; ++level) node = 2 * node + (x > midpoints[node] ? 1 : 0);
    return node - 256;
}

extern "C" __global__ void __launch_bounds__(THREADS) double_quantize(
    const float* __restrict__ absmax,               // [blocks], 16-byte aligned
    long long blocks,                               // less than 2^32
    const unsigned long long* __restrict__ refused,  // [2]: the first is not zero if a weight is NaN or infinite
    const unsigned long long* __restrict__ sums,    // [254]: sums of mantissas by exponent
    unsigned char* __restrict__ codes,              // [blocks], 4-byte aligned
    float* __restrict__ nested_absmax,              // [ceil(blocks / 256)]
    float* __restrict__ nested_offset               // [1]
) {
    __shared__ float midpoints[256];
    __shared__ unsigned long long bins[256 + 256 / 32];
    __shared__ unsigned long long low[LIMBS], high[LIMBS];
    __shared__ unsigned sum[LIMBS];
    __shared__ float offset_shared;
    midpoints[threadIdx.x] = __uint_as_float(NESTED_MIDPOINTS[threadIdx.x]);
    bins[place(threadIdx.x)] = threadIdx.x < 254 ? sums[threadIdx.x] : 0;
    __syncthreads();
    // Every CTA computes the same offset: cheaper than a launch or a wait between CTAs.
    if (threadIdx.x < LIMBS) share_of_limb(bins, threadIdx.x, low[threadIdx.x], high[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned long long carry = 0;
        for (int limb = 0; limb < LIMBS; ++limb) {
            const unsigned long long total = low[limb] + carry;
            sum[limb] = static_cast<unsigned>(total);
            carry = (high[limb] + (total < carry ? 1 : 0)) << 32 | total >> 32;
        }
        const float mean = rounded_mean(sum, static_cast<unsigned long long>(blocks));
        offset_shared = refused[0] ? __uint_as_float(0x7fffffffu) : mean;
        if (blockIdx.x == 0) nested_offset[0] = offset_shared;
    }
    __syncthreads();
    const float offset = offset_shared;

    const int lane = threadIdx.x % 32;
    const long long group = static_cast<long long>(blockIdx.x) * GROUPS_PER_CTA + threadIdx.x / 32;
    const long long first = group * GROUP + 4 * lane;
    if (group * GROUP >= blocks) return;  // a whole warp, and no barrier follows
    float centred[8];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
        const long long at = first + 128 * v;
        if (at + 4 <= blocks) {
            const float4 values = *reinterpret_cast<const float4*>(absmax + at);
            centred[4 * v + 0] = __fsub_rn(values.x, offset);
            centred[4 * v + 1] = __fsub_rn(values.y, offset);
            centred[4 * v + 2] = __fsub_rn(values.z, offset);
            centred[4 * v + 3] = __fsub_rn(values.w, offset);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                centred[4 * v + i] = at + i < blocks ? __fsub_rn(absmax[at + i], offset) : 0.0f;
            }
        }
    }
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(centred[i]));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    // A group that equals the mean everywhere: any finite factor maps it to the code of zero.
    const float inverse = largest > 0.0f ? __frcp_rn(fmaxf(largest, __uint_as_float(0x00800000u))) : 0.0f;
    if (lane == 0) nested_absmax[group] = largest;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
        const long long at = first + 128 * v;
        unsigned word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float scaled = __fmul_rn(centred[4 * v + i], inverse);
            word |= nearest_code(fminf(fmaxf(scaled, -1.0f), 1.0f), midpoints) << (8 * i);
        }
        if (at + 4 <= blocks) {
            *reinterpret_cast<unsigned*>(codes + at) = word;
        } else {
#pragma unroll 1
            for (int i = 0; i < 4 && at + i < blocks; ++i) {
                codes[at + i] = static_cast<unsigned char>(word >> (8 * i));
            }
        }
    }
}
