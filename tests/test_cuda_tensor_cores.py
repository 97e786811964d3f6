"""cuda/tensor_cores_nf4.cu without a GPU: products of tens of rows, and what may not show.

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
from torch import Tensor

from qlora_rs import cpu, gpu, kernels
from qlora_rs.cpu import LowRank, Packed

DTYPES = (torch.bfloat16, torch.float16)
# Levels are rounded to x's type: what products may be off by for that, of the root of their
# terms' squares. Half as much again as the worst of 240 random ones.
OF_TERMS = {torch.float16: 1.5 * 2.0**-10, torch.bfloat16: 1.5 * 2.0**-8}
MODELS = ("exact", "sequential", "a100", "h100")


def product(x: Tensor, packed: Packed, device: EmulatedGPU | None = None) -> Tensor:
    device = device or EmulatedGPU()
    y = gpu.linear(x, packed, None, device)
    assert device.kernels == ["tensor_cores_nf4"]
    return y


@given(
    rows=st.sampled_from((3, 8, 9, 16, 17, 32, 33, 70, 128)),
    features=st.integers(1, 70),
    blocks=st.integers(1, 9),
    block_size=st.sampled_from((64, 128, 512, 4096)),
    rank=st.sampled_from((0, 1, 5, 16, 40, 129, 150)),
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
    with_bias=st.booleans(),
    matrix_model=st.sampled_from(MODELS),
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
    matrix_model: str,
) -> None:
    columns = min(blocks, 2) * block_size if block_size == 4096 else blocks * block_size
    packed = packed_of(features, columns, block_size, double_quant)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(features).to(dtype)
    device = EmulatedGPU(matrix_model=matrix_model)
    low_rank = random_factors(packed, rank)
    assert_product(device, x, packed, low_rank, bias if with_bias else None, OF_TERMS[dtype])
    assert device.kernels == ["tensor_cores_nf4"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_no_larger_than_those_of_a_decoded_weight(
    dtype: torch.dtype, model: str
) -> None:
    packed, x = packed_of(64, 2048), torch.randn(32, 2048).to(dtype)
    exact = x.double() @ cpu.dequantize(packed, torch.float64).t()
    found = product(x, packed, EmulatedGPU(matrix_model=model)).double()
    # A product of the weight in x's type, with exact sums, rounded once.
    decoded = (x.double() @ cpu.dequantize(packed, dtype).double().t()).to(dtype).double()
    assert float((found - exact).norm()) <= 1.02 * float((decoded - exact).norm())


def test_no_order_of_warps_lanes_and_blocks_shows() -> None:
    packed, x = packed_of(37, 576), torch.randn(19, 576).bfloat16()
    low_rank = LowRank(torch.randn(16, 576), torch.randn(37, 16), 2.0)
    results = [
        gpu.lora_linear(x, packed, low_rank, None, EmulatedGPU(schedule))[0]
        for schedule in SCHEDULES
    ]
    for found in results[1:]:
        assert_same_bytes(found, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bytes_whatever_rows_are_beside_it(dtype: torch.dtype) -> None:
    packed, x = packed_of(35, 2368), torch.randn(128, 2368).to(dtype)
    together = product(x, packed)
    for count in (3, 8, 9, 16, 31, 32, 33, 65):
        assert_same_bytes(product(x[:count], packed), together[:count])


@pytest.mark.parametrize("rows", [3, 8, 9, 31, 33, 100, 128])
@pytest.mark.parametrize("features", [1, 16, 17, 33, 95])
def test_a_launch_computes_every_row_and_feature(rows: int, features: int) -> None:
    # The emulator refuses a launch that leaves a byte of y unwritten.
    assert product(torch.randn(rows, 64).half(), packed_of(features, 64)).shape == (rows, features)


def test_all_tiles_have_as_many_warps() -> None:
    # Else rows would be summed in other orders beside other numbers of rows.
    assert len({warps for _, _, warps, *_ in kernels.TENSOR_CORES_TILES.values()}) == 1


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "dtype", "kernel"),
    [
        (2, 128, 64, torch.bfloat16, "few_rows_nf4"),
        (3, 128, 32, torch.bfloat16, "few_rows_nf4"),
        (3, 128, 64, torch.float32, "few_rows_nf4"),
        (129, 128, 64, torch.bfloat16, "dequantize_nf4"),
        (9, 96, 32, torch.bfloat16, "dequantize_nf4"),
        (9, 100, 64, torch.bfloat16, "dequantize_nf4"),
    ],
)
def test_what_does_not_suit_goes_another_way(
    rows: int, columns: int, block_size: int, dtype: torch.dtype, kernel: str
) -> None:
    device = EmulatedGPU()
    gpu.linear(
        torch.randn(rows, columns).to(dtype), packed_of(6, columns, block_size), None, device
    )
    assert device.kernels == [kernel]


@pytest.mark.parametrize(
    ("features", "columns", "rank", "suits"),
    [
        ((1 << 26) - 1, 64, 0, True),
        (1 << 26, 64, 0, False),
        (8, (1 << 25) - 64, 0, True),
        (8, 1 << 25, 0, False),
        (1 << 25, 64, 128, False),
    ],
)
def test_sizes_beyond_32_bits_go_another_way(
    features: int, columns: int, rank: int, suits: bool
) -> None:
    packed = packed_of(6, 128)._replace(out_features=features, in_features=columns)
    x = torch.empty(128, columns, device="meta", dtype=torch.bfloat16)
    assert (gpu._in_registers(x, packed, rank) is not None) == suits


def test_what_is_infinite_in_the_last_columns_is_so_in_the_result() -> None:
    # Nine chunks, of which 17 rows take two in a turn: the last one is multiplied once too often.
    packed, x = packed_of(16, 576), torch.randn(17, 576).bfloat16()
    x[1, 575] = float("inf")
    exact = x.double() @ cpu.dequantize(packed, torch.float64).t()
    found = product(x, packed).double()
    # Each as large as a number can be.
    assert torch.equal(found[1].nan_to_num(), exact[1].nan_to_num())
    assert bool(found[[0, *range(2, 17)]].isfinite().all())


def test_operands_at_odd_addresses_are_copied() -> None:
    packed = packed_of(5, 128)
    storage = torch.randn(3 * 128 + 1).bfloat16()
    x = storage[1:].view(3, 128)
    codes = torch.zeros(packed.codes.numel() + 4, dtype=torch.uint8)[4:]
    moved = packed._replace(codes=codes.copy_(packed.codes.flatten()))
    assert moved.codes.data_ptr() % 8 == 4
    assert_same_bytes(product(x, moved), product(x.clone(), packed))


def test_factors_that_are_views_are_read_as_what_they_mean() -> None:
    packed, x = packed_of(6, 128), torch.randn(3, 128).half()
    lora_a, lora_b = torch.randn(3, 128).half(), torch.randn(6, 3).half()
    expected, _ = gpu.lora_linear(x, packed, LowRank(lora_a, -lora_b, 0.5), None, EmulatedGPU())
    for view in (torch._neg_view(lora_b), (-lora_b).t().contiguous().t()):
        found, _ = gpu.lora_linear(x, packed, LowRank(lora_a, view, 0.5), None, EmulatedGPU())
        assert_same_bytes(found, expected)
