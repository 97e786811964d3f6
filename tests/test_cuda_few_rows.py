"""cuda/few_rows_nf4.cu without a GPU: products of few rows against float64, and what may not show.

Planted bugs are in `test_cuda_mutants.py`.
"""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import SCHEDULES, EmulatedGPU
from gpu_products import assert_product, packed_of, random_factors
from hypothesis import given
from hypothesis import strategies as st
from same_bytes import assert_same_bytes
from strategies import FLOATS
from torch import Tensor

from qlora_rs import gpu
from qlora_rs.cpu import LowRank

# Weights and sums are float32 whatever x is: what products may be off by, of the root of their
# terms' squares. Twice the worst of 400 random ones.
OF_TERMS = 2.0**-20


@given(
    rows=st.integers(1, 8),
    features=st.integers(1, 70),
    blocks=st.integers(1, 9),
    block_size=st.sampled_from((32, 64, 128, 512)),
    rank=st.sampled_from((0, 1, 5, 32, 40)),
    dtype=st.sampled_from(FLOATS),
    double_quant=st.booleans(),
    with_bias=st.booleans(),
)
def test_products_are_those_of_float64(
    rows: int,
    features: int,
    blocks: int,
    block_size: int,
    rank: int,
    dtype: torch.dtype,
    double_quant: bool,
    with_bias: bool,
) -> None:
    if dtype.itemsize == 2 and block_size >= 64:
        rows = min(rows, 2)  # more go to the tensor cores
    columns = blocks * block_size
    packed = packed_of(features, columns, block_size, double_quant)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(features).to(dtype)
    device = EmulatedGPU()
    low_rank = random_factors(packed, rank)
    assert_product(device, x, packed, low_rank, bias if with_bias else None, OF_TERMS)
    assert device.kernels == ["few_rows_nf4"]


def test_no_order_of_warps_lanes_and_blocks_shows() -> None:
    packed, x = packed_of(37, 576), torch.randn(5, 576)
    low_rank = LowRank(torch.randn(16, 576), torch.randn(37, 16), 2.0)
    results = [
        gpu.lora_linear(x, packed, low_rank, None, EmulatedGPU(schedule))[0]
        for schedule in SCHEDULES
    ]
    for found in results[1:]:
        assert_same_bytes(found, results[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_has_the_same_bytes_whatever_rows_are_beside_it(dtype: torch.dtype) -> None:
    # In blocks of 32, which no tensor core multiplies.
    packed, x = packed_of(19, 320, 32), torch.randn(8, 320).to(dtype)
    together = gpu.linear(x, packed, None, EmulatedGPU())
    for count in range(1, 8):
        found = gpu.linear(x[:count], packed, None, EmulatedGPU())
        assert_same_bytes(found, together[:count])


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(9, 128, torch.float32), (2, 100, torch.float32), (2, 128, torch.float64)],
    ids=["many rows", "blocks across rows", "float64"],
)
def test_what_does_not_suit_is_decoded_by_chunks(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    packed, device = packed_of(6, columns), EmulatedGPU()
    gpu.linear(torch.randn(rows, columns, dtype=dtype), packed, None, device)
    assert device.kernels == ["dequantize_nf4"]


@pytest.mark.parametrize(
    ("features", "columns", "suits"),
    [
        ((1 << 31) - 1, 64, True),
        (1 << 31, 64, False),
        (8, (1 << 28) - 64, True),
        (8, 1 << 28, False),
    ],
)
def test_sizes_beyond_32_bits_are_decoded_by_chunks(
    features: int, columns: int, suits: bool
) -> None:
    packed = packed_of(6, 128)._replace(out_features=features, in_features=columns)
    launch = gpu._in_registers(torch.empty(2, columns, device="meta"), packed)
    assert (launch is not None) == suits


@pytest.mark.parametrize("shape", [(0, 128), (2, 0)], ids=["no rows", "no columns"])
def test_empty_products(shape: tuple[int, int]) -> None:
    bias = torch.randn(6)
    found = gpu.linear(torch.randn(shape), packed_of(6, shape[1]), bias, EmulatedGPU())
    assert torch.equal(found, bias.expand(shape[0], 6))


def test_x_at_an_odd_address_is_copied() -> None:
    packed = packed_of(5, 128)
    storage = torch.randn(2 * 128 + 1)
    x: Tensor = storage[1:].view(2, 128)
    aligned = gpu.linear(x.clone(), packed, None, EmulatedGPU())
    assert_same_bytes(gpu.linear(x, packed, None, EmulatedGPU()), aligned)


def test_factors_that_are_views_are_read_as_what_they_mean() -> None:
    packed, x = packed_of(6, 128), torch.randn(2, 128)
    lora_a, lora_b = torch.randn(3, 128), torch.randn(6, 3)
    expected, _ = gpu.lora_linear(x, packed, LowRank(lora_a, -lora_b, 0.5), None, EmulatedGPU())
    for view in (torch._neg_view(lora_b), (-lora_b).t().contiguous().t()):
        found, _ = gpu.lora_linear(x, packed, LowRank(lora_a, view, 0.5), None, EmulatedGPU())
        assert_same_bytes(found, expected)
