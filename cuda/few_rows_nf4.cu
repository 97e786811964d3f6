// y = x W^T + hidden B^T + bias for few rows of x, W decoded in registers: rust/few_rows.rs on a GPU.
//
//   a warp     = OUTPUTS rows of W, from end to end, for ROWS rows of x
//   one lane   = 4 bytes of codes per step, beside its neighbours' bytes: the sum of level times x over
//                these 8 weights, in float32, times their block's absmax, decoded where it is needed;
//                UNROLL steps are loaded together, the rest of a row step by step
//   the end    : lane r adds the adapter's share of rank r, r + 32, ...; lanes are summed in one order;
//                bias is added and y rounded, once
//   bound      : instructions, about 6 per weight for one row of x (bytes, 0.516 per weight, would allow
//                more than twice the speed); for 8 rows the multiply-adds
//
// The 16 levels lie in 16 banks of shared memory, so any of them can be read at once; lanes of one block
// of W read the same entry of the map. A warp's last step may reach beyond W's columns: those lanes
// rest. A row of y has the same bytes whatever rows are beside it.
#include "codebook.cuh"
#include "floats.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int LANE = 8;               // weights per lane and step
constexpr int STEP = 32 * LANE;       // weights per warp and step
constexpr int NESTED_BLOCK = 256;
static_assert(BLOCK_SIZE % LANE == 0, "the weights of a lane have one absmax");
static_assert(ROWS * OUTPUTS <= 32, "every sum has a lane that writes it");

#if DOUBLE_QUANT
typedef unsigned char Absmax;
#else
typedef float Absmax;
#endif

// 8 neighbours of x as float32.
__device__ __forceinline__ void load(const Float* __restrict__ x, float* values) {
    const uint4* vectors = reinterpret_cast<const uint4*>(x);
#pragma unroll
    for (int i = 0; i < LANE / VECTOR; ++i) {
        const uint4 vector = vectors[i];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[i * VECTOR + j] = widen(vector, j);
    }
}

// The 8 weights of 4 bytes of codes. `levels` is their address in shared memory, a multiple of 256: the
// last byte of a level's address is four times its code, and a byte permutation makes the whole. The
// load need not name the memory it reads: volatile, it stays behind the barrier, and nothing writes later.
__device__ __forceinline__ void decode(unsigned word, unsigned levels, float* weights) {
    const unsigned offsets[2] = {word >> 2 & 0x3c3c3c3cu, word << 2 & 0x3c3c3c3cu};
#pragma unroll
    for (int j = 0; j < LANE; ++j) {
        const unsigned address = __byte_perm(offsets[j % 2], levels, 0x7650 + j / 2);
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(weights[j]) : "r"(address));
    }
}

// A row of W: where its parts begin. Offsets within it fit in 32 bits, which halves what they cost.
struct Row {
    const unsigned char* codes;
    const Absmax* absmax;
    const float* nested;     // of the group of 256 blocks that holds the row's first
    unsigned blocks_before;  // the blocks of that group before the row
};

// What a stored absmax decodes with.
struct Nested {
    const float* map;
    float offset;
};

// The products of N steps from the lane's first `column` on: all loads of W, then the sums.
template <int N>
__device__ __forceinline__ void add(
    const Row (&weights)[OUTPUTS], const Float* __restrict__ x, const unsigned (&starts)[ROWS],
    unsigned column, unsigned levels, const Nested& nested, float (&sums)[ROWS][OUTPUTS]
) {
    unsigned words[N][OUTPUTS];
    float scales[N][OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
        const Row& row = weights[i];
        const unsigned char* codes = row.codes + column / 2;
        const Absmax* absmax = row.absmax + column / BLOCK_SIZE;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            words[n][i] = *reinterpret_cast<const unsigned*>(codes + n * (STEP / 2));
            const unsigned block = (column % BLOCK_SIZE + n * STEP) / BLOCK_SIZE;  // from `absmax` on
#if DOUBLE_QUANT
            // Two roundings, as on the CPU.
            const unsigned group = (row.blocks_before + column / BLOCK_SIZE + block) / NESTED_BLOCK;
            scales[n][i] = __fadd_rn(__fmul_rn(nested.map[absmax[block]], row.nested[group]), nested.offset);
#else
            scales[n][i] = absmax[block];
#endif
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float decoded[OUTPUTS][LANE];
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) decode(words[n][i], levels, decoded[i]);
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            float values[LANE];
            load(x + column + starts[m] + n * STEP, values);
#pragma unroll
            for (int i = 0; i < OUTPUTS; ++i) {
                float sum = __fmul_rn(decoded[i][0], values[0]);
#pragma unroll
                for (int j = 1; j < LANE; ++j) sum = __fmaf_rn(decoded[i][j], values[j], sum);
                sums[m][i] = __fmaf_rn(sum, scales[n][i], sums[m][i]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) few_rows_nf4(
    const unsigned char* __restrict__ codes,  // [features, columns], two per byte, 4-byte aligned
    const Absmax* __restrict__ absmax,        // one per block
    const float* __restrict__ nested_absmax,  // one per 256 blocks
    const float* __restrict__ nested_offset,  // [1]
    const float* __restrict__ nested_map,     // [256]
    const Float* __restrict__ x,              // [rows, columns], 16-byte aligned
    long long rows,                           // 1 to ROWS, which is 8 at most
    long long features,                       // below 2^31
    long long columns,                        // a multiple of BLOCK_SIZE, below 2^28
    const Float* __restrict__ bias,           // [features], or null
    const Float* __restrict__ hidden,         // [rows, rank], scaling included
    const Float* __restrict__ lora_b,         // [features, rank]
    long long rank,                           // 0 without an adapter
    Float* __restrict__ y                     // [rows, features]
) {
    __shared__ __align__(256) float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = __uint_as_float(LEVELS[threadIdx.x]);
#if DOUBLE_QUANT
    __shared__ float map[256];
    map[threadIdx.x] = nested_map[threadIdx.x];
    const Nested nested = {map, nested_offset[0]};
#else
    const Nested nested = {};
#endif
    __syncthreads();
    const unsigned levels = static_cast<unsigned>(__cvta_generic_to_shared(table));

    const unsigned lane = threadIdx.x % 32;
    const unsigned first = (blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
    if (first >= features) return;  // whole warps, after the only barrier
    const unsigned last_feature = static_cast<unsigned>(features) - 1;
    const unsigned last_row = static_cast<unsigned>(rows) - 1;

    // Rows past the end are the last one once more, and are not written.
    const unsigned width = static_cast<unsigned>(columns), begin = lane * LANE;
    Row weights[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
        const unsigned long long start = static_cast<unsigned long long>(min(first + i, last_feature)) * width;
        const unsigned long long block = start / BLOCK_SIZE;
        const unsigned before = static_cast<unsigned>(block % NESTED_BLOCK);
        weights[i] = {codes + start / 2, absmax + block, nested_absmax + block / NESTED_BLOCK, before};
    }
    unsigned starts[ROWS];
#pragma unroll
    for (unsigned m = 0; m < ROWS; ++m) starts[m] = min(m, last_row) * width;

    float sums[ROWS][OUTPUTS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) sums[m][i] = 0.0f;

    unsigned done = 0;  // columns behind the whole warp
#pragma unroll 1
    for (; done + UNROLL * STEP <= width; done += UNROLL * STEP) {
        add<UNROLL>(weights, x, starts, begin + done, levels, nested, sums);
    }
#pragma unroll 1
    for (; begin + done < width; done += STEP) {
        add<1>(weights, x, starts, begin + done, levels, nested, sums);
    }

    for (long long r = lane; r < rank; r += 32) {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) {
            const float factor = widen(lora_b[min(first + i, last_feature) * rank + r]);
#pragma unroll
            for (unsigned m = 0; m < ROWS; ++m) {
                const float share = widen(hidden[min(m, last_row) * rank + r]);
                sums[m][i] = __fmaf_rn(share, factor, sums[m][i]);
            }
        }
    }

    float mine = 0.0f;  // lane m * OUTPUTS + i writes sum [m][i]
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) {
            float sum = sums[m][i];
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {
                sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
            }
            if (lane == m * OUTPUTS + i) mine = sum;
        }
    const unsigned row = lane / OUTPUTS, feature = first + lane % OUTPUTS;
    if (row <= last_row && feature <= last_feature) {
        if (bias) mine = __fadd_rn(mine, widen(bias[feature]));
#if FLOAT == 32
        y[row * features + feature] = __float_as_uint(mine);
#else
        y[row * features + feature] = static_cast<Float>(narrow(mine, mine));
#endif
    }
}
