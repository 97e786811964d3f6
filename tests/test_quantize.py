"""Codes and absmax against the float64 page and against bitsandbytes, byte for byte."""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BLOCK_SIZES, FLOATS, VIEWS
from torch import Tensor

import qlora_rs
from qlora_rs import _rust


def packed_bytes(packed: qlora_rs.PackedWeight) -> tuple[bytes, bytes]:
    return packed.codes.numpy().tobytes(), packed.absmax.numpy().tobytes()


def bitsandbytes_bytes(weight: Tensor, block_size: int) -> tuple[bytes, bytes]:
    codes, state = bitsandbytes.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=False
    )
    return codes.numpy().tobytes(), state.absmax.numpy().tobytes()


def assert_same_as_bitsandbytes(weight: Tensor, block_size: int) -> None:
    ours = packed_bytes(qlora_rs.quantize(weight, block_size, double_quant=False))
    assert ours == bitsandbytes_bytes(weight, block_size)


def test_the_levels_are_the_papers_table_and_its_construction() -> None:
    assert np.array_equal(np.array(_rust.levels()), reference.NF4)
    assert np.abs(reference.nf4_from_quantiles() - reference.NF4).max() < 2e-7


@given(strategies.weights(), strategies.block_sizes)
def test_every_code_is_the_nearest_level_unless_it_lies_at_a_tie(
    weight: Tensor, block_size: int
) -> None:
    packed = qlora_rs.quantize(weight, block_size, double_quant=False)
    codes = reference.unpack(packed.codes.numpy().reshape(-1), weight.numel())
    expected, distance_to_tie = reference.quantize(weight.double().numpy(), block_size)
    # Two float32 roundings of the scaled weight; a reciprocal below 2**-126 costs one bit more.
    clear = distance_to_tie > 2.0**-21
    assert np.array_equal(codes[clear], expected[clear])
    assert np.abs(codes.astype(int) - expected).max(initial=0) <= 1


@given(strategies.weights(), strategies.block_sizes)
def test_absmax_is_exactly_the_largest_magnitude(weight: Tensor, block_size: int) -> None:
    packed = qlora_rs.quantize(weight, block_size, double_quant=False)
    expected = reference.absmax(weight.double().numpy(), block_size).astype(np.float32)
    if weight.numel() % block_size:
        # The incomplete last block stores at least its smallest divisor.
        expected[-1] = max(expected[-1], np.float32(1e-38))
    assert np.array_equal(packed.absmax.numpy(), expected)


@given(strategies.weights(), strategies.block_sizes)
def test_codes_and_absmax_are_the_bytes_of_bitsandbytes(weight: Tensor, block_size: int) -> None:
    assert_same_as_bitsandbytes(weight, block_size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_large_matrices_with_tails_are_the_bytes_of_bitsandbytes(
    block_size: int, dtype: torch.dtype
) -> None:
    for columns in (block_size, block_size + 1, 1021):
        assert_same_as_bitsandbytes(torch.randn(129, columns).to(dtype), block_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_every_16_bit_pattern_is_packed_as_bitsandbytes_packs_it(
    dtype: torch.dtype, block_size: int
) -> None:
    patterns = strategies.every_16_bit_pattern(dtype)
    assert_same_as_bitsandbytes(patterns[None], block_size)
    # Each pattern as a small weight of its block, and each as its block's absmax.
    rows = torch.linspace(-1, 1, 32).to(dtype) * patterns[:, None]
    assert_same_as_bitsandbytes(strategies.finite(rows), 32)
    assert_same_as_bitsandbytes(patterns[torch.randperm(patterns.numel())][None], block_size)


@given(strategies.weights(dtype=torch.float32), strategies.block_sizes)
def test_a_decoded_matrix_packs_to_the_same_bytes(weight: Tensor, block_size: int) -> None:
    packed = qlora_rs.quantize(weight, block_size, double_quant=False)
    # Below 1e-38 a whole block is divided by 1e-38 and cannot come back: the one exception.
    if ((packed.absmax > 0) & (packed.absmax < 1e-38)).any():
        return
    again = qlora_rs.quantize(packed.dequantize(), block_size, double_quant=False)
    assert packed_bytes(again) == packed_bytes(packed)


@given(strategies.weights(), strategies.block_sizes, strategies.views)
def test_a_view_packs_to_the_bytes_of_its_contiguous_copy(
    weight: Tensor, block_size: int, view: str
) -> None:
    seen = VIEWS[view](weight)
    assert torch.equal(seen, weight)
    expected = packed_bytes(qlora_rs.quantize(weight.clone(), block_size, False))
    assert packed_bytes(qlora_rs.quantize(seen, block_size, False)) == expected


def test_an_expanded_row_packs_as_its_copies() -> None:
    expanded = torch.randn(1, 96).expand(7, 96)
    expected = packed_bytes(qlora_rs.quantize(expanded.contiguous(), 64, False))
    assert packed_bytes(qlora_rs.quantize(expanded, 64, False)) == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_zero_blocks_hold_code_7_and_decode_to_zero(block_size: int, dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.zeros(5, 4097, dtype=dtype), block_size, double_quant=False)
    assert (packed.codes == 0x77).all()
    assert (packed.dequantize() == 0).all()
    assert packed.absmax.max() <= 1e-38


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_an_empty_matrix_packs_to_nothing_and_back(shape: tuple, double_quant: bool) -> None:
    packed = qlora_rs.quantize(torch.zeros(shape), double_quant=double_quant)
    assert packed.codes.numel() == packed.absmax.numel() == 0
    assert packed.dequantize().shape == shape


@pytest.mark.parametrize("count", range(130))
def test_every_length_decodes_to_its_own_reference(count: int) -> None:
    weight = torch.randn(1, count)
    packed = qlora_rs.quantize(weight, 32, double_quant=False)
    decoded = reference.dequantize(packed.codes.numpy(), packed.absmax.numpy(), (1, count), 32)
    assert np.array_equal(packed.dequantize(torch.float64).numpy(), decoded)
    assert count % 2 == 0 or packed.codes[-1] & 15 == 7


@given(strategies.weights(), strategies.block_sizes, strategies.dtypes)
def test_decoding_is_level_times_absmax_rounded_to_the_output_type(
    weight: Tensor, block_size: int, dtype: torch.dtype
) -> None:
    packed = qlora_rs.quantize(weight, block_size, double_quant=False)
    exact = reference.dequantize(
        packed.codes.numpy(), packed.absmax.numpy(), tuple(weight.shape), block_size
    )
    assert torch.equal(packed.dequantize(dtype), torch.from_numpy(exact).float().to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [512, 511, 33])
def test_every_byte_decodes_to_its_two_levels(columns: int, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(columns)[:, None]
    absmax = torch.rand(512 * columns // 32)
    packed = qlora_rs.PackedWeight(
        codes, absmax, None, None, None, torch.Size((512, columns)), dtype, 32
    )
    exact = reference.dequantize(codes.numpy(), absmax.numpy(), (512, columns), 32)
    assert torch.equal(packed.dequantize(), torch.from_numpy(exact).float().to(dtype))


@given(strategies.weights(), strategies.block_sizes, st.booleans())
def test_quantizing_does_not_touch_its_input(
    weight: Tensor, block_size: int, double_quant: bool
) -> None:
    before = weight.clone()
    packed = qlora_rs.quantize(weight, block_size, double_quant)
    assert torch.equal(before, weight)
    packed.codes.fill_(0)
    assert torch.equal(before, weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bytes_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, torch_threads: object
) -> None:
    weight = torch.randn(513, 1023).to(dtype)
    seen = set()
    for threads in (1, 2, 3, 2, 1):
        torch_threads(threads)
        packed = qlora_rs.quantize(weight, 64)
        decoded = packed.dequantize(torch.float32).numpy().tobytes()
        seen.add((*packed_bytes(packed), packed.nested_absmax.numpy().tobytes(), decoded))
    assert len(seen) == 1


def test_a_quantized_meta_weight_has_the_right_sizes_and_no_data() -> None:
    packed = qlora_rs.quantize(torch.empty(33, 65, device="meta"))
    real = qlora_rs.quantize(torch.zeros(33, 65))
    assert packed.device.type == "meta"
    assert [t.shape for t in packed._tensors()] == [t.shape for t in real._tensors()]
    assert packed.dequantize().shape == (33, 65)


def test_a_packed_weight_shows_what_it_is_and_no_values() -> None:
    small = qlora_rs.quantize(torch.randn(96, 128))
    large = qlora_rs.quantize(torch.randn(2048, 2048), 128, double_quant=False)
    assert repr(small) == "PackedWeight([96, 128], block_size=64, double_quant=True, 7.4 KB, cpu)"
    assert (
        repr(large) == "PackedWeight([2048, 2048], block_size=128, double_quant=False, 2.2 MB, cpu)"
    )
