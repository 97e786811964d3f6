// y = x W^T + hidden B^T + bias for tens of rows of x, on tensor cores, W decoded in registers.
//
//   a CTA   = 16 W_TILES rows of W and up to 8 X_TILES rows of x
//   a warp  = every WARPS-th chunk of 64 columns: 4 steps of mma.m16n8k16, W on the left, which makes a
//             tile of y from 16 rows of W and 8 of x; summed in float32 without absmax, since 64 columns
//             of a row have one, and times absmax once per chunk
//   a lane  = 16 neighbours of each of its rows: any order of columns will do that is the same for both
//             sides, and so codes and x go from memory to the tensor cores as they lie, without a shuffle
//   the end : chunks of rank, 16 ranks each, are added likewise; warps are summed in one order; bias is
//             added and y rounded, once
//
// A byte of codes is looked up whole: 256 pairs of levels, in 32 copies, one for each lane and bank.
// Sums of a chunk are finite while x in bfloat16 is below 3.6e36 (in float16 always).
#include "codebook.cuh"
#include "floats.cuh"

constexpr int CHUNK = 64;
constexpr int STEPS = CHUNK / 16;
constexpr unsigned RUN = 4;
constexpr int FEATURES = 16 * W_TILES;
constexpr int ROWS = 8 * X_TILES;
constexpr int NESTED_BLOCK = 256;
constexpr int SHARED_WORDS = 256 * 32;
static_assert(RUN % UNROLL == 0 && 256 % WARPS == 0, "turns of the loop end with runs; warps share the table");
static_assert(BLOCK_SIZE % CHUNK == 0, "the columns of a chunk have one absmax");
constexpr int SUMS = ROWS * FEATURES;
// For an H100's code the registers suffice; others need up to 152 for the largest tile, and would spill.
constexpr int CTAS_PER_MULTIPROCESSOR = __CUDA_ARCH__ == 900 ? CTAS : 1;
static_assert(WARPS * SUMS <= SHARED_WORDS, "the sums of all warps fit");

// Levels are rounded to the type of x. In bfloat16, they are together closer when they are multiplied by
// this: 0.09 % off (root mean square) instead of 0.14 %.
#if FLOAT == FLOAT_BF16
constexpr float LEVEL_SCALE = 1.43675f;
#else
constexpr float LEVEL_SCALE = 1.0f;
#endif

#if DOUBLE_QUANT
typedef unsigned char Absmax;
#else
typedef float Absmax;
#endif

// sums += w x: 16 rows of W, 8 of x, 16 columns.
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&w)[4], unsigned x0, unsigned x1) {
#if FLOAT == FLOAT_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x0), "r"(x1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x0), "r"(x1));
#endif
}

// A chunk of W as a lane reads it: rows `lane / 4` and 8 further of each tile.
struct Codes {
    uint2 words[W_TILES][2];

    // starts: of a lane's rows, in its vectors of 8 bytes.
    __device__ __forceinline__ void load(
        const uint2* codes, const unsigned (&starts)[W_TILES][2], unsigned chunk
    ) {
#pragma unroll
        for (int i = 0; i < W_TILES; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j)
                words[i][j] = codes[starts[i][j] + chunk * (CHUNK / 16)];
    }
};

// The pair of levels of byte `i` of a word. `lane_offset` is the lane's copy of the table, in bytes.
__device__ __forceinline__ unsigned pair_of(const unsigned* pairs, unsigned word, int i, unsigned lane_offset) {
    const unsigned shifted = i == 0 ? word << 7 : word >> (8 * i - 7);
    unsigned at;  // shifted & 0x7f80 | lane_offset, which ptxas would make in two
    asm("lop3.b32 %0, %1, 0x7f80, %2, 0xea;" : "=r"(at) : "r"(shifted), "r"(lane_offset));
    return *reinterpret_cast<const unsigned*>(reinterpret_cast<const char*>(pairs) + at);
}

// Elements `first` and one further of a row that ends at `end`, in one word; zero from there on.
__device__ __forceinline__ unsigned neighbours(const Float* matrix, unsigned first, unsigned end) {
    const unsigned low = first < end ? matrix[first] : 0u;
    const unsigned high = first + 1 < end ? matrix[first + 1] : 0u;
    return low | high << 16;
}

// Who a thread is, and the first row of W and of x of its CTA. Neighbouring CTAs share rows of W, which
// are read from memory once. Asked for twice: kept over the main loop, the answer would cost its registers.
struct Place {
    unsigned lane, group, quarter, warp, feature, row;

    __device__ __forceinline__ explicit Place(long long rows) {
        unsigned thread, cta;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
        const unsigned x_groups = (static_cast<unsigned>(rows) + ROWS - 1) / ROWS;
        lane = thread % 32, group = lane / 4, quarter = lane % 4;
        warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // which ptxas then knows to be uniform
        feature = cta / x_groups * FEATURES, row = cta % x_groups * ROWS;
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, CTAS_PER_MULTIPROCESSOR) tensor_cores_nf4(
    const unsigned char* __restrict__ codes,  // [features, columns], two per byte, 8-byte aligned
    const Absmax* __restrict__ absmax,        // one per block
    const float* __restrict__ nested_absmax,  // one per 256 blocks
    const float* __restrict__ nested_offset,  // [1]
    const float* __restrict__ nested_map,     // [256]
    const Float* __restrict__ x,              // [rows, columns], 16-byte aligned
    long long rows,                           // 1 or more
    long long features,                       // features * columns: below 2^32
    long long columns,                        // a multiple of BLOCK_SIZE; rows * columns: below 2^32
    const Float* __restrict__ bias,           // [features], or null
    const Float* __restrict__ hidden,         // [rows, rank], scaling included
    const Float* __restrict__ lora_b,         // [features, rank]
    long long rank,                           // 0 without an adapter
    Float* __restrict__ y                     // [rows, features]
) {
    // Rows past the end are the last one once more, and are not written. Chunks past the end likewise.
    const unsigned last_feature = static_cast<unsigned>(features) - 1, last_row = static_cast<unsigned>(rows) - 1;
    const unsigned width = static_cast<unsigned>(columns), chunks = width / CHUNK;
    const Place at(rows);

    // Where a lane's rows begin, in its vectors of 8 and 16 bytes.
    unsigned w_starts[W_TILES][2], x_starts[X_TILES];
#pragma unroll
    for (int i = 0; i < W_TILES; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
            w_starts[i][j] = min(at.feature + 16 * i + 8 * j + at.group, last_feature) * (width / 16) + at.quarter;
#pragma unroll
    for (int n = 0; n < X_TILES; ++n)
        x_starts[n] = min(at.row + 8 * n + at.group, last_row) * (width / 8) + 2 * at.quarter;

    // The first loads are under way while the tables are made.
    const uint2* vectors_of_codes = reinterpret_cast<const uint2*>(codes);
    const uint4* vectors_of_x = reinterpret_cast<const uint4*>(x);
    Codes next_codes;
    next_codes.load(vectors_of_codes, w_starts, min(at.warp * RUN, chunks - 1));

    __shared__ unsigned shared[SHARED_WORDS];  // pairs of levels, then sums
    const float level = __uint_as_float(LEVELS[at.lane % 16]);
#pragma unroll 4
    for (unsigned i = 0; i < 256 / WARPS; ++i) {
        const unsigned byte = i * WARPS + at.warp;
        const float high = __shfl_sync(0xffffffffu, level, byte >> 4), low = __shfl_sync(0xffffffffu, level, byte & 15);
        shared[byte * 32 + at.lane] = narrow(__fmul_rn(LEVEL_SCALE, high), __fmul_rn(LEVEL_SCALE, low));
    }
#if DOUBLE_QUANT
    __shared__ float map[256];
    for (unsigned i = threadIdx.x; i < 256; i += 32 * WARPS) map[i] = nested_map[i];
#endif
    __syncthreads();

    float sums[W_TILES][X_TILES][4] = {};
    float scales[W_TILES][2];
    unsigned following;
#pragma unroll 1
    for (unsigned first = at.warp * RUN; first < chunks; first = following) {
        // A lane keeps the absmax of its rows in one chunk of the run, and hands them out.
        if (first % RUN == 0) {
#pragma unroll
            for (int i = 0; i < W_TILES; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const unsigned chunk = w_starts[i][j] / (CHUNK / 16) + min(first + at.quarter, chunks - 1);
                    const unsigned block = chunk / (BLOCK_SIZE / CHUNK);
#if DOUBLE_QUANT
                    // Two roundings, as on the CPU; then one that takes back the levels' factor.
                    const float product = __fmul_rn(map[absmax[block]], nested_absmax[block / NESTED_BLOCK]);
                    scales[i][j] = __fmul_rn(__fadd_rn(product, nested_offset[0]), 1.0f / LEVEL_SCALE);
#else
                    scales[i][j] = __fmul_rn(absmax[block], 1.0f / LEVEL_SCALE);
#endif
                }
        }
        following = first + UNROLL + (first % RUN + UNROLL < RUN ? 0 : (WARPS - 1) * RUN);
#pragma unroll
        for (int c = 0; c < UNROLL; ++c) {
            const unsigned chunk = first + c;
            const Codes now = next_codes;
            next_codes.load(vectors_of_codes, w_starts, min(c + 1 < UNROLL ? chunk + 1 : following, chunks - 1));
            // Past the end: the last chunk once more, which is not added.
            const unsigned x_chunk = min(chunk, chunks - 1) * (CHUNK / 8);
            unsigned w[W_TILES][STEPS][4];
            float scale[W_TILES][2];
#pragma unroll
            for (int i = 0; i < W_TILES; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const unsigned words[2] = {now.words[i][j].x, now.words[i][j].y};
#pragma unroll
                    for (int byte = 0; byte < 8; ++byte)
                        w[i][byte / 2][byte % 2 * 2 + j] = pair_of(shared, words[byte / 4], byte % 4, 4 * at.lane);
                    scale[i][j] = __shfl_sync(0xffffffffu, scales[i][j], 4 * at.group + chunk % RUN);
                }
#pragma unroll
            for (int n = 0; n < X_TILES; ++n) {
                const uint4* vectors = vectors_of_x + (x_starts[n] + x_chunk);
                const uint4 low = vectors[0], high = vectors[1];
                const unsigned xs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int i = 0; i < W_TILES; ++i) {
                    float products[4] = {};
#pragma unroll
                    for (int step = 0; step < STEPS; ++step)
                        multiply(products, w[i][step], xs[2 * step], xs[2 * step + 1]);
                    if (chunk < chunks) {
#pragma unroll
                        for (int k = 0; k < 4; ++k)
                            sums[i][n][k] = __fmaf_rn(products[k], scale[i][k / 2], sums[i][n][k]);
                    }
                }
            }
        }
    }

    // The adapter's share: the columns of this step are ranks, four neighbours to a lane.
    const unsigned ranks = static_cast<unsigned>(rank);
    const Place end(rows);
#pragma unroll 1
    for (unsigned first = end.warp * 16; first < ranks; first += WARPS * 16) {
        const unsigned r = first + 4 * end.quarter;
        unsigned w[W_TILES][4];
#pragma unroll
        for (int i = 0; i < W_TILES; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned row = min(end.feature + 16 * i + j % 2 * 8 + end.group, last_feature) * ranks;
                w[i][j] = neighbours(lora_b, row + r + j / 2 * 2, row + ranks);
            }
#pragma unroll
        for (int n = 0; n < X_TILES; ++n) {
            const unsigned row = min(end.row + 8 * n + end.group, last_row) * ranks;
            const unsigned x0 = neighbours(hidden, row + r, row + ranks);
            const unsigned x1 = neighbours(hidden, row + r + 2, row + ranks);
#pragma unroll
            for (int i = 0; i < W_TILES; ++i) multiply(sums[i][n], w[i], x0, x1);
        }
    }

    // Warps hand over their sums as they hold them; each thread adds some up.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < W_TILES; ++i)
#pragma unroll
        for (int n = 0; n < X_TILES; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                shared[end.warp * SUMS + ((i * X_TILES + n) * 4 + k) * 32 + end.lane] = __float_as_uint(sums[i][n][k]);
    __syncthreads();
#pragma unroll
    for (unsigned place = 32 * end.warp + end.lane; place < SUMS; place += 32 * WARPS) {
        const unsigned k = place / 32 % 4, n = place / 128 % X_TILES, i = place / 128 / X_TILES;
        const unsigned row = end.row + 8 * n + 2 * end.quarter + k % 2;
        const unsigned feature = end.feature + 16 * i + k / 2 * 8 + end.group;
        float sum = __uint_as_float(shared[place]);
#pragma unroll
        for (int other = 1; other < WARPS; ++other) sum = __fadd_rn(sum, __uint_as_float(shared[other * SUMS + place]));
        if (row <= last_row && feature <= last_feature) {
            if (bias) sum = __fadd_rn(sum, widen(bias[feature]));
            y[row * features + feature] = static_cast<Float>(narrow(sum, sum));
        }
    }
}
