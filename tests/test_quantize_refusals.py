"""What `quantize` refuses, and that each refusal is a sentence with the numbers in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import FLOATS

import qlora_rs
from qlora_rs import QloraError

BAD_VALUES = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bad_weight_is_refused_at_every_position_of_a_block(
    dtype: torch.dtype, bad: float
) -> None:
    for position in range(64):
        weight = torch.ones(3, 64, dtype=dtype)
        weight[1, position] = bad
        with pytest.raises(
            QloraError, match=rf"holds 1 NaN or .* at \[1, {position}\] of the 3 x 64 "
        ):
            qlora_rs.quantize(weight)


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("count", [1, 2, 15, 33, 63])
def test_a_bad_weight_is_refused_at_every_position_of_a_tail(count: int, bad: float) -> None:
    for position in range(count):
        weight = torch.zeros(1, 64 + count)
        weight[0, 64 + position] = bad
        with pytest.raises(QloraError, match=rf"first at \[0, {64 + position}\] of"):
            qlora_rs.quantize(weight)


def test_the_refusal_counts_every_bad_weight_and_names_the_first() -> None:
    weight = torch.randn(300, 1000)
    bad = torch.randperm(weight.numel())[:1234]
    weight.view(-1)[bad] = float("nan")
    first = rf"\[{bad.min() // 1000}, {bad.min() % 1000}\]"
    expected = rf"holds 1234 NaN or infinite value\(s\), the first at {first} of the 300 x 1000 "
    with pytest.raises(QloraError, match=expected):
        qlora_rs.quantize(weight)


def test_a_signalling_nan_and_a_nan_with_any_payload_are_refused() -> None:
    for bits in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF):
        weight = torch.zeros(1, 64)
        weight.view(torch.int32)[0, 7] = int(np.uint32(bits).view(np.int32))
        with pytest.raises(QloraError, match="holds 1 NaN"):
            qlora_rs.quantize(weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.uint8])
def test_a_weight_of_another_dtype_is_refused_with_the_remedy(dtype: torch.dtype) -> None:
    with pytest.raises(QloraError, match=rf"got {dtype}; convert it with \.to\(torch\.float32\)"):
        qlora_rs.quantize(torch.zeros(4, 64, dtype=dtype))


def test_a_complex_weight_is_not_told_to_drop_its_imaginary_part() -> None:
    with pytest.raises(QloraError, match=r"got torch\.complex64, .* weight\.real and weight\.imag"):
        qlora_rs.quantize(torch.zeros(4, 64, dtype=torch.complex64))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_weight_is_refused_with_the_remedy() -> None:
    for weight in (torch.eye(64).to_sparse(), torch.eye(64).to_sparse_csr()):
        with pytest.raises(QloraError, match=r"sparse\w* tensor, .* \.to_dense\(\)"):
            qlora_rs.quantize(weight)


@pytest.mark.parametrize("double_quant", ["no", None, 1, 0.0])
def test_a_double_quant_that_is_no_bool_is_refused(double_quant: object) -> None:
    sentence = f"double_quant must be True or False, got {double_quant!r}"
    with pytest.raises(QloraError, match=sentence):
        qlora_rs.quantize(torch.zeros(4, 64), 64, double_quant)
    with pytest.raises(QloraError, match=sentence):
        qlora_rs.quantize_model(
            torch.nn.Sequential(torch.nn.Linear(64, 4)), double_quant=double_quant
        )


def test_a_gpu_that_is_not_there_is_refused_with_the_command_that_says_why() -> None:
    found = torch.cuda.device_count()
    sentence = rf"cannot go to cuda:{found}: torch finds {found} NVIDIA GPUs.* `qlora-rs doctor`"
    with pytest.raises(QloraError, match=sentence):
        qlora_rs.quantize(torch.eye(64)).to(f"cuda:{found}")


@pytest.mark.parametrize("shape", [(), (64,), (1, 2, 64), (0,)])
def test_a_weight_that_is_not_a_matrix_is_refused_with_its_shape(shape: tuple) -> None:
    with pytest.raises(QloraError, match=r"must have 2 dimensions .* got shape \["):
        qlora_rs.quantize(torch.zeros(shape))


@pytest.mark.parametrize("block_size", [0, -64, 1, 16, 96, 63, 8192, 2**63, 2**64])
def test_a_block_size_outside_the_format_is_refused_with_its_value(block_size: int) -> None:
    with pytest.raises(QloraError, match=rf"32, 64, .* 4096, got {block_size} "):
        qlora_rs.quantize(torch.zeros(4, 64), block_size)


@pytest.mark.parametrize("block_size", [64.0, "64", None, True])
def test_a_block_size_of_another_type_is_refused(block_size: object) -> None:
    with pytest.raises(QloraError, match=f"block_size must be one of .* got {block_size!r} "):
        qlora_rs.quantize(torch.zeros(4, 64), block_size)


@pytest.mark.parametrize("weight", [[[1.0]], np.zeros((2, 64), np.float32), None, 1.0])
def test_a_weight_that_is_no_tensor_is_refused_with_its_type(weight: object) -> None:
    with pytest.raises(QloraError, match=f"must be a torch.Tensor, got {type(weight).__name__}"):
        qlora_rs.quantize(weight)


def test_a_misaligned_weight_is_packed_correctly_or_refused() -> None:
    buffer = np.zeros(4 * 256 + 1, np.uint8)
    aligned = torch.randn(4, 64)
    buffer[1:] = aligned.numpy().reshape(-1).view(np.uint8)
    misaligned = torch.from_numpy(buffer[1:].view(np.float32).reshape(4, 64))
    assert misaligned.data_ptr() % 4 == 1
    try:
        codes = qlora_rs.quantize(misaligned).codes
    except QloraError as error:
        codes, message = None, str(error)
    if codes is None:
        assert "not aligned in memory" in message
    else:
        assert torch.equal(codes, qlora_rs.quantize(aligned).codes)


def test_every_refusal_is_a_value_error_too() -> None:
    assert issubclass(QloraError, ValueError)
    with pytest.raises(ValueError, match="block_size"):
        qlora_rs.quantize(torch.zeros(4, 64), 65)
