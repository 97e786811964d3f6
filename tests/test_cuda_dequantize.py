"""The PTX of dequantize_nf4.cu, run without a GPU, against the Rust path; products built on it."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import same_bytes
import strategies
import torch
from emulated_gpu import SCHEDULES, EmulatedGPU, module
from hypothesis import given
from hypothesis import strategies as st
from ptx_emulator import output, window
from strategies import BLOCK_SIZES, FLOATS
from torch import Tensor

import qlora_rs
from qlora_rs import QloraError, cpu, gpu, kernels
from qlora_rs.cpu import LowRank, Packed

schedules = st.sampled_from(SCHEDULES)
OUTPUTS = (*FLOATS, torch.float64)


# Equal bytes, but for the sign and payload of a NaN.
assert_same_bytes = functools.partial(same_bytes.assert_same_bytes, what="weights", any_nan=True)


def packed_of(weight: Tensor, block_size: int, double_quant: bool) -> Packed:
    return Packed(*qlora_rs.quantize(weight, block_size, double_quant).arguments())


@given(
    strategies.weights(),
    strategies.block_sizes,
    st.booleans(),
    st.sampled_from(OUTPUTS),
    schedules,
)
def test_every_byte_is_the_rust_paths(
    weight: Tensor, block_size: int, double_quant: bool, dtype: torch.dtype, schedule: str
) -> None:
    packed = packed_of(weight, block_size, double_quant)
    found = gpu.dequantize(packed, dtype, EmulatedGPU(schedule))
    assert_same_bytes(found, cpu.dequantize(packed, dtype))


@given(st.data(), st.sampled_from(FLOATS), schedules)
def test_any_codes_and_any_finite_statistics_decode_to_the_rust_paths_bytes(
    data: st.DataObject, dtype: torch.dtype, schedule: str
) -> None:
    rows, columns = data.draw(st.sampled_from(((1, 1), (3, 67), (31, 32), (9, 1500))))
    block_size = data.draw(strategies.block_sizes)
    count = rows * columns
    blocks = -(-count // block_size)
    generator = torch.Generator().manual_seed(data.draw(strategies.seeds))

    def random_bytes(length: int) -> Tensor:
        return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)

    def floats(length: int) -> Tensor:
        return data.draw(strategies.bit_patterns(torch.float32, length))

    codes = random_bytes((count + 1) // 2).reshape(-1, 1)
    nested = (floats(-(-blocks // 256)), floats(1).reshape(()), floats(256))
    packed = Packed(codes, random_bytes(blocks), *nested, rows, columns, block_size)
    found = gpu.dequantize(packed, dtype, EmulatedGPU(schedule))
    assert_same_bytes(found, cpu.dequantize(packed, dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_block_size_over_several_tiles_and_an_odd_tail(
    dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    packed = packed_of(torch.randn(33, 1111), block_size, double_quant)
    found = gpu.dequantize(packed, dtype, EmulatedGPU("random:1"))
    assert_same_bytes(found, cpu.dequantize(packed, dtype))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_order_of_warps_lanes_and_blocks_gives_the_same_bytes(schedule: str) -> None:
    packed = packed_of(torch.randn(131, 521), 32, True)
    found = gpu.dequantize(packed, torch.bfloat16, EmulatedGPU(schedule))
    assert_same_bytes(found, cpu.dequantize(packed, torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_length_of_the_last_tile(dtype: torch.dtype) -> None:
    for count in (*range(1, 67), *range(8185, 8200), *range(16380, 16390)):
        packed = packed_of(torch.randn(1, count), 64, True)
        found = gpu.dequantize(packed, dtype, EmulatedGPU())
        assert_same_bytes(found, cpu.dequantize(packed, dtype))


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_the_ptx_of_every_architecture(architecture: int) -> None:
    packed = packed_of(torch.randn(40, 130) * 1e-38, 64, True)
    for dtype in FLOATS:
        found = gpu.dequantize(packed, dtype, EmulatedGPU(architecture=architecture))
        assert_same_bytes(found, cpu.dequantize(packed, dtype))


@given(
    st.sampled_from((1, 2, 31, 64, 96, 130)), st.integers(0, 40), st.integers(0, 40), st.booleans()
)
def test_rows_from_any_that_begin_a_block(
    columns: int, first: int, length: int, double_quant: bool
) -> None:
    packed = packed_of(torch.randn(300, columns), 64, double_quant)
    step = gpu.row_step(packed)
    start = min(first * step, 300 // step * step)
    end = min(start + length, 300)
    found = gpu.dequantize_rows(packed, start, end, torch.float32, EmulatedGPU())
    assert_same_bytes(found, cpu.dequantize(packed, torch.float32)[start:end])


def test_a_matrix_without_elements_launches_nothing() -> None:
    device = EmulatedGPU()
    for shape in ((0, 64), (3, 0)):
        found = gpu.dequantize(packed_of(torch.zeros(shape), 64, True), torch.float16, device)
        assert found.shape == shape
    assert device.results == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"codes": torch.zeros(127, dtype=torch.uint8)},
            "codes of a 4 x 64 .* hold 128 .* got 127",
        ),
        ({"absmax": torch.zeros(3, dtype=torch.uint8)}, "absmax of .* hold 4 .* got 3"),
        ({"absmax": torch.zeros(4)}, "absmax of .* torch.uint8, got 4 of torch.float32"),
        ({"nested_absmax": torch.zeros(2)}, "nested_absmax of .* hold 1 .* got 2"),
        ({"nested_offset": None}, "nested_offset of .* got None"),
        ({"nested_map": torch.zeros(255)}, "nested_map of .* hold 256 .* got 255"),
        ({"nested_map": torch.zeros(256, device="meta")}, "nested_map is on meta but codes"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_any_launch(change: dict, sentence: str) -> None:
    device = EmulatedGPU()
    packed = packed_of(torch.randn(4, 64), 64, True)._replace(**change)
    with pytest.raises(QloraError, match=sentence):
        gpu.dequantize(packed, torch.float32, device)
    with pytest.raises(QloraError, match=sentence):
        gpu.linear(torch.zeros(1, 64), packed, None, device)
    assert device.results == []


# ---- sizes and counters --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sizes_beyond_32_bits(dtype: torch.dtype) -> None:
    # The last CTA of a piece that starts in the middle of a matrix of 2^42 weights.
    first, count = 1 << 41, (1 << 41) - 54_321
    launch = kernels.dequantize_nf4(count, dtype, 64, True)
    tile = int(dict(launch.constants)["TILE"])
    start = (launch.grid - 1) * tile
    packed = packed_of(torch.randn(1, count - start), 64, True)
    expected = cpu.dequantize(packed, dtype)
    bits = expected.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    at = first + start
    result = module(*launch[:2], 80).launch(
        launch.kernel,
        [
            window(packed.codes.numpy(), at // 2),
            window(packed.absmax.numpy(), at // 64),
            window(packed.nested_absmax.numpy(), at // (64 * 256) * 4),
            packed.nested_offset.numpy().reshape(1),
            packed.nested_map.numpy(),
            first,
            count,
            output(np.empty_like(bits), offset=start * dtype.itemsize),
        ],
        grid=launch.grid,
        block=launch.block,
        blocks=[launch.grid - 1],
    )
    assert result.arrays[0].tobytes() == bits.tobytes()


def counters(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> dict:
    device = EmulatedGPU()
    packed = packed_of(torch.randn(shape).to(dtype), 64, double_quant)
    gpu.dequantize(packed, dtype, device)
    return device.results[0].counters


def formula(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> int:
    """Bytes that any implementation must read and write."""
    count = shape[0] * shape[1]
    blocks = count // 64
    statistics = blocks + blocks // 256 * 4 + 1024 + 4 if double_quant else blocks * 4
    return count // 2 + statistics + count * dtype.itemsize


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_large_matrix_moves_its_bytes_once(dtype: torch.dtype, double_quant: bool) -> None:
    shape = (4096, 4096)
    found = counters(shape, dtype, double_quant)
    moved = found["global_bytes_read"] + found["global_bytes_written"]
    assert moved <= 1.02 * formula(shape, dtype, double_quant)
    assert found["global_sectors"] * 32 <= 1.02 * formula(shape, dtype, double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_whole_sectors_and_no_bank_conflicts(dtype: torch.dtype, double_quant: bool) -> None:
    found = counters((256, 1024), dtype, double_quant)
    assert found["global_sectors"] == found["global_sectors_unique"]
    assert found["global_sectors"] == found["global_sectors_ideal"]
    assert found["shared_wavefronts"] == found["shared_wavefronts_ideal"]


# ---- products ------------------------------------------------------------------------------------


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def always_by_chunks(patch: pytest.MonkeyPatch) -> None:
    """Also where a kernel would decode in registers."""
    patch.setattr(gpu, "_in_registers", lambda *_: None)
    patch.setattr(gpu, "CHUNK_ROWS", 1)


@given(strategies.products(), st.sampled_from((1 << 10, 1 << 13, gpu.CHUNK_BYTES)))
def test_products_by_chunks_are_the_dense_products(
    product: strategies.Product, chunk_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        always_by_chunks(patch)
        patch.setattr(gpu, "CHUNK_BYTES", chunk_bytes)
        packed = packed_of(product.weight, product.block_size, product.double_quant)
        x = product.x.reshape(-1, packed.in_features)
        y = gpu.linear(x, packed, product.bias, EmulatedGPU())
        grad_x = gpu.linear_backward(y, packed, EmulatedGPU())
    weight = cpu.dequantize(packed, torch.float64)
    bias = 0.0 if product.bias is None else product.bias.double()
    assert (y.shape, y.dtype) == ((x.shape[0], packed.out_features), x.dtype)
    assert (grad_x.shape, grad_x.dtype) == (x.shape, x.dtype)
    if x.numel():
        assert relative(y, x.double() @ weight.t() + bias) < TOLERANCE[x.dtype]
        assert relative(grad_x, y.double() @ weight) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_lora_products_agree_with_the_cpus(
    dtype: torch.dtype, factors: torch.dtype | None, needs_x: bool
) -> None:
    packed = packed_of(torch.randn(70, 130), 64, True)
    x, grad = torch.randn(9, 130).to(dtype), torch.randn(9, 70).to(dtype)
    a, b = (torch.randn(shape).to(factors or dtype) for shape in ((4, 130), (70, 4)))
    low_rank = LowRank(a, b, 0.5)
    y, hidden = gpu.lora_linear(x, packed, low_rank, None, EmulatedGPU())
    grads = gpu.lora_linear_backward(grad, x, hidden, packed, low_rank, needs_x, EmulatedGPU())
    expected_y, expected_hidden = cpu.lora_linear(x, packed, low_rank, None)
    expected = cpu.lora_linear_backward(grad, x, expected_hidden, packed, low_rank, needs_x)
    for ours, theirs in zip(
        (y, hidden, *grads), (expected_y, expected_hidden, *expected), strict=True
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if ours.numel():
            assert relative(ours, theirs.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("product", [gpu.linear, gpu.linear_backward])
def test_a_product_never_holds_more_than_a_chunk(
    product: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, chunks = [], []
    decode = gpu.dequantize_rows

    def watched(*arguments: object) -> Tensor:
        assert all(chunk() is None for chunk in chunks), "the chunk before is still there"
        decoded = decode(*arguments)
        chunks.append(weakref.ref(decoded))
        sizes.append(decoded.nbytes)
        return decoded

    monkeypatch.setattr(gpu, "dequantize_rows", watched)
    monkeypatch.setattr(gpu, "CHUNK_BYTES", 1 << 16)
    always_by_chunks(monkeypatch)
    packed = packed_of(torch.randn(1024, 256), 64, True)
    if product is gpu.linear:
        gpu.linear(torch.randn(2, 256), packed, None, EmulatedGPU())
    else:
        gpu.linear_backward(torch.randn(2, 1024), packed, EmulatedGPU())
    assert sizes == [1 << 16] * 16


@given(
    st.integers(0, 40000),
    st.sampled_from((1, 63, 576, 1536, 4096, 11008, 16384)),
    st.sampled_from((32, 64, 4096)),
    st.sampled_from(OUTPUTS),
)
def test_chunks_are_bounded_aligned_and_of_a_large_matrix_never_all(
    rows: int, columns: int, block_size: int, dtype: torch.dtype
) -> None:
    packed = cpu.Packed(*[torch.empty(0)] * 5, rows, columns, block_size)
    chunk = gpu.chunk_rows(packed, dtype)
    least = math.lcm(gpu.row_step(packed), gpu.CHUNK_ROWS)
    assert chunk % least == 0
    size = columns * {torch.float64: 8 + 4}.get(dtype, dtype.itemsize)
    assert min(chunk, rows) * size <= gpu.CHUNK_BYTES or chunk == least
    if rows * size > gpu.WHOLE_BYTES and rows > least:
        assert chunk < rows


@pytest.mark.parametrize("rows", [3, 9], ids=["few rows", "chunks"])
def test_autocast_does_not_change_what_a_product_computes_in(rows: int) -> None:
    packed = packed_of(torch.randn(64, 128), 64, True)
    low_rank = cpu.LowRank(torch.randn(4, 128), torch.randn(64, 4), 2.0)
    x, grad = torch.randn(rows, 128), torch.randn(rows, 64)
    expected = gpu.lora_linear(x, packed, low_rank, None, EmulatedGPU())
    gradients = (x, expected[1], packed, low_rank, True, EmulatedGPU())
    expected += gpu.lora_linear_backward(grad, *gradients)
    with torch.autocast("cpu", torch.bfloat16):
        found = gpu.lora_linear(x, packed, low_rank, None, EmulatedGPU())
        found += gpu.lora_linear_backward(grad, *gradients)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
