"""Products of numbers that are not finite, and the operands that products refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS

import qlora_rs
from qlora_rs import QloraError, _rust

PACKED = qlora_rs.quantize(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)))
BAD = (float("nan"), float("inf"), -float("inf"))


def masks(y: torch.Tensor) -> tuple:
    return y.isnan().tolist(), y.isposinf().tolist(), y.isneginf().tolist()


def dense(x: torch.Tensor, packed: qlora_rs.PackedWeight) -> torch.Tensor:
    """In float64: torch's bf16 product (2.13, AMX) leaks NaN into the row above at some widths."""
    return x.double() @ packed.dequantize(torch.float64).t()


@given(
    rows=st.sampled_from((1, 8, 9, 33, 70)),
    dtype=strategies.dtypes,
    at=st.lists(
        st.tuples(st.integers(0, 99), st.integers(0, 199), st.sampled_from(BAD)), max_size=4
    ),
    columns=st.sampled_from((64, 100, 128, 192)),
)
def test_nan_and_infinity_in_x_spread_as_in_a_dense_product(
    rows: int, dtype: torch.dtype, at: list, columns: int
) -> None:
    # Levels away from zero: 0 * inf is NaN in a sum, whatever the order.
    weight = torch.randn(7, columns).sign() * (torch.rand(7, columns) + 0.2)
    packed = qlora_rs.quantize(weight, double_quant=False)
    x = torch.randn(rows, columns).to(dtype)
    for row, column, bad in at:
        x[row % rows, column % columns] = bad
    assert masks(qlora_rs.linear(x, packed)) == masks(dense(x, packed))


@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
def test_nan_and_infinity_in_a_gradient_spread_as_in_a_dense_product(
    bad: float, dtype: torch.dtype, rows: int
) -> None:
    weight = torch.randn(50, 100).sign() * (torch.rand(50, 100) + 0.2)
    packed = qlora_rs.quantize(weight, double_quant=False)
    for position in range(0, 50, 7):
        grad = torch.randn(rows, 50).to(dtype)
        grad[-1, position] = bad
        ours = torch.ops.qlora_rs.linear_backward(grad, *packed.arguments())
        assert masks(ours) == masks(grad.double() @ packed.dequantize(torch.float64))


@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
def test_a_zero_weight_times_infinity_is_nan_as_in_a_dense_product(
    bad: float, dtype: torch.dtype, rows: int
) -> None:
    packed = qlora_rs.quantize(torch.eye(128))
    for position in range(0, 128, 5):
        x = torch.ones(rows, 128, dtype=dtype)
        x[1, position] = bad
        assert masks(qlora_rs.linear(x, packed)) == masks(dense(x, packed))


@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_that_overflows_is_infinite_as_in_torch(dtype: torch.dtype, rows: int) -> None:
    packed = qlora_rs.quantize(torch.full((3, 64), 2.0))
    x = torch.full((rows, 64), torch.finfo(dtype).max, dtype=dtype)
    assert qlora_rs.linear(x, packed).isposinf().all()
    assert qlora_rs.linear(-x, packed).isneginf().all()


def refusal(*arguments: object) -> str:
    product = qlora_rs.linear if len(arguments) < 4 else qlora_rs.lora_linear
    with pytest.raises(QloraError) as caught:
        product(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_x_of_another_dtype_is_refused_by_name(dtype: torch.dtype) -> None:
    assert f"got {dtype}; convert it" in refusal(torch.zeros(2, 64, dtype=dtype), PACKED)


@pytest.mark.parametrize("shape", [(), (63,), (2, 65), (64, 1), (2, 3, 128)])
def test_x_of_another_width_is_refused_with_both_sizes(shape: tuple) -> None:
    message = refusal(torch.zeros(shape), PACKED)
    assert "must be 64 to fit the 5 x 64 weight" in message
    assert f"got shape {list(shape)}" in message


@pytest.mark.parametrize("shape", [(), (1,), (4,), (6,), (5, 1), (1, 5)])
def test_a_bias_of_another_shape_is_refused_with_both(shape: tuple) -> None:
    message = refusal(torch.zeros(2, 64), PACKED, torch.zeros(shape))
    assert f"bias must have shape [5], got {list(shape)}" in message


def test_a_bias_of_another_dtype_is_refused_with_both() -> None:
    message = refusal(torch.zeros(2, 64), PACKED, torch.zeros(5, dtype=torch.bfloat16))
    assert "torch.float32" in message
    assert "torch.bfloat16" in message


def test_x_on_another_device_than_the_weight_is_refused_with_both() -> None:
    message = refusal(torch.zeros(2, 64, device="meta"), PACKED)
    assert "x is on meta but the weight is on cpu" in message


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_a_lora_matrix_on_another_device_is_refused_with_both(name: str) -> None:
    matrices = {"lora_a": torch.zeros(3, 64), "lora_b": torch.zeros(5, 3)}
    matrices[name] = matrices[name].to("meta")
    message = refusal(torch.zeros(2, 64), PACKED, *matrices.values(), 1.0)
    assert f"{name} is on meta but the weight is on cpu" in message


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 65), (5, 3)), ((3, 64), (4, 3)), ((3, 64), (5, 4)), ((64,), (5, 1)),
        ((3, 64), (3, 5)), ((64, 3), (5, 3)), ((1, 3, 64), (5, 3)), ((3, 64), (1, 5, 3)),
    ],
)  # fmt: skip
def test_lora_matrices_that_do_not_fit_are_refused_with_their_shapes(a: tuple, b: tuple) -> None:
    message = refusal(torch.zeros(2, 64), PACKED, torch.zeros(a), torch.zeros(b), 1.0)
    assert "lora_a must be [r, 64] and lora_b [5, r]" in message
    assert f"got {list(a)} and {list(b)}" in message


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 33, 200])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_a_rank_of_zero_is_refused(grad: bool, dtype: torch.dtype, rows: int) -> None:
    a = torch.zeros(0, 64, dtype=dtype, requires_grad=grad)
    b = torch.zeros(5, 0, dtype=dtype, requires_grad=grad)
    x, sentence = torch.zeros(rows, 64, dtype=dtype), "r must be at least 1, got 0; without an adap"
    assert sentence in refusal(x, PACKED, a, b, 2.0)
    with pytest.raises(QloraError, match=sentence):
        torch.ops.qlora_rs.lora_linear(x, *PACKED.arguments(), a, b, 2.0, None)
    y, hidden = torch.zeros(rows, 5, dtype=dtype), torch.zeros(rows, 0, dtype=dtype)
    for needs_x in (False, True):
        with pytest.raises(QloraError, match=sentence):
            torch.ops.qlora_rs.lora_linear_backward(
                y, x, hidden, *PACKED.arguments(), a, b, 2.0, needs_x
            )


@pytest.mark.parametrize("path", _rust.cpu_paths())
def test_a_rank_of_zero_is_refused_on_every_cpu_path(cpu_path: Callable, path: str) -> None:
    code = """
        import torch, qlora_rs
        packed = qlora_rs.quantize(torch.randn(50, 64))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for rows in (1, 3, 200):
                x, a, b = (torch.zeros(s, dtype=dtype) for s in ((rows, 64), (0, 64), (50, 0)))
                try:
                    qlora_rs.lora_linear(x, packed, a, b, 1.0)
                except qlora_rs.QloraError as error:
                    print(str(error).partition(";")[0])
    """
    assert cpu_path(path, code).split("\n") == ["r must be at least 1, got 0"] * 9


@pytest.mark.parametrize("packed", [torch.zeros(5, 64), None, PACKED.arguments()])
def test_a_weight_that_is_not_packed_is_refused_with_the_call_that_packs_it(packed: object) -> None:
    x, a, b = torch.zeros(2, 64), torch.zeros(1, 64), torch.zeros(5, 1)
    expected = (
        f"packed must be a PackedWeight, got {type(packed).__name__}; call qlora_rs.quantize("
    )
    assert expected in refusal(x, packed)
    assert expected in refusal(x, packed, a, b, 1.0)
    # The two swapped.
    assert "packed must be a PackedWeight, got Tensor" in refusal(PACKED, x)


@pytest.mark.parametrize("x", [np.zeros((2, 64), np.float32), [0.0] * 64, None, PACKED])
def test_an_x_that_is_no_tensor_is_refused_with_its_type(x: object) -> None:
    expected = f"x must be a torch.Tensor, got {type(x).__name__}; convert it"
    assert expected in refusal(x, PACKED)
    assert expected in refusal(x, PACKED, torch.zeros(1, 64), torch.zeros(5, 1), 1.0)


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "bias"])
def test_operands_that_are_no_tensors_are_refused_by_name(name: str) -> None:
    operands = {"lora_a": torch.zeros(1, 64), "lora_b": torch.zeros(5, 1), "bias": torch.zeros(5)}
    operands[name] = operands[name].numpy()
    with pytest.raises(QloraError, match=rf"{name} must be a torch\.Tensor, got ndarray"):
        qlora_rs.lora_linear(torch.zeros(2, 64), PACKED, scaling=1.0, **operands)


@pytest.mark.parametrize("scaling", ["a", None, float("nan"), float("inf"), -float("inf"), 1j])
def test_a_scaling_that_is_no_finite_number_is_refused(scaling: object) -> None:
    message = refusal(torch.zeros(2, 64), PACKED, torch.zeros(1, 64), torch.zeros(5, 1), scaling)
    assert f"scaling must be a finite number such as alpha / r, got {scaling!r}" in message


def test_lora_matrices_that_are_not_floats_are_refused_by_name() -> None:
    whole = torch.zeros(3, 64, dtype=torch.int32)
    assert "lora_a must be a float" in refusal(
        torch.zeros(2, 64), PACKED, whole, torch.zeros(5, 3), 1.0
    )


def test_decoding_to_something_else_than_floats_is_refused() -> None:
    with pytest.raises(QloraError, match=r"must be float32, .* got torch\.int32"):
        PACKED.dequantize(torch.int32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codes", torch.zeros(159, 1, dtype=torch.uint8)),
        ("codes", torch.zeros(160, 1)),
        ("absmax", torch.zeros(4, dtype=torch.uint8)),
        ("absmax", torch.zeros(5)),
        ("nested_absmax", torch.zeros(2)),
        ("nested_offset", None),
        ("nested_map", torch.zeros(255)),
        ("block_size", 96),
        ("shape", torch.Size((5, 65))),
        ("shape", torch.Size((2**32, 2**32))),
    ],
)
def test_a_packed_weight_whose_parts_do_not_fit_cannot_be_made(name: str, value: object) -> None:
    parts = {field: getattr(PACKED, field) for field in PACKED.__dataclass_fields__}
    with pytest.raises(QloraError):
        qlora_rs.PackedWeight(**{**parts, name: value})


def test_operators_called_with_parts_that_do_not_fit_refuse_and_do_not_crash() -> None:
    codes, *rest = PACKED.arguments()
    for wrong in (codes[:-1], codes[:0], codes.float(), torch.cat([codes, codes])):
        with pytest.raises(QloraError):
            torch.ops.qlora_rs.linear(torch.zeros(2, 64), wrong, *rest, None)
        with pytest.raises(QloraError):
            torch.ops.qlora_rs.dequantize(wrong, *rest, torch.float32)


@pytest.mark.parametrize(
    "sizes", [(-1, 64, 64), (5, -64, 64), (5, 64, 0), (5, 64, -64), (5, 64, 48)]
)
def test_operators_called_with_impossible_sizes_refuse_and_do_not_crash(sizes: tuple) -> None:
    tensors = PACKED.arguments()[:5]
    with pytest.raises((QloraError, RuntimeError, OverflowError)):
        torch.ops.qlora_rs.dequantize(*tensors, *sizes, torch.float32)
