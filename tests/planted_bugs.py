"""Small correct kernels, and for each the bugs that people plant in such kernels.

A bug is a replacement in the source. The emulator must accept every kernel as it stands and reject every
bug with the complaint named; "wrong-result" means that only the answer gives it away, and
"bank-conflicts" that only the counters do.
"""

# ruff: noqa: E501 (CUDA source reads best unwrapped)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ptx_emulator import Module, Result, compile_cuda, inout, output, window

PRELUDE = """
typedef unsigned u32; typedef unsigned short u16; typedef unsigned char u8;
__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
#define COPY16(to, from) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" \\
    :: "r"(shared_address(to)), "l"(from) : "memory")
#define COPY16_ZFILL(to, from, bytes) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" \\
    :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory")
#define COMMIT() asm volatile("cp.async.commit_group;" ::: "memory")
#define WAIT(n) asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory")
"""


@dataclass(frozen=True)
class Bug:
    """A replacement in a kernel's source, and the complaint that it must draw."""

    name: str
    old: str
    new: str
    complaint: str
    # What some schedules see first instead, such as the uninitialised bytes of a race's early reader.
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A kernel, its launch, and the answer expected of it."""

    name: str
    source: str
    launch: Callable[..., Result]
    expected: Callable[[], list[np.ndarray]]
    bugs: list[Bug]

    def module(self, bug: Bug | None = None, arch: str = "sm_80") -> Module:
        """The kernel compiled, with a bug if one is given."""
        source = self.source
        if bug is not None:
            assert source.count(bug.old) == 1, f"{self.name}: {bug.name} does not apply"
            source = source.replace(bug.old, bug.new)
        return Module(compile_cuda(PRELUDE + source, arch))


RANDOM = np.random.default_rng(0)
NUMBERS = RANDOM.integers(0, 1000, 1000).astype(np.int32)

# --------------------------------------------------------------------------------
# Sums over a block: barriers, tails, alignment.

REDUCE = Kernel(
    "reduce",
    """
extern "C" __global__ void kernel(const int* x, int* y, int n) {
    __shared__ int part[256];
    int i = blockIdx.x * 256 + threadIdx.x;
    part[threadIdx.x] = i < n ? x[i] : 0;
    __syncthreads();  // filled
    for (int step = 128; step > 0; step /= 2) {
        if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
        __syncthreads();  // summed
    }
    if (threadIdx.x == 0) y[blockIdx.x] = part[0];
}""",
    lambda module, **options: module.launch(
        "kernel", [NUMBERS, output(np.zeros(4, np.int32)), 1000], grid=4, block=256, **options
    ),
    lambda: [np.array([NUMBERS[i : i + 256].sum() for i in range(0, 1000, 256)], np.int32)],
    [
        Bug("missing barrier after filling", "__syncthreads();  // filled", "", "race", ("uninitialised",)),
        Bug("missing barrier in the loop", "__syncthreads();  // summed", "", "race"),
        Bug("barrier in the loop only for the threads that add", "__syncthreads();  // summed",
            "if (threadIdx.x < step) __syncthreads();", "divergent-barrier", ("race",)),
        Bug("tail off by one", "i < n", "i <= n", "out-of-bounds"),
        Bug("uninitialised tail", "part[threadIdx.x] = i < n ? x[i] : 0;",
            "if (i < n) part[threadIdx.x] = x[i];", "uninitialised"),
        Bug("shared array one too short", "part[256]", "part[255]", "out-of-bounds"),
        Bug("writes its input", "y[blockIdx.x] = part[0]", "((int*)x)[blockIdx.x] = part[0]",
            "read-only"),
        Bug("barrier that half of a warp skips", "__syncthreads();  // filled",
            "if (threadIdx.x % 32 < 16) __syncthreads();", "race", ("uninitialised",)),
        Bug("barrier that one warp skips", "__syncthreads();  // filled",
            "if (threadIdx.x >= 32) __syncthreads();", "race", ("uninitialised",)),
        Bug("warp barrier in place of a block barrier", "__syncthreads();  // summed",
            "__syncwarp();", "race"),
        Bug("output never written is read", "y[blockIdx.x] = part[0]", "y[blockIdx.x] += part[0]",
            "uninitialised"),
    ],
)  # fmt: skip

VECTOR = Kernel(
    "vector copy",
    """
extern "C" __global__ void kernel(const float* x, float* y, int n) {
    int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 3 < n) {
        *(float4*)(y + i) = *(const float4*)(x + i);
    } else {
        for (; i < n; i++) y[i] = x[i];
    }
}""",
    lambda module, **options: module.launch(
        "kernel", [NUMBERS, output(np.zeros(998, np.int32)), 998], grid=2, block=128, **options
    ),
    lambda: [NUMBERS[:998]],
    [
        Bug("misaligned vector load", "*(const float4*)(x + i)", "*(const float4*)(x + 1 + i)",
            "misaligned"),
        Bug("misaligned vector store", "*(float4*)(y + i)", "*(float4*)(y + (i ^ 2))",
            "misaligned"),
        Bug("no tail", "i + 3 < n", "i < n", "out-of-bounds"),
        Bug("tail loop one too far", "i < n; i++", "i <= n; i++", "out-of-bounds"),
    ],
)  # fmt: skip

# --------------------------------------------------------------------------------
# Indices beyond 32 bits: blocks from the far end of a tensor of 2^33 numbers.

FAR = 2**33
TAIL = RANDOM.integers(0, 2**31, 512).astype(np.int32)

BIG_INDEX = Kernel(
    "64-bit index",
    """
extern "C" __global__ void kernel(const int* x, int* y) {
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    y[i] = x[i] + 1;
}""",
    lambda module, **options: module.launch(
        "kernel",
        [window(TAIL, 4 * (FAR - 512)), output(np.zeros_like(TAIL), offset=4 * (FAR - 512))],
        grid=FAR // 256,
        block=256,
        blocks=[FAR // 256 - 2, FAR // 256 - 1],
        **options,
    ),
    lambda: [TAIL + 1],
    [
        Bug("32-bit index overflows", "long long i = (long long)blockIdx.x",
            "int i = blockIdx.x", "out-of-bounds"),
    ],
)  # fmt: skip

# --------------------------------------------------------------------------------
# Exchange within a warp.

WARP_EXCHANGE = Kernel(
    "exchange within a warp",
    """
extern "C" __global__ void kernel(const int* x, int* y) {
    __shared__ int cell[64];
    int t = threadIdx.x;
    cell[t] = x[t];
    __syncwarp();  // written
    int other = cell[t ^ 1];
    __syncwarp();  // read
    cell[t] = other + 1;
    __syncwarp();  // written again
    y[t] = cell[t ^ 3];
}""",
    lambda module, **options: module.launch(
        "kernel", [NUMBERS[:64], output(np.zeros(64, np.int32))], grid=1, block=64, **options
    ),
    lambda: [NUMBERS[np.arange(64) ^ 2] + 1],
    [
        Bug("missing __syncwarp after writing", "__syncwarp();  // written\n", "", "race"),
        Bug("missing __syncwarp before overwriting", "__syncwarp();  // read", "", "race"),
        Bug("reads beyond its warp", "cell[t ^ 3]", "cell[t ^ 32]", "uninitialised", ("race",)),
        Bug("__syncwarp of the wrong lanes", "__syncwarp();  // written\n",
            "__syncwarp(t % 32 < 16 ? 0x0000ffff : 0xffff0000); y[t] = cell[t ^ 16];", "race"),
    ],
)  # fmt: skip

SHUFFLE = Kernel(
    "sum by shuffles",
    """
extern "C" __global__ void kernel(const int* x, int* y) {
    int v = x[threadIdx.x];
    for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
    if (threadIdx.x < 8) {
        v = __shfl_sync(0xffu, v, 0);
        y[threadIdx.x] = v;
    }
    __syncwarp();
}""",
    lambda module, **options: module.launch(
        "kernel", [NUMBERS[:32], output(np.zeros(8, np.int32))], grid=1, block=32, **options
    ),
    lambda: [np.full(8, NUMBERS[:32].sum(), np.int32)],
    [
        Bug("shuffle from a lane that is absent", "__shfl_sync(0xffu, v, 0)",
            "__shfl_sync(0xffu, v, 9)", "collective"),
        Bug("mask names lanes that never come", "__shfl_sync(0xffu, v, 0)",
            "__shfl_sync(0xffffu, v, 0)", "divergent-collective"),
        Bug("lane outside its own mask", "__shfl_sync(0xffu, v, 0)", "__shfl_sync(0xfeu, v, 1)",
            "collective"),
        Bug("wrong lane", "__shfl_sync(0xffu, v, 0)", "__shfl_sync(0xffu, v, 1)",
            "wrong-result"),
        Bug("step of the butterfly off by one", "step > 0; step /= 2", "step > 1; step /= 2",
            "wrong-result"),
    ],
)  # fmt: skip

# --------------------------------------------------------------------------------
# A pipeline of cp.async copies with two stages and a tail.

BYTES = RANDOM.integers(0, 2**31, 4 * 8 * 64 - 3).astype(np.int32)

PIPELINE = Kernel(
    "cp.async pipeline",
    """
extern "C" __global__ void kernel(const int* x, int* y, int n) {
    __shared__ __align__(16) int stage[2][256];
    int t = threadIdx.x, sum = 0;
    auto fetch = [&](int step) {
        int at = 256 * step + 4 * t;
        int bytes = max(0, min(4, n - at)) * 4;
        COPY16_ZFILL(&stage[step & 1][4 * t], x + (bytes ? at : 0), bytes);
    };
    fetch(0); COMMIT();  // first
    for (int step = 0; step < 8; step++) {
        if (step + 1 < 8) fetch(step + 1);
        COMMIT();  // next
        WAIT(1);  // this
        __syncthreads();  // landed
        for (int i = 0; i < 4; i++) sum += stage[step & 1][(t + 64 * i) ^ 5];
        __syncthreads();  // used
    }
    y[t] = sum;
}""",
    lambda module, **options: module.launch(
        "kernel",
        [BYTES, output(np.zeros(64, np.int32)), BYTES.size],
        grid=1,
        block=64,
        **options,
    ),
    lambda: [
        np.append(BYTES, np.zeros(3, np.int32)).reshape(8, 4, 64).sum((0, 1), dtype=np.int32)[
            np.arange(64) ^ 5
        ]
    ],
    [
        Bug("missing wait", "WAIT(1);  // this", "", "async-in-flight"),
        Bug("wait one group short", "WAIT(1);  // this", "WAIT(2);", "async-in-flight"),
        Bug("wait before commit", "COMMIT();  // next\n        WAIT(1);  // this",
            "WAIT(1); COMMIT(); __syncthreads();", "async-in-flight"),
        Bug("first stage never committed", "fetch(0); COMMIT();  // first", "fetch(0);",
            "async-in-flight"),
        Bug("missing barrier after the wait", "__syncthreads();  // landed", "", "race", ("async-in-flight", "uninitialised")),
        Bug("barrier before the wait", "WAIT(1);  // this\n        __syncthreads();  // landed",
            "__syncthreads(); WAIT(1);", "race", ("async-in-flight",)),
        Bug("missing barrier before the stage is filled again", "__syncthreads();  // used", "",
            "race"),
        Bug("fills the stage in use", "fetch(step + 1);", "fetch(step + 2 < 8 ? step + 2 : 7);",
            "async-in-flight"),
        Bug("no zero fill at the tail", "max(0, min(4, n - at)) * 4", "16", "out-of-bounds"),
        Bug("source misaligned", "x + (bytes ? at : 0)", "x + (bytes ? at + 1 : 0)",
            "misaligned"),
        Bug("ends with copies pending", "if (step + 1 < 8) fetch(step + 1);",
            "fetch(step + 1);", "async-pending-at-exit"),
        Bug("never commits", "COMMIT();  // next", "if (step == 8) COMMIT();", "async-in-flight"),
    ],
)  # fmt: skip

# --------------------------------------------------------------------------------
# A tile through swizzled shared memory, ldmatrix and mma.

TILE_A = RANDOM.integers(-4, 5, (16, 64)).astype(np.float16)
TILE_B = RANDOM.integers(-4, 5, (8, 64)).astype(np.float16)

MATRIX = Kernel(
    "swizzled tile",
    """
#define SWIZZLE(chunk, row) ((chunk) ^ (row) & 7)
extern "C" __global__ void kernel(const u16* a, const u16* b, float* d) {
    __shared__ __align__(16) u16 sa[16 * 64];
    __shared__ __align__(16) u16 sb[8 * 64];
    int lane = threadIdx.x;
    for (int c = lane; c < 128; c += 32) {
        int row = c / 8, chunk = c % 8;
        COPY16(sa + row * 64 + SWIZZLE(chunk, row) * 8, a + c * 8);  // write A
    }
    for (int c = lane; c < 64; c += 32) COPY16(sb + c / 8 * 64 + SWIZZLE(c % 8, c / 8) * 8, b + c * 8);
    COMMIT(); WAIT(0);
    __syncwarp();
    float acc[4] = {};
    for (int k = 0; k < 4; k++) {
        u32 fa[4], fb[2];
        int row = lane & 15;
        const u16* pa = sa + row * 64 + SWIZZLE(2 * k + (lane >> 4), row) * 8;  // read A
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
            : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(shared_address(pa)) : "memory");
        row = lane & 7;
        const u16* pb = sb + row * 64 + SWIZZLE(2 * k + (lane >> 3 & 1), row) * 8;
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
            : "=r"(fb[0]), "=r"(fb[1]) : "r"(shared_address(pb)) : "memory");
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    }
    float* p = d + lane / 4 * 8 + lane % 4 * 2;
    p[0] = acc[0]; p[1] = acc[1]; p[64] = acc[2]; p[65] = acc[3];
}""",
    lambda module, **options: module.launch(
        "kernel",
        [TILE_A, TILE_B, output(np.zeros((16, 8), np.float32))],
        grid=1,
        block=32,
        **options,
    ),
    lambda: [TILE_A.astype(np.float32) @ TILE_B.astype(np.float32).T],
    [
        Bug("swizzle forgotten on one side", "SWIZZLE(2 * k + (lane >> 4), row) * 8;",
            "(2 * k + (lane >> 4)) * 8;", "wrong-result"),
        Bug("swizzle that leaves holes", "SWIZZLE(chunk, row) * 8, a + c * 8);  // write A",
            "(chunk ^ row & 7 & chunk) * 8, a + c * 8);", "async-in-flight"),
        Bug("ldmatrix row misaligned", "SWIZZLE(2 * k + (lane >> 4), row) * 8;",
            "SWIZZLE(2 * k + (lane >> 4), row) * 8 + 4;", "misaligned"),
        Bug("no swizzle at all", "((chunk) ^ (row) & 7)", "(chunk)", "bank-conflicts"),
        Bug("missing __syncwarp before ldmatrix", "__syncwarp();", "", "race"),
        Bug("fragments in the wrong order", '"r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb',
            '"r"(fa[0]), "r"(fa[2]), "r"(fa[1]), "r"(fa[3]), "r"(fb', "wrong-result"),
    ],
)  # fmt: skip

# --------------------------------------------------------------------------------
# Blocks that wait for each other, named barriers.

FLAG = Kernel(
    "flag between blocks",
    """
extern "C" __global__ void kernel(int* flag, int* y) {
    if (blockIdx.x == 0) {  // the last block sets the flag
        while (atomicAdd(flag, 0) == 0) {}
        __threadfence();
        y[0] = ((volatile int*)y)[1] + 1;
    } else if (blockIdx.x == gridDim.x - 1) {
        y[1] = 41;
        __threadfence();
        atomicExch(flag, 1);
    }
}""",
    lambda module, **options: module.launch(
        "kernel",
        [inout(np.zeros(1, np.int32)), inout(np.zeros(2, np.int32))],
        grid=6,
        block=32,
        **options,
    ),
    lambda: [np.ones(1, np.int32), np.array([42, 41], np.int32)],
    [
        Bug("flag never set", "atomicExch(flag, 1)", "atomicExch(flag, 0)", "deadlock"),
        Bug("waits for another value", "atomicAdd(flag, 0) == 0", "atomicAdd(flag, 0) != 2",
            "deadlock"),
    ],
)  # fmt: skip

LOCK = Kernel(
    "spin lock",
    """
extern "C" __global__ void kernel(int* lock, int* y) {
    for (int turn = 0; turn < 2; turn++) {
        bool done = false;
        while (!done) {
            if (atomicCAS(lock, 0, 1) == 0) {
                __threadfence();
                *(volatile int*)y = *(volatile int*)y + 1;
                __threadfence();
                atomicExch(lock, 0);
                done = true;
            }
        }
    }
}""",
    lambda module, **options: module.launch(
        "kernel",
        [inout(np.zeros(1, np.int32)), inout(np.zeros(1, np.int32))],
        grid=3,
        block=40,
        **options,
    ),
    lambda: [np.zeros(1, np.int32), np.full(1, 240, np.int32)],
    [
        Bug("lock never released", "atomicExch(lock, 0);", "", "deadlock"),
    ],
)  # fmt: skip

NAMED = Kernel(
    "named barriers",
    """
extern "C" __global__ void kernel(const int* x, int* y) {
    __shared__ int cell[64];
    int t = threadIdx.x;
    if (t < 64) {
        cell[t] = x[t];
        asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
        asm volatile("bar.sync 1, 128;" ::: "memory");
        y[t - 64] = cell[127 - t];
    }
}""",
    lambda module, **options: module.launch(
        "kernel", [NUMBERS[:64], output(np.zeros(64, np.int32))], grid=1, block=128, **options
    ),
    lambda: [NUMBERS[63::-1]],
    [
        Bug("barriers of different numbers", "bar.arrive 1, 128", "bar.arrive 2, 128",
            "divergent-barrier"),
        Bug("barrier counts too few", "bar.sync 1, 128", "bar.sync 1, 96", "divergent-barrier"),
        Bug("nobody arrives", 'asm volatile("bar.arrive 1, 128;" ::: "memory");', "",
            "divergent-barrier"),
        Bug("consumer does not wait", 'asm volatile("bar.sync 1, 128;" ::: "memory");', "",
            "race", ("uninitialised",)),
        Bug("a warp and a half", "t < 64", "t < 48", "divergent-barrier"),
    ],
)  # fmt: skip

DIVERGED = Kernel(
    "collectives of a whole warp",
    """
extern "C" __global__ void kernel(const int* x, int* y) {
    int t = threadIdx.x;
    __syncthreads();
    u32 odd = __ballot_sync(0xffffffffu, x[t] & 1);
    float d[4] = {0, 0, 0, 0};
    u32 one = 0x3c003c00;
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %4}, {%4}, "
        "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(one));
    y[t] = __popc(odd) + (int)d[0];
}""",
    lambda module, **options: module.launch(
        "kernel", [NUMBERS[:32], output(np.zeros(32, np.int32))], grid=1, block=32, **options
    ),
    lambda: [np.full(32, (NUMBERS[:32] & 1).sum() + 8, np.int32)],
    [
        Bug("barrier that half of a warp skips", "__syncthreads();", "if (t < 16) __syncthreads();",
            "divergent-barrier"),
        Bug("vote that half of the warp skips",
            "u32 odd = __ballot_sync(0xffffffffu, x[t] & 1);",
            "u32 odd = 0; if (t < 16) odd = __ballot_sync(0xffffffffu, x[t] & 1);",
            "divergent-collective"),
        Bug("mma after some lanes have ended", "float d[4]", "if (t == 31) return; float d[4]",
            "collective"),
        Bug("mma under a condition", "asm volatile(\"mma", "if (t > 3) asm volatile(\"mma",
            "collective"),
    ],
)  # fmt: skip

KERNELS = [
    REDUCE, VECTOR, BIG_INDEX, WARP_EXCHANGE, SHUFFLE, PIPELINE, MATRIX, FLAG, LOCK, NAMED, DIVERGED,
]  # fmt: skip
