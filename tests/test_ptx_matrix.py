"""Tensor-core instructions: fragment layouts by one-hot matrices, sums against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from ptx_emulator import Module, output
from ptx_snippets import HEADER, rounded

LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4


def words(kind: str, matrix: np.ndarray) -> np.ndarray:
    """Bit patterns of a matrix's elements."""
    if kind == "f16":
        return matrix.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (matrix.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind == "tf32":
        return matrix.astype(np.float32).view(np.uint32)
    return matrix.astype(np.int8).view(np.uint8)


def pack(parts: np.ndarray) -> np.ndarray:
    """[lanes, registers, parts] -> [lanes, registers] words, lowest part first."""
    flat = np.ascontiguousarray(parts)
    return flat.view(np.uint8).reshape(32, parts.shape[1], 4).view(np.uint32)[..., 0]


def fragments(kind: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Registers of A [m, k] and B [k, n] in each lane, as the figures of the PTX ISA draw them.

    A register holds `per` neighbours along k. Registers of A step over rows first (+8), then over
    k.
    """
    per = {"tf32": 1, "f16": 2, "bf16": 2}.get(kind, 4)
    step = 4 * per
    m, k = a.shape
    a, b = words(kind, a), words(kind, b)
    along = THREAD[:, None] * per + np.arange(per)
    rows = range(0, m, 8)
    a_registers = [a[(GROUP + r)[:, None], along + c] for c in range(0, k, step) for r in rows]
    b_registers = [b[along + c, GROUP[:, None]] for c in range(0, k, step)]
    return pack(np.stack(a_registers, 1)), pack(np.stack(b_registers, 1))


def multiply(shape: str, kind: str, a, b, c, *, result="f32", **options) -> np.ndarray:
    """D = A B + C by one mma.sync; C and D are [m, 8]."""
    a_words, b_words = fragments(kind, a, b)
    m = a.shape[0]
    integer = kind in ("s8", "u8")
    dtype = np.int32 if integer else np.float32
    half = result == "f16"
    rows = np.stack([GROUP + r for r in range(0, m, 8)], 1)
    columns = (2 * THREAD)[:, None, None] + np.arange(2)
    c_parts = c[rows[..., None], columns]  # [32, m / 8, 2]
    if half:
        c_words = pack(c_parts.astype(np.float16))
    else:
        c_words = c_parts.astype(dtype).view(np.uint32).reshape(32, -1)
    na, nb, nc = a_words.shape[1], b_words.shape[1], c_words.shape[1]

    def names(prefix: str, count: int) -> str:
        return ", ".join(f"%{prefix}{i}" for i in range(count))

    def load(prefix: str, count: int) -> str:
        return f"""mad.wide.u32 %at, %lane, {4 * count}, 0; ld.param.b64 %base, [{prefix}];
            add.s64 %at, %at, %base;""" + " ".join(
            f"ld.global.b32 %{prefix}{i}, [%at+{4 * i}];" for i in range(count)
        )

    types = f"s32.{kind}.{kind}.s32" if integer else f"{result}.{kind}.{kind}.{result}"
    ptx = f"""{HEADER}
.visible .entry kernel(.param .b64 a, .param .b64 b, .param .b64 c, .param .b64 d) {{
    .reg .b32 %a<4>; .reg .b32 %b<4>; .reg .b32 %c<4>; .reg .b32 %d<4>; .reg .b32 %lane;
    .reg .b64 %at, %base;
    mov.u32 %lane, %tid.x;
    {load("a", na)} {load("b", nb)} {load("c", nc)}
    mma.sync.aligned.{shape}.row.col.{types}
        {{{names("d", nc)}}}, {{{names("a", na)}}}, {{{names("b", nb)}}}, {{{names("c", nc)}}};
    mad.wide.u32 %at, %lane, {4 * nc}, 0; ld.param.b64 %base, [d]; add.s64 %at, %at, %base;
    {" ".join(f"st.global.b32 [%at+{4 * i}], %d{i};" for i in range(nc))}
    ret;
}}"""
    done = Module(ptx).launch(
        "kernel",
        [a_words, b_words, c_words, output(np.zeros((32, nc), np.uint32))],
        grid=1,
        block=32,
        **options,
    )
    (d_words,) = done.arrays
    parts = d_words.view(np.float16) if half else d_words.view(dtype)
    d = np.zeros((m, 8), parts.dtype)
    d[rows[..., None], columns] = parts.reshape(32, m // 8, 2)
    return d


SHAPES = [
    ("m16n8k16", "f16", 16, 16), ("m16n8k16", "bf16", 16, 16), ("m16n8k8", "f16", 16, 8),
    ("m16n8k8", "bf16", 16, 8), ("m16n8k8", "tf32", 16, 8), ("m16n8k4", "tf32", 16, 4),
    ("m16n8k32", "s8", 16, 32), ("m16n8k32", "u8", 16, 32), ("m16n8k16", "s8", 16, 16),
    ("m8n8k16", "s8", 8, 16),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "kind", "m", "k"), SHAPES)
def test_every_element_of_a_fragment_has_its_place(shape, kind, m, k):
    # One-hot A against a B whose elements all differ: row i of D is row j of B, and nothing else.
    rng = np.random.default_rng(0)
    b = np.arange(8 * k).reshape(k, 8) % 127
    for i, j in {(int(rng.integers(m)), j) for j in range(k)} | {(i, i % k) for i in range(m)}:
        a = np.zeros((m, k))
        a[i, j] = 1
        expected = np.zeros((m, 8))
        expected[i] = b[j]
        np.testing.assert_array_equal(multiply(shape, kind, a, b, np.zeros((m, 8))), expected)


@pytest.mark.parametrize(("shape", "kind", "m", "k"), SHAPES)
def test_integers_are_summed_exactly_with_c(shape, kind, m, k):
    rng = np.random.default_rng(1)
    low = 0 if kind == "u8" else -8
    a, b = rng.integers(low, 9, (m, k)), rng.integers(low, 9, (k, 8))
    c = rng.integers(-100, 100, (m, 8))
    for model in ("exact", "sequential", "a100", "h100"):
        found = multiply(shape, kind, a, b, c, matrix_model=model)
        np.testing.assert_array_equal(found, a @ b + c)


def test_bytes_are_unsigned_when_the_type_says_so():
    a, b = np.full((16, 32), 255), np.full((32, 8), 255)
    found = multiply(
        "m16n8k32",
        "u8",
        a.astype(np.uint8).view(np.int8),
        b.astype(np.uint8).view(np.int8),
        np.zeros((16, 8)),
    )
    assert (found == 32 * 255 * 255).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_exact_model_rounds_the_exact_sum_once(kind):
    rng = np.random.default_rng(2)
    scale = 2.0 ** rng.integers(-14, 8, (16, 16))
    a = (rng.integers(-128, 128, (16, 16)) * scale).astype(np.float16).astype(np.float64)
    b = rng.integers(-128, 128, (16, 8)) * 2.0 ** rng.integers(-10, 8, (16, 8))
    if kind == "bf16":
        a = a * 2.0**40
    a = (words(kind, a).astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else a
    c = rng.normal(size=(16, 8)).astype(np.float32)
    found = multiply("m16n8k16", kind, a, b, c)
    for i in range(16):
        for j in range(8):
            total = sum(
                Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[i], b[:, j], strict=True)
            )
            total += Fraction(float(c[i, j]))
            assert int(found[i, j].view(np.uint32)) == rounded(total, "f32", "rn")


def test_half_accumulators_hold_two_to_a_register():
    rng = np.random.default_rng(3)
    a, b = rng.integers(-4, 5, (16, 16)), rng.integers(-4, 5, (16, 8))
    c = rng.integers(-4, 5, (16, 8))
    found = multiply("m16n8k16", "f16", a, b, c, result="f16")
    np.testing.assert_array_equal(found, (a @ b + c).astype(np.float16))


def test_the_truncating_models_differ_as_the_hardware_does():
    # 1 + four times 2^-25: A100 keeps one bit below the result and loses them, H100 keeps two.
    a = np.zeros((16, 16))
    a[:, :5] = 1
    b = np.zeros((16, 8))
    b[0], b[1:5] = 1, 2.0**-12
    a[:, 1:5] = 2.0**-13
    zero = np.zeros((16, 8))
    assert (multiply("m16n8k16", "f16", a, b, zero, matrix_model="a100") == 1).all()
    assert (multiply("m16n8k16", "f16", a, b, zero, matrix_model="h100") == 1 + 2.0**-23).all()
    assert (multiply("m16n8k16", "f16", a, b, zero, matrix_model="exact") == 1 + 2.0**-23).all()
    assert (multiply("m16n8k16", "f16", a, b, zero, matrix_model="sequential") == 1).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix_gives_each_lane_two_neighbours_of_a_row(count, transpose):
    trans = ".trans" if transpose else ""
    registers = ", ".join(f"%r{i}" for i in range(count))
    ptx = f"""{HEADER}
.visible .entry kernel(.param .b64 x, .param .b64 y) {{
    .shared .align 16 .b8 tile[512];
    .reg .b32 %r<4>; .reg .b32 %lane, %row, %base; .reg .b64 %at, %x, %y, %d<2>;
    mov.u32 %lane, %tid.x; mov.u32 %base, tile;
    ld.param.b64 %x, [x]; ld.param.b64 %y, [y];
    mad.wide.u32 %at, %lane, 16, %x;
    mad.lo.u32 %row, %lane, 16, %base;
    ld.global.v2.b64 {{%d0, %d1}}, [%at];
    st.shared.v2.b64 [%row], {{%d0, %d1}};
    bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%row];
    mad.wide.u32 %at, %lane, {4 * count}, %y;
    {" ".join(f"st.global.b32 [%at+{4 * i}], %r{i};" for i in range(count))}
    ret;
}}"""
    tile = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    run = Module(ptx).launch(
        "kernel", [tile, output(np.zeros((32, count, 2), np.uint16))], grid=1, block=32
    )
    for lane in range(32):
        for i in range(count):
            matrix = tile[i].T if transpose else tile[i]
            expected = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            np.testing.assert_array_equal(run.arrays[0][lane, i], expected)
    assert run.counters["shared_wavefronts"] == 4 + count  # four to fill, one per matrix


WMMA = """
#include <mma.h>
using namespace nvcuda::wmma;
extern "C" __global__ void kernel(const TYPE* a, const TYPE* b, float* d) {
    __shared__ __align__(32) TYPE tile[M * 24];
    for (int i = threadIdx.x; i < M * 16; i += 32) tile[i / 16 * 24 + i % 16] = a[i];
    __syncwarp();
    fragment<matrix_a, M, N, 16, TYPE, row_major> fa;
    fragment<matrix_b, M, N, 16, TYPE, col_major> fb;
    fragment<accumulator, M, N, 16, float> acc;
    fill_fragment(acc, 1.0f);
    load_matrix_sync(fa, tile, 24);
    load_matrix_sync(fb, b, 16);
    mma_sync(acc, fa, fb, acc);
    for (int i = 0; i < acc.num_elements; i++) acc.x[i] *= 2;
    store_matrix_sync(d, acc, M, mem_col_major);
}"""


@pytest.mark.parametrize("sizes", [(16, 16), (32, 8), (8, 32)])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wmma_of_cudas_own_header(sizes, kind):
    from ptx_emulator import compile_cuda

    m, n = sizes
    name = "half" if kind == "f16" else "__nv_bfloat16"
    source = "#include <cuda_bf16.h>\n" + WMMA
    module = Module(
        compile_cuda(source, "sm_80", [f"-DM={m}", f"-DN={n}", f"-DTYPE={name}"], headers=True)
    )
    rng = np.random.default_rng(4)
    a, b = rng.integers(-4, 5, (m, 16)), rng.integers(-4, 5, (n, 16))
    operands = [words(kind, a), words(kind, b), output(np.zeros((n, m), np.float32))]
    run = module.launch("kernel", operands, grid=1, block=32)
    np.testing.assert_array_equal(run.arrays[0].T, 2 * (a @ b.T + 1))
