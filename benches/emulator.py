"""How fast the PTX emulator is: thread instructions per second of one core on a GEMM main loop.

    python -m benches.emulator

The kernel is a plain tensor-core product (bf16, cp.async in two stages, ldmatrix, mma.sync), with
all checks on. Its answer is compared with numpy's before its time counts. The second figure is the
time of a 4096 x 4096 x 16 product on all cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from ptx_emulator import Module, Result, compile_cuda, output

# Rows of A and of B in one block's tile; K in steps of 32. Rows are padded to 40 elements, which
# keeps ldmatrix free of bank conflicts.
SOURCE = """
typedef unsigned u32; typedef unsigned short u16;
__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(u16* to, const u16* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at(to)), "l"(from) : "memory");
}
extern "C" __global__ void product(const u16* a, const u16* b, float* c, int n, int k) {
    __shared__ __align__(16) u16 sa[2][TILE_M * 40];
    __shared__ __align__(16) u16 sb[2][TILE_N * 40];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row0 = blockIdx.y * TILE_M, column0 = blockIdx.x * TILE_N, mine = warp * 16;
    float sum[TILE_N / 8][4] = {};
    auto fetch = [&](int step) {
        for (int i = threadIdx.x; i < TILE_M * 4; i += 2 * TILE_M)
            copy16(&sa[step & 1][i / 4 * 40 + i % 4 * 8], a + (size_t)(row0 + i / 4) * k + step * 32 + i % 4 * 8);
        for (int i = threadIdx.x; i < TILE_N * 4; i += 2 * TILE_M)
            copy16(&sb[step & 1][i / 4 * 40 + i % 4 * 8], b + (size_t)(column0 + i / 4) * k + step * 32 + i % 4 * 8);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    fetch(0);
    for (int step = 0; step < k / 32; step++) {
        if (step + 1 < k / 32) {
            fetch(step + 1);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads();
        for (int kk = 0; kk < 32; kk += 16) {
            u32 fa[4];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                : "r"(at(&sa[step & 1][(mine + lane % 16) * 40 + kk + lane / 16 * 8])) : "memory");
            for (int j = 0; j < TILE_N / 8; j++) {
                u32 fb[2];
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                    : "=r"(fb[0]), "=r"(fb[1])
                    : "r"(at(&sb[step & 1][(j * 8 + lane % 8) * 40 + kk + lane / 8 % 2 * 8])) : "memory");
                asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                    "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                    : "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
                    : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
            }
        }
        __syncthreads();
    }
    for (int j = 0; j < TILE_N / 8; j++) {
        float* out = c + (size_t)(row0 + mine + lane / 4) * n + column0 + j * 8 + lane % 4 * 2;
        out[0] = sum[j][0]; out[1] = sum[j][1]; out[8 * n] = sum[j][2]; out[8 * n + 1] = sum[j][3];
    }
}
"""  # noqa: E501


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of numbers that bf16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def product(m: int, n: int, k: int, tile_m: int, tile_n: int, **options) -> tuple[Result, float]:
    """Run C[m, n] = A[m, k] B[n, k]^T, check it, and return the result with its seconds."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (m, k)), rng.integers(-8, 9, (n, k))
    module = Module(compile_cuda(SOURCE, options=[f"-DTILE_M={tile_m}", f"-DTILE_N={tile_n}"]))
    arguments = [bfloat16(a), bfloat16(b), output(np.zeros((m, n), np.float32)), n, k]
    start = time.perf_counter()
    result = module.launch(
        "product", arguments, grid=(n // tile_n, m // tile_m), block=2 * tile_m, **options
    )
    seconds = time.perf_counter() - start
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    if not np.array_equal(result.arrays[0], expected):
        raise SystemExit("the product is wrong")
    return result, seconds


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    runs = [product(64, 128, 2048, 64, 64, workers=1) for _ in range(repeat)]
    result, seconds = min(runs, key=lambda run: run[1])
    count = result.counters["thread_instructions"]
    print(f"one core, 64 x 128 x 2048: {count / 1e6:.1f} M thread instructions in {seconds:.3f} s")
    print(f"  {count / seconds / 1e6:.1f} M thread instructions/s, checks on")
    result, seconds = product(16, 4096, 4096, 16, 64)
    print(f"all cores, 16 x 4096 x 4096: {seconds:.2f} s, {result.counters['classes']['mma']} mma")


if __name__ == "__main__":
    main()
