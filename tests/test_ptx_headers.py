"""Kernels built from CUDA's own headers: what real kernels are written with. (wmma: test_ptx_matrix.)"""

# ruff: noqa: E501 (CUDA source reads best unwrapped)
from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Module, compile_cuda, output

ARCHITECTURES = ["sm_80", "sm_90", "sm_120"]
SCHEDULES = ["ascending", "descending", "random:5"]
NUMBERS = np.random.default_rng(0).integers(-100, 100, 1000).astype(np.int32)


def run(source: str, arguments, block: int, arch: str) -> list[np.ndarray]:
    """The arrays that a kernel leaves, the same ones under every schedule."""
    module = Module(compile_cuda(source, arch, ["-std=c++17"], headers=True))
    first, *others = (
        module.launch("kernel", arguments, grid=1, block=block, schedule=schedule).arrays
        for schedule in SCHEDULES
    )
    for arrays in others:
        for a, b in zip(first, arrays, strict=True):
            np.testing.assert_array_equal(a, b)
    return first


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cooperative_groups_reduce_in_tiles(arch):
    source = """
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
namespace cg = cooperative_groups;
extern "C" __global__ void kernel(const int* x, int* y, int n) {
    auto block = cg::this_thread_block();
    auto tile = cg::tiled_partition<16>(block);
    __shared__ int part[16];
    int sum = 0;
    for (int i = block.thread_rank(); i < n; i += block.size()) sum += x[i];
    sum = cg::reduce(tile, sum, cg::plus<int>());
    if (tile.thread_rank() == 0) part[block.thread_rank() / 16] = sum;
    block.sync();
    if (block.thread_rank() < 16) {
        sum = cg::reduce(tile, part[block.thread_rank()], cg::plus<int>());
        if (tile.thread_rank() == 0) *y = sum;
    }
}"""
    (total,) = run(source, [NUMBERS, output(np.zeros(1, np.int32)), 1000], 256, arch)
    assert total[0] == NUMBERS.sum()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cub_reduces_and_scans_a_block(arch):
    source = """
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
extern "C" __global__ void kernel(const int* x, int* sum, int* scan) {
    using Reduce = cub::BlockReduce<int, 256>;
    using Scan = cub::BlockScan<int, 256>;
    __shared__ typename Reduce::TempStorage reduce;
    __shared__ typename Scan::TempStorage scratch;
    int mine = x[threadIdx.x], total = Reduce(reduce).Sum(mine), before;
    Scan(scratch).ExclusiveSum(mine, before);
    if (threadIdx.x == 0) *sum = total;
    scan[threadIdx.x] = before;
}"""
    x = NUMBERS[:256]
    fresh = [output(np.zeros(1, np.int32)), output(np.zeros(256, np.int32))]
    total, before = run(source, [x, *fresh], 256, arch)
    assert total[0] == x.sum()
    np.testing.assert_array_equal(before, np.cumsum(x) - x)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_intrinsics_round_once(arch):
    source = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void kernel(const half2* x, half2* y, __nv_bfloat16* z) {
    int i = threadIdx.x;
    half2 v = __hfma2(x[i], x[i], __float2half2_rn(0.5f));
    y[i] = __hmax2(v, __float2half2_rn(1.0f));
    z[i] = __float2bfloat16(__low2float(v)) + __float2bfloat16(1.0f);
}"""
    x = np.random.default_rng(1).normal(size=512).astype(np.float16)
    fresh = [output(np.zeros(512, np.float16)), output(np.zeros(256, np.uint16))]
    y, _ = run(source, [x, *fresh], 256, arch)
    exact = x.astype(np.float64) ** 2 + 0.5
    np.testing.assert_array_equal(y, np.maximum(exact.astype(np.float16), 1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_pipeline_primitives_copy(arch):
    source = """
#include <cuda_pipeline.h>
extern "C" __global__ void kernel(const float4* x, float4* y) {
    __shared__ float4 cell[64];
    __pipeline_memcpy_async(&cell[threadIdx.x], &x[threadIdx.x], 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    y[threadIdx.x] = cell[63 - threadIdx.x];
}"""
    x = np.arange(256, dtype=np.float32)
    (y,) = run(source, [x, output(np.zeros_like(x))], 64, arch)
    np.testing.assert_array_equal(y, x.reshape(64, 4)[::-1].ravel())
