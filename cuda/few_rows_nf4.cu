// y = x W^T + hidden B^T + bias for few rows of x, W decoded in registers: rust/few_rows.rs on a GPU.
//
//   a warp     = OUTPUTS rows of W, from end to end, for ROWS rows of x
//   one lane   = 4 bytes of codes per step, beside its neighbours' bytes: the sum of level times x over
//                these 8 weights, in float32, times their block's absmax, decoded where it is needed
//   the end    : lane r adds the adapter's share of rank r, r + 32, ...; lanes are summed in one order;
//                bias is added and y rounded, once
//   bound      : bytes, 0.516 per weight, for one row of x; for 8 the multiply-adds
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) few_rows_nf4(
    const unsigned char* __restrict__ codes,  // [features, columns], two per byte, 4-byte aligned
    const Absmax* __restrict__ absmax,        // one per block
    const float* __restrict__ nested_absmax,  // one per 256 blocks
    const float* __restrict__ nested_offset,  // [1]
    const float* __restrict__ nested_map,     // [256]
    const Float* __restrict__ x,              // [rows, columns], 16-byte aligned
    long long rows,                           // 1 to ROWS
    long long features,
    long long columns,                        // a multiple of BLOCK_SIZE
    const Float* __restrict__ bias,           // [features], or null
    const Float* __restrict__ hidden,         // [rows, rank], scaling included
    const Float* __restrict__ lora_b,         // [features, rank]
    long long rank,                           // 0 without an adapter
    Float* __restrict__ y                     // [rows, features]
) {
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = __uint_as_float(LEVELS[threadIdx.x]);
#if DOUBLE_QUANT
    __shared__ float map[256];
    map[threadIdx.x] = nested_map[threadIdx.x];
    const float offset = nested_offset[0];
#endif
    __syncthreads();

    const int lane = threadIdx.x % 32;
    const long long first = (static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32) * OUTPUTS;
    if (first >= features) return;  // whole warps, after the only barrier

    // Rows past the end are the last one once more, and are not written.
    long long starts[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) starts[i] = min(first + i, features - 1) * columns;
    const Float* inputs[ROWS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m) inputs[m] = x + min(static_cast<long long>(m), rows - 1) * columns;

    float sums[ROWS][OUTPUTS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) sums[m][i] = 0.0f;

#pragma unroll 1
    for (long long step = lane * LANE; step < columns; step += UNROLL * STEP) {
        unsigned words[UNROLL][OUTPUTS];
        float scales[UNROLL][OUTPUTS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int i = 0; i < OUTPUTS; ++i) {
                const unsigned long long weight = starts[i] + min(step + u * STEP, columns - LANE);
                words[u][i] = *reinterpret_cast<const unsigned*>(codes + weight / 2);
                const unsigned long long block = weight / BLOCK_SIZE;
#if DOUBLE_QUANT
                // Two roundings, as on the CPU.
                const float nested = nested_absmax[block / NESTED_BLOCK];
                scales[u][i] = __fadd_rn(__fmul_rn(map[absmax[block]], nested), offset);
#else
                scales[u][i] = absmax[block];
#endif
            }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const long long column = step + u * STEP;
            if (column >= columns) break;
            float weights[OUTPUTS][LANE];
#pragma unroll
            for (int i = 0; i < OUTPUTS; ++i)
#pragma unroll
                for (int j = 0; j < LANE; ++j) {
                    const unsigned code = words[u][i] >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15u;
                    weights[i][j] = levels[code];
                }
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                float values[LANE];
                load(inputs[m] + column, values);
#pragma unroll
                for (int i = 0; i < OUTPUTS; ++i) {
                    float sum = __fmul_rn(weights[i][0], values[0]);
#pragma unroll
                    for (int j = 1; j < LANE; ++j) sum = __fmaf_rn(weights[i][j], values[j], sum);
                    sums[m][i] = __fmaf_rn(sum, scales[u][i], sums[m][i]);
                }
            }
        }
    }

    for (long long r = lane; r < rank; r += 32) {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) {
            const float factor = widen(lora_b[min(first + i, features - 1) * rank + r]);
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                const float share = widen(hidden[min(static_cast<long long>(m), rows - 1) * rank + r]);
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
    const long long row = lane / OUTPUTS, feature = first + lane % OUTPUTS;
    if (row < rows && feature < features) {
        if (bias) mine = __fadd_rn(mine, widen(bias[feature]));
#if FLOAT == 32
        y[row * features + feature] = __float_as_uint(mine);
#else
        y[row * features + feature] = static_cast<Float>(narrow(mine, mine));
#endif
    }
}
