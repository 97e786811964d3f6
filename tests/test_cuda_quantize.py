"""The PTX of quantize_nf4.cu and double_quantize.cu, run without a GPU, against the Rust path."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import reference
import strategies
import torch
from emulated_gpu import SCHEDULES, EmulatedGPU, module, sums_of_mantissas
from hypothesis import assume, given
from hypothesis import strategies as st
from ptx_emulator import inout, output, window
from same_bytes import assert_same_bytes
from strategies import BLOCK_SIZES, FLOATS
from torch import Tensor

from qlora_rs import QloraError, cpu, gpu, kernels

schedules = st.sampled_from(SCHEDULES)
PARTS = ("codes", "absmax", "nested_absmax", "nested_offset")


def assert_cpu_bytes(
    weight: Tensor, block_size: int, double_quant: bool, device: EmulatedGPU
) -> None:
    found = gpu.quantize(weight, block_size, double_quant, device)
    expected = cpu.quantize(weight.contiguous(), block_size, double_quant)
    for name, ours, theirs in zip(PARTS, found, expected, strict=True):
        assert_same_bytes(ours, theirs, name)


@given(strategies.weights(), strategies.block_sizes, st.booleans(), schedules)
def test_every_byte_is_the_rust_paths(
    weight: Tensor, block_size: int, double_quant: bool, schedule: str
) -> None:
    assert_cpu_bytes(weight, block_size, double_quant, EmulatedGPU(schedule))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_block_size_over_many_blocks_and_an_odd_tail(
    dtype: torch.dtype, block_size: int
) -> None:
    weight = (torch.randn(33, 1111) * 10.0 ** torch.randint(-3, 3, (33, 1))).to(dtype)
    assert_cpu_bytes(weight, block_size, True, EmulatedGPU("random:1"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_order_of_warps_lanes_and_blocks_gives_the_same_bytes(schedule: str) -> None:
    weight = torch.randn(131, 521)
    assert_cpu_bytes(weight, 32, True, EmulatedGPU(schedule))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_length_of_the_last_block(dtype: torch.dtype) -> None:
    for count in (*range(1, 67), *range(126, 131), *range(2047, 2050), *range(8190, 8196)):
        assert_cpu_bytes(torch.randn(1, count).to(dtype), 64, True, EmulatedGPU())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_a_16_bit_type(dtype: torch.dtype) -> None:
    values = strategies.every_16_bit_pattern(dtype)
    for order in (torch.arange(values.numel()), torch.randperm(values.numel())):
        assert_cpu_bytes(values[order][None], 64, True, EmulatedGPU())


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -1, 0, 1, 100, 126, 127])
def test_all_decision_boundaries_and_their_neighbours_at_any_scale(exponent: int) -> None:
    ties = ((reference.NF4[:-1] + reference.NF4[1:]) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    scaled = np.concatenate([[1.0], ties, *near]).astype(np.float64)
    for factor in (1.0, 1.2345678, 1.9999999):
        block = np.resize((scaled * factor * 2.0**exponent).astype(np.float32), (2, 64))
        assert_cpu_bytes(torch.from_numpy(block), 64, True, EmulatedGPU())
        assert_cpu_bytes(torch.from_numpy(block[:, :47].copy()), 64, True, EmulatedGPU())


def test_zero_blocks_of_both_signs_pack_as_on_the_cpu() -> None:
    weight = torch.zeros(5, 63)
    weight[1::2] = -0.0
    assert_cpu_bytes(weight, 32, True, EmulatedGPU())
    assert_cpu_bytes(weight, 32, False, EmulatedGPU())


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_the_ptx_of_every_architecture(architecture: int) -> None:
    for dtype in FLOATS:
        weight = (torch.randn(40, 130) * 1e-39).to(dtype)
        assert_cpu_bytes(weight, 64, True, EmulatedGPU(architecture=architecture))


def test_a_matrix_without_elements_launches_nothing() -> None:
    device = EmulatedGPU()
    assert_cpu_bytes(torch.zeros(0, 64), 64, True, device)
    assert_cpu_bytes(torch.zeros(3, 0), 64, False, device)
    assert device.results == []


@pytest.mark.parametrize("name", sorted(strategies.VIEWS))
def test_any_view_gives_the_same_bytes_and_is_not_modified(name: str) -> None:
    weight = torch.randn(19, 77)
    view = strategies.VIEWS[name](weight.clone())
    before = view.detach().clone()
    assert_cpu_bytes(view.detach().resolve_neg(), 64, True, EmulatedGPU())
    assert torch.equal(view.detach(), before)


def test_vectors_start_at_aligned_addresses() -> None:
    for offset in range(1, 9):
        view = torch.randn(99).to(torch.bfloat16)[offset:]
        assert gpu._aligned(view, 16).data_ptr() % 16 == 0
        assert torch.equal(gpu._aligned(view, 16), view)


# ---- refusals ------------------------------------------------------------------------------------


@given(
    st.sampled_from(FLOATS),
    st.lists(
        st.tuples(st.integers(0, 999), st.sampled_from((np.nan, np.inf, -np.inf))), min_size=1
    ),
    strategies.block_sizes,
    st.booleans(),
)
def test_bad_weights_are_refused_with_the_cpus_sentence(
    dtype: torch.dtype, bad: list[tuple[int, float]], block_size: int, double_quant: bool
) -> None:
    weight = torch.randn(1, 1000)
    for position, value in bad:
        weight[0, position] = value
    weight = weight.to(dtype)
    with pytest.raises(QloraError) as expected:
        cpu.quantize(weight, block_size, double_quant)
    with pytest.raises(QloraError) as found:
        gpu.quantize(weight, block_size, double_quant, EmulatedGPU())
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("double_quant", [False, True])
def test_in_a_graph_that_refuses_nothing_a_bad_weight_never_decodes_to_numbers(
    monkeypatch: pytest.MonkeyPatch, double_quant: bool
) -> None:
    monkeypatch.setattr(gpu, "_is_capturing", lambda tensor: True)
    weight = torch.randn(3, 200)
    weight[1, 100] = float("nan")
    weight[2, 199] = float("inf")
    codes, absmax, *nested = gpu.quantize(weight, 64, double_quant, EmulatedGPU())
    parts = (*nested, torch.linspace(-1, 1, 256)) if double_quant else (None, None, None)
    packed = cpu.Packed(codes, absmax, *parts, 3, 200, 64)
    decoded = gpu.dequantize(packed, torch.float32, EmulatedGPU()).flatten()
    blocks = [decoded] if double_quant else [decoded[256:320], decoded[576:600]]
    assert all(not block.isfinite().any() for block in blocks)


# ---- double quantization -------------------------------------------------------------------------


@given(
    st.one_of(
        st.lists(st.integers(0, 0x7F7FFFFF), min_size=1, max_size=9),
        st.lists(st.integers(0x3F000000, 0x3F800100), min_size=1, max_size=600),
        st.lists(st.integers(0, 300), min_size=1, max_size=300),
    ),
    schedules,
)
def test_double_quantization_of_any_magnitudes_is_the_rust_paths(
    bits: list[int], schedule: str
) -> None:
    absmax = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    sums = torch.from_numpy(sums_of_mantissas(absmax.numpy()))
    refused = torch.zeros(2, dtype=torch.int64)
    groups = -(-len(bits) // 256)
    found = torch.empty(len(bits), dtype=torch.uint8), torch.empty(groups), torch.empty(())
    launch = kernels.double_quantize(len(bits))
    EmulatedGPU(schedule)(launch, absmax, len(bits), refused, sums, *found)
    codes, nested = torch.empty(len(bits), dtype=torch.uint8), torch.empty(groups)
    capsules = map(torch.utils.dlpack.to_dlpack, (absmax, codes, nested))
    offset = cpu._rust.double_quantize(*capsules, 1)
    for ours, theirs in zip(found, (codes, nested, torch.tensor(offset)), strict=True):
        assert_same_bytes(ours, theirs)


@given(
    st.lists(st.integers(0, 1 << 62), min_size=254, max_size=254),
    st.integers(0, 253),
    st.integers(1, 254),
    st.sampled_from((1, 2, 3, 7, 1 << 20, (1 << 32) - 1)),
)
def test_the_mean_of_any_sums_and_counts_is_rounded_once(
    numbers: list[int], first: int, length: int, blocks: int
) -> None:
    # As many bins as may be, each as full as `blocks` mantissas of 24 bits can make it.
    inside = range(first, first + length)
    sums = [n % (blocks << 24) if i in inside else 0 for i, n in enumerate(numbers)]
    mean = sum(Fraction(n) * 2**i for i, n in enumerate(sums)) * Fraction(2) ** -149 / blocks
    assume(mean <= Fraction(float(np.finfo(np.float32).max)))
    launch = kernels.double_quantize(blocks)
    # The first CTA computes the mean as every CTA does; its absmax play no part in that.
    width = min(blocks, 2048)
    inputs = [np.zeros(width, np.float32), blocks, np.zeros(2, np.int64), np.array(sums, np.int64)]
    outputs = [np.empty(width, np.uint8), np.empty(8, np.float32), np.empty(1, np.float32)]
    result = module(*launch[:2], 80).launch(
        launch.kernel,
        [*inputs, *map(output, outputs)],
        grid=launch.grid,
        block=launch.block,
        blocks=[0],
    )
    assert result.arrays[2][0] == reference.nearest_float32(mean)


# ---- sizes and counters --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sizes_beyond_32_bits(dtype: torch.dtype) -> None:
    count = (1 << 43) - 12_345 if dtype != torch.float32 else (1 << 42) - 12_345
    launch = kernels.quantize_nf4(count, dtype, 64, True)
    per_cta = int(dict(launch.constants)["BLOCKS_PER_CTA"]) * 64
    start = (launch.grid - 1) * per_cta
    weight = torch.randn(1, count - start).to(dtype)
    raw = weight.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy().reshape(-1)
    codes, absmax, *_ = cpu.quantize(weight, 64, False)
    result = module(*launch[:2], 80).launch(
        launch.kernel,
        [
            window(raw, start * dtype.itemsize),
            count,
            output(np.empty(codes.numel(), np.uint8), offset=start // 2),
            output(np.empty(absmax.numel(), np.float32), offset=start // 64 * 4),
            inout(np.zeros(2, np.int64)),
            inout(np.zeros(254, np.int64)),
        ],
        grid=launch.grid,
        block=launch.block,
        blocks=[launch.grid - 1],
    )
    assert result.arrays[0].tobytes() == codes.numpy().tobytes()
    assert result.arrays[1].tobytes() == absmax.numpy().tobytes()
    assert np.array_equal(result.arrays[3], sums_of_mantissas(absmax.numpy()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_moves_its_bytes_once_in_whole_sectors_without_bank_conflicts(
    dtype: torch.dtype,
) -> None:
    count, device = 1 << 20, EmulatedGPU()
    gpu.quantize(torch.randn(1024, 1024).to(dtype), 64, True, device)
    counters = device.results[0].counters
    formula = count * dtype.itemsize + count // 2 + count // 64 * 4
    assert counters["global_bytes_read"] + counters["global_bytes_written"] <= 1.02 * formula
    assert counters["global_sectors"] == counters["global_sectors_ideal"]
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_ideal"]
