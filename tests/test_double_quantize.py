"""Double quantization: the map, the offset, the nearest 8-bit codes, and the way back."""

from __future__ import annotations

import json

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qlora_rs
from qlora_rs import _rust


def both(weight: Tensor, block_size: int) -> tuple[np.ndarray, qlora_rs.PackedWeight]:
    """The absmax before double quantization, and the double-quantized weight."""
    single = qlora_rs.quantize(weight, block_size, double_quant=False)
    return single.absmax.numpy(), qlora_rs.quantize(weight, block_size, double_quant=True)


def scaled(absmax: np.ndarray, nested: qlora_rs.PackedWeight) -> np.ndarray:
    """What the 8-bit code stands for: (absmax - offset) / nested_absmax, in float32 steps."""
    centred = absmax - nested.nested_offset.numpy()
    largest = np.repeat(nested.nested_absmax.numpy(), 256)[: absmax.size]
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / np.maximum(largest, np.float32(2.0**-126))
    return np.clip(centred * np.where(largest > 0, inverse, 0), -1, 1).astype(np.float64)


def test_the_dynamic_map_is_the_papers_construction() -> None:
    ours = np.array(_rust.dynamic_map())
    assert np.abs(ours - reference.dynamic_map()).max() < 6e-8
    assert (ours[127], ours[255]) == (0.0, 1.0)


def test_the_dynamic_map_is_bitsandbytes_own_in_all_256_values(run_python) -> None:
    # torch.linspace rounds differently by CPU capability; its AVX path fuses multiply and add.
    code = """
        import torch, bitsandbytes.functional as f
        bits = f.create_dynamic_map().view(torch.int32).tolist()
        print(torch.backends.cpu.get_cpu_capability(), bits)
    """
    done = run_python(code)
    capability, _, bits = done.stdout.partition(" ")
    ours = torch.tensor(_rust.dynamic_map(), dtype=torch.float32)
    if capability.startswith("AVX"):
        assert ours.view(torch.int32).tolist() == json.loads(bits)
    else:  # rounded twice, numbers up to one come out as their neighbours
        theirs = torch.tensor(json.loads(bits), dtype=torch.int32).view(torch.float32)
        assert (ours - theirs).abs().max() <= 2**-24


@given(strategies.weights(), strategies.block_sizes)
def test_the_offset_is_the_exact_mean_rounded_once(weight: Tensor, block_size: int) -> None:
    absmax, packed = both(weight, block_size)
    assert float(packed.nested_offset) == float(reference.exact_mean(absmax))


@given(st.lists(st.integers(0, 0x7F7FFFFF), min_size=1, max_size=9))
def test_the_mean_is_exact_for_any_magnitudes(bits: list[int]) -> None:
    absmax = np.array(bits, np.uint32).view(np.float32)
    codes, nested = torch.empty(len(bits), dtype=torch.uint8), torch.empty(1)
    capsules = [torch.utils.dlpack.to_dlpack(t) for t in (torch.from_numpy(absmax), codes, nested)]
    assert _rust.double_quantize(*capsules, 1) == float(reference.exact_mean(absmax))


@given(strategies.weights(), strategies.block_sizes)
def test_nested_absmax_is_the_largest_distance_from_the_offset(
    weight: Tensor, block_size: int
) -> None:
    absmax, packed = both(weight, block_size)
    centred = absmax - packed.nested_offset.numpy()
    expected = [np.abs(centred[i : i + 256]).max() for i in range(0, absmax.size, 256)]
    assert packed.nested_absmax.tolist() == [float(value) for value in expected]


@given(strategies.weights(), strategies.block_sizes)
def test_each_8_bit_code_is_the_exact_nearest_entry_of_the_map(
    weight: Tensor, block_size: int
) -> None:
    absmax, packed = both(weight, block_size)
    table = np.array(_rust.dynamic_map())
    values = scaled(absmax, packed)
    distance = np.abs(table[packed.absmax.numpy()] - values)
    assert np.array_equal(distance, reference.nearest(values, table))


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_our_8_bit_code_is_never_farther_than_bitsandbytes_own(block_size: int) -> None:
    absmax, packed = both(torch.randn(1024, 2048), block_size)
    centred = torch.from_numpy(absmax) - packed.nested_offset
    theirs, _ = bitsandbytes.quantize_blockwise(centred, blocksize=256)
    table, values = np.array(_rust.dynamic_map()), scaled(absmax, packed)
    our_distance = np.abs(table[packed.absmax.numpy()] - values)
    assert (our_distance <= np.abs(table[theirs.numpy()] - values)).all()
    # Its lookup table has 65,536 entries: it misses near-ties, and near zero, where the map is
    # denser than the table, by several codes.
    assert (theirs.numpy() != packed.absmax.numpy()).mean() < 0.01


@given(strategies.weights(), strategies.block_sizes)
def test_decoding_adds_the_offset_in_float32(weight: Tensor, block_size: int) -> None:
    packed = qlora_rs.quantize(weight, block_size)
    absmax = reference.decode_absmax(
        packed.absmax.numpy(),
        packed.nested_absmax.numpy(),
        float(packed.nested_offset),
        packed.nested_map.numpy(),
    )
    exact = reference.dequantize(packed.codes.numpy(), absmax, tuple(weight.shape), block_size)
    assert np.array_equal(packed.dequantize(torch.float64).numpy(), exact)


@given(strategies.weights(), strategies.block_sizes)
def test_the_4_bit_codes_do_not_change_with_double_quantization(
    weight: Tensor, block_size: int
) -> None:
    single = qlora_rs.quantize(weight, block_size, double_quant=False)
    assert torch.equal(single.codes, qlora_rs.quantize(weight, block_size).codes)


def test_equal_absmax_come_back_exactly() -> None:
    weight = torch.where(torch.rand(64, 4096) > 0.5, 0.3, -0.3)
    assert torch.equal(qlora_rs.quantize(weight).dequantize(), weight)


def test_double_quantization_costs_the_bits_it_promises() -> None:
    packed = qlora_rs.quantize(torch.randn(1024, 1024))
    bits = 8 * (packed.nbytes - packed.nested_map.nbytes) / 2**20
    assert bits == pytest.approx(4.127, abs=5e-4)
    assert 8 * qlora_rs.quantize(torch.randn(64, 64), double_quant=False).nbytes / 4096 == 4.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_statistic_that_is_not_finite_is_refused_with_its_index(bad: float) -> None:
    absmax = torch.ones(700)
    absmax[321] = bad
    parts = (absmax, torch.empty(700, dtype=torch.uint8), torch.empty(3))
    capsules = [torch.utils.dlpack.to_dlpack(part) for part in parts]
    with pytest.raises(qlora_rs.QloraError, match=r"absmax holds a NaN .* at index 321"):
        _rust.double_quantize(*capsules, 1)
