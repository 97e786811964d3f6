"""State spaces, narrow and vector accesses, generic addresses, atomics, calls, flow of control."""

# ruff: noqa: E501 (CUDA source reads best unwrapped)
from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Module, Refusal, compile_cuda, inout, output, window
from ptx_snippets import HEADER, bits

SCHEDULES = ["ascending", "descending", "ahead", "random:1"]


def run(body: str, *arguments, block=32, grid=1, arch="sm_80", prelude="", shared=0, **options):
    """Launch `body` as a kernel with int parameters a, b, c, ... and return its result."""
    names = "abcdef"[: len(arguments)]
    parameters = ", ".join(
        f"{'int' if isinstance(argument, int) else 'int*'} {name}"
        for name, argument in zip(names, arguments, strict=True)
    )
    source = f"""typedef unsigned u32; typedef unsigned long long u64;
{prelude}
extern "C" __global__ void kernel({parameters}) {{ int t = threadIdx.x; {body} }}"""
    module = Module(compile_cuda(source, arch))
    return module.launch("kernel", arguments, grid=grid, block=block, shared=shared, **options)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16"])
def test_narrow_loads_extend_by_their_sign_and_narrow_stores_keep_their_neighbours(kind):
    ptx = f"""{HEADER}
.visible .entry kernel(.param .b64 x, .param .b64 y, .param .b64 z) {{
    .reg .b32 %r<3>; .reg .b64 %rd<5>;
    ld.param.b64 %rd0, [x]; ld.param.b64 %rd1, [y]; ld.param.b64 %rd2, [z];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd3, %r0, {int(kind[1:]) // 8}, %rd0;
    ld.global.{kind} %r1, [%rd3];
    mad.wide.u32 %rd4, %r0, 4, %rd1;
    st.global.b32 [%rd4], %r1;
    mad.wide.u32 %rd4, %r0, {2 * int(kind[1:]) // 8}, %rd2;
    st.global.{kind} [%rd4], %r1;
    ret;
}}"""
    dtype = np.dtype({"u8": "u1", "s8": "i1", "u16": "u2", "s16": "i2"}[kind])
    x = np.random.default_rng(0).integers(0, 256, 32 * dtype.itemsize).astype(np.uint8).view(dtype)
    done = Module(ptx).launch(
        "kernel",
        [x, output(np.zeros(32, np.int32)), inout(np.full(64, 85, dtype))],
        grid=1,
        block=32,
    )
    wide, spread = done.arrays
    np.testing.assert_array_equal(wide, x.astype(np.int32))
    np.testing.assert_array_equal(spread[::2], x)
    assert (spread[1::2] == 85).all()


def test_vectors_of_every_width_are_moved():
    body = """
    ((int4*)b)[t] = ((const int4*)a)[t];
    ((long long*)b)[64 + t] = ((long long*)a)[64 + t];
    ((short2*)b)[192 + t] = ((short2*)a)[192 + t];
    """
    a = np.arange(224, dtype=np.int32)
    result = run(body, a, output(np.zeros(224, np.int32)))
    np.testing.assert_array_equal(result.arrays[0], a)
    assert result.counters["global_bytes_read"] == 4 * 224
    assert result.counters["global_sectors"] == result.counters["global_sectors_ideal"] == 2 * 28


def test_local_arrays_belong_to_their_thread_and_start_uninitialised():
    body = """
    volatile int own[8];
    for (int i = 0; i < b; i++) own[(i * 3) & 7] = 100 * t + i;
    int sum = 0;
    for (int i = 0; i < 8; i++) sum += own[i];
    a[t] = sum;
    """
    result = run(body, output(np.zeros(32, np.int32)), 8)
    np.testing.assert_array_equal(result.arrays[0], 800 * np.arange(32) + 28)
    with pytest.raises(Refusal, match=r"uninitialised.*never written"):
        run(body, output(np.zeros(32, np.int32)), 7)


def test_constants_device_variables_and_generic_addresses():
    prelude = """__constant__ int table[4] = {5, 6, 7, 8}; __device__ int total = 1;
    __device__ __noinline__ int read(const int* p, int i) { return p[i & 3]; }"""
    body = """
    __shared__ int near[4]; int own[4];
    if (t < 4) near[t] = 10 * t;
    for (int i = 0; i < 4; i++) own[i] = t + i;
    __syncthreads();
    const int* p = t % 3 == 0 ? near : t % 3 == 1 ? own : table;
    a[t] = read(p, t);
    atomicAdd(&total, t);
    """
    result = run(body, output(np.zeros(32, np.int32)), prelude=prelude)
    expected = [
        [10 * (t & 3), t + (t & 3), 5 + (t & 3)][t % 3] for t in range(32)
    ]  # shared, local, constant
    np.testing.assert_array_equal(result.arrays[0], expected)
    assert np.frombuffer(result.variables["total"], np.int32)[0] == 1 + 31 * 16
    body = """int* p = (int*)table; asm volatile("" : "+l"(p)); *p = 1; a[0] = 1;"""
    with pytest.raises(Refusal, match="read-only"):
        run(body, output(np.zeros(1, np.int32)), prelude=prelude)


ATOMICS = [
    ("atomicAdd(a, t)", 7, 7 + 496), ("atomicSub(a, t)", 0, -496), ("atomicMax(a, t * 3)", 5, 93),
    ("atomicMin(a, -t)", 5, -31), ("atomicAnd(a, ~t)", 255, 224), ("atomicOr(a, 1 << t)", 0, -1),
    ("atomicXor(a, 1 << t)", 0, -1), ("atomicInc((u32*)a, 9)", 0, 2), ("atomicDec((u32*)a, 9)", 0, 8),
    ("atomicMax((u32*)a, (u32)-t)", 5, -1), ("atomicAdd((float*)a, 0.5f)", 0, bits(16.0)),
    ("atomicExch(a, 3)", 0, 3), ("atomicCAS(a, 4, 9)", 4, 9),
]  # fmt: skip


@pytest.mark.parametrize(("code", "start", "expected"), ATOMICS)
@pytest.mark.parametrize("place", ["global", "shared"])
def test_atomics_of_all_lanes_add_up(code, start, expected, place):
    body = f"{code};"
    if place == "shared":
        body = f"""__shared__ int cell; if (t == 0) cell = *a; __syncthreads();
        {code.replace("a,", "&cell,", 1)}; __syncthreads(); if (t == 0) *a = cell;"""
        body = body.replace("(u32*)&cell", "(u32*)&cell").replace("(float*)&cell", "(float*)&cell")
    result = run(body, inout(np.array([start], np.int32)))
    assert result.arrays[0].view(np.uint32)[0] == expected % 2**32


@pytest.mark.parametrize("turns", range(66_000, 68_001, 250))
def test_a_block_may_end_at_any_time(turns):
    # Some of these end just as a block's slice of execution does.
    ptx = f"""{HEADER}.visible .entry kernel() {{ .reg .b32 %r; .reg .pred %p; mov.b32 %r, 0;
    again: add.u32 %r, %r, 1; setp.lt.u32 %p, %r, {turns}; @%p bra again; ret; }}"""
    result = Module(ptx).launch("kernel", [], grid=1, block=1)
    assert result.counters["warp_instructions"] == 3 * turns + 2


def test_other_blocks_see_all_eight_bytes_of_a_strong_store():
    body = """
    u64 seen, torn = 0;
    if (blockIdx.x == 0) for (int i = 0; i < 60000; i++)
        asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" :: "l"(a), "l"(i % 2 ? ~0ull : 0ull) : "memory");
    else for (int i = 0; i < 60000; i++) {
        asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(seen) : "l"(a) : "memory");
        torn += (u32)seen != (u32)(seen >> 32);
    }
    b[blockIdx.x] = torn;
    """
    arguments = inout(np.zeros(2, np.int32)), output(np.zeros(2, np.int32))
    assert (run(body, *arguments, grid=2, block=1).arrays[1] == 0).all()


def test_sums_in_global_memory_lose_subnormals_and_in_shared_memory_keep_them():
    tiny = np.array([3], np.int32)  # 3 * 2^-149
    add = "atomicAdd((float*)a, __int_as_float(2));"
    assert run(add, inout(tiny), block=1).arrays[0][0] == 0
    body = "__shared__ float cell; cell = ((float*)a)[0]; atomicAdd(&cell, __int_as_float(2)); *(float*)a = cell;"
    assert run(body, inout(tiny), block=1).arrays[0][0] == 5


UNFILLED = """
    __shared__ int part[32];
    if (t < 4) part[t] = t;
    __syncwarp();
    int sum = part[t];  // lanes from 4 on read what nothing has written
    for (int i = 1; i < 32; i *= 2) {
        int before = __shfl_up_sync(0xffffffffu, sum, i);
        if (t >= i) sum += before;
    }
    part[t] = sum;
    __syncwarp();
    if (t < SHOWN) a[t] = part[t];
"""


def test_unwritten_shared_memory_may_be_read_and_copied_but_never_decide_a_result():
    fresh = output(np.zeros(4, np.int32))
    found = run(UNFILLED.replace("SHOWN", "4"), fresh).arrays[0]
    np.testing.assert_array_equal(found, [0, 1, 3, 6])
    with pytest.raises(
        Refusal, match=r"uninitialised.*thread \(4, 0, 0\).*the value stored.*shared memory"
    ):
        run(UNFILLED.replace("SHOWN", "5"), output(np.zeros(8, np.int32)))


def test_a_matrix_loaded_from_unwritten_shared_memory_may_not_be_multiplied():
    body = """
    __shared__ __align__(16) u32 tile[128]; u32 f[4]; float d[4] = {0, 0, 0, 0};
    for (int i = t; i < FILLED; i += 32) tile[i] = 0x3c003c00;
    __syncwarp();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"((u32)__cvta_generic_to_shared(tile + 4 * t)));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(f[0]), "r"(f[1]), "r"(f[2]));
    a[t] = (int)d[0];
    """
    fresh = output(np.zeros(32, np.int32))
    # The fourth matrix is loaded and dropped, as the last turn of a pipeline does.
    assert (run(body.replace("FILLED", "96"), fresh).arrays[0] == 8).all()
    with pytest.raises(Refusal, match=r"uninitialised.*operand B.*`tile` \+ 368 in shared memory"):
        run(body.replace("FILLED", "95"), fresh)


def test_wide_atomics_and_reductions_over_many_blocks():
    body = "atomicAdd((u64*)a, 1ull << 33); atomicAdd((u64*)a + 1, (u64)t); atomicAdd(a + 4, 1);"
    result = run(body, inout(np.zeros(6, np.int32)), grid=50, block=64)
    high, low = result.arrays[0][:4].view(np.uint64)
    assert high == 3200 << 33
    assert low == 50 * 63 * 32
    assert result.arrays[0][4] == 3200


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lanes_that_part_meet_again(schedule):
    body = """
    int sum = 0;
    for (int i = 0; i < (t * 7) % 11; i++) {
        if (i % 3 == 1) continue;
        switch ((t + i) % 5) {
            case 0: sum += 1; break;
            case 1: sum += 10; break;
            case 2: sum += 100; break;
            case 3: sum -= 7; break;
            default: sum ^= 21;
        }
    }
    a[t] = sum + __popc(__ballot_sync(0xffffffffu, sum > 50)) * 1000;
    """
    expected = []
    for t in range(32):
        total = 0
        for i in range((t * 7) % 11):
            if i % 3 == 1:
                continue
            case = (t + i) % 5
            total = total ^ 21 if case == 4 else total + [1, 10, 100, -7][case]
        expected.append(total)
    voters = sum(total > 50 for total in expected)
    result = run(body, output(np.zeros(32, np.int32)), schedule=schedule)
    np.testing.assert_array_equal(result.arrays[0], np.array(expected) + 1000 * voters)
    assert result.counters["divergent_branches"] > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_shuffles_votes_and_matches(arch):
    body = """
    u32 full = 0xffffffffu;
    a[t] = __shfl_up_sync(full, t, 3) + 100 * __shfl_xor_sync(full, t, 5, 8)
        + 10000 * __shfl_sync(full, t, 9, 16);
    b[t] = __match_any_sync(full, t / 5) + (__all_sync(full, t < 32) ? 1 : 0) * 0;
    c[t] = __reduce_add_sync(full, t) + __any_sync(full, t == 7) + __activemask() * 0;
    int same; __match_all_sync(full, 4, &same); c[t] += same;
    """
    t = np.arange(32)
    fresh = [output(np.zeros(32, np.int32)) for _ in range(3)]
    a, b, c = run(body, *fresh, arch=arch).arrays
    up, butterfly, indexed = np.where(t < 3, t, t - 3), t ^ 5, t // 16 * 16 + 9
    np.testing.assert_array_equal(a, up + 100 * butterfly + 10000 * indexed)
    groups = [sum(1 << j for j in range(32) if j // 5 == i // 5) for i in range(32)]
    np.testing.assert_array_equal(b.view(np.uint32), groups)
    assert (c == 496 + 2).all()


def test_barriers_reduce_over_the_block():
    body = """
    a[t] = __syncthreads_count(t % 3 == 0) * 4 + __syncthreads_and(t < 96) * 2
        + __syncthreads_or(t == 50);
    """
    result = run(body, output(np.zeros(96, np.int32)), block=96)
    assert (result.arrays[0] == 32 * 4 + 3).all()


def test_acquire_and_release_order_shared_memory_between_warps():
    body = """
    __shared__ int data; __shared__ int flag;
    if (t == 0) flag = 0;
    __syncthreads();
    if (t == 0) {
        data = *b;
        asm volatile("st.release.cta.shared.b32 [%0], 1;" :: "r"((u32)__cvta_generic_to_shared(&flag)) : "memory");
    } else if (t == 32) {
        int seen;
        do asm volatile("ld.acquire.cta.shared.b32 %0, [%1];" : "=r"(seen)
            : "r"((u32)__cvta_generic_to_shared(&flag)) : "memory"); while (!seen);
        *a = data;
    }
    """
    fresh, forty_two = output(np.zeros(1, np.int32)), np.array([42], np.int32)
    for schedule in SCHEDULES:
        result = run(body, fresh, forty_two, block=64, schedule=schedule)
        assert result.arrays[0][0] == 42
    relaxed = body.replace("st.release.cta", "st.relaxed.cta")
    with pytest.raises(Refusal, match="race"):
        run(relaxed, fresh, forty_two, block=64)


def test_printing_is_ignored_and_a_failed_assertion_is_named():
    result = run('printf("%d\\n", t); a[t] = t;', output(np.zeros(32, np.int32)))
    assert result.arrays[0][31] == 31
    with pytest.raises(Refusal, match=r"trap.*thread \(7, 0, 0\)"):
        run('if (t == 7) asm volatile("trap;"); a[t] = t;', output(np.zeros(32, np.int32)))


def test_a_window_stands_where_it_should():
    data = np.arange(64, dtype=np.int32)
    far = 3 * 2**40
    body = "b[t] = *(int*)((char*)a + (3ull << 40) + 4 * t);"
    result = run(body, window(data, far), output(np.zeros(32, np.int32)))
    np.testing.assert_array_equal(result.arrays[0], data[:32])
    with pytest.raises(Refusal, match=r"out-of-bounds.*argument 0.*offset -12"):
        run(body.replace("+ 4 * t", "+ 4 * t - 12"), window(data, far), output(data[:32]))


def test_blocks_and_threads_know_their_place():
    body = """
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    a[block * 12 + thread] = block * 100 + thread;
    """
    for schedule in SCHEDULES:
        result = run(
            body,
            output(np.zeros(288, np.int32)),
            grid=(4, 3, 2),
            block=(2, 3, 2),
            schedule=schedule,
        )
        expected = 100 * np.arange(24)[:, None] + np.arange(12)
        np.testing.assert_array_equal(result.arrays[0], expected.ravel())


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("tex.2d.v4.f32.f32 {%f1, %f1, %f1, %f1}, [t, {%f1, %f1}];", "tex"),
        ("add.frobnicate.f32 %f1, %f1, %f1;", "add.frobnicate"),
        ("wgmma.fence.sync.aligned;", "wgmma"),
    ],
)
def test_an_unknown_instruction_is_refused_by_name(code, why):
    ptx = f"{HEADER}.visible .entry kernel() {{ .reg .f32 %f<3>;\n{code}\nret; }}"
    with pytest.raises(Refusal, match=f"unknown-instruction.*{why}"):
        Module(ptx).launch("kernel", [], grid=1, block=32)


def test_an_impossible_launch_is_refused_with_its_numbers():
    with pytest.raises(Refusal, match="1025 threads"):
        run("a[t] = t;", output(np.zeros(1025, np.int32)), block=1025)
    with pytest.raises(Refusal, match="shared memory"):
        run("extern __shared__ int s[]; a[t] = s[t];", output(np.zeros(32, np.int32)), shared=2**18)


def test_numbers_are_made_to_fit_their_parameters():
    source = """extern "C" __global__ void kernel(float* y, float f, double d, char c, long long n) {
        y[0] = f; y[1] = d; y[2] = c; y[3] = n; }"""
    module = Module(compile_cuda(source))
    values = [2, np.float64(0.5), -3, 2**40]
    result = module.launch("kernel", [output(np.zeros(4, np.float32)), *values], grid=1, block=1)
    np.testing.assert_array_equal(result.arrays[0], [2, 0.5, -3, 2**40])
    with pytest.raises(TypeError, match="is an integer"):
        module.launch("kernel", [output(np.zeros(4, np.float32)), 1, 1, 1.5, 1], grid=1, block=1)
