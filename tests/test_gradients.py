"""Gradients: by finite differences in float64, and against torch on the dequantized layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, Product
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import qlora_rs
from qlora_rs import PackedWeight, QloraError

# y is linear in each argument alone, so finite differences are exact but for rounding.
EXACT = {"eps": 1e-6, "atol": 1e-8, "nondet_tol": 0.0}


def operands(
    shape: tuple = (3,), out_features: int = 5, rank: int = 2, grad: str = "xabc"
) -> tuple:
    """x, packed, A, B, bias in float64; the letters of `grad` say which want gradients."""
    packed = qlora_rs.quantize(torch.randn(out_features, 33), 32)
    tensors = (
        torch.randn(*shape, 33), torch.randn(rank, 33), torch.randn(out_features, rank),
        torch.randn(out_features),
    )  # fmt: skip
    x, a, b, bias = (
        t.double().requires_grad_(letter in grad) for t, letter in zip(tensors, "xabc", strict=True)
    )
    return x, packed, a, b, bias


def lora(packed: PackedWeight) -> Callable[..., Tensor]:
    return lambda x, a, b, bias: qlora_rs.lora_linear(x, packed, a, b, 0.7, bias)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,), (2, 0)])
def test_the_gradients_of_linear_are_right_to_second_order(shape: tuple) -> None:
    x, packed, _, _, bias = operands(shape)

    def product(x: Tensor, bias: Tensor) -> Tensor:
        return qlora_rs.linear(x, packed, bias)

    assert gradcheck(product, (x, bias), check_undefined_grad=True, **EXACT)
    assert gradgradcheck(product, (x, bias), **EXACT)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_gradients_of_lora_linear_are_right(rank: int, shape: tuple) -> None:
    x, packed, *rest = operands(shape, rank=rank)
    assert gradcheck(lora(packed), (x, *rest), check_undefined_grad=True, **EXACT)


@pytest.mark.parametrize("grad", ["x", "a", "b", "c", "xa", "xb", "ab", "abc", "xabc"])
def test_frozen_arguments_leave_the_other_gradients_right(grad: str) -> None:
    x, packed, *rest = operands(grad=grad)
    assert gradcheck(lora(packed), (x, *rest), **EXACT)


def test_the_second_gradients_of_lora_linear_are_right_or_refused() -> None:
    x, packed, *rest = operands()
    try:
        assert gradgradcheck(lora(packed), (x, *rest), **EXACT)
    except QloraError as error:
        assert "once_differentiable" in str(error)  # noqa: PT017


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_second_gradients_of_lora_linear_are_never_silently_wrong(dtype: torch.dtype) -> None:
    x, packed, a, b, _ = operands()
    arguments = [(t.detach() / 8).to(dtype).requires_grad_() for t in (x, a, b)]

    def second(function: Callable) -> tuple[Tensor, ...]:
        y = function(*arguments, torch.zeros(5, dtype=dtype)).square().sum()
        first = torch.autograd.grad(y, arguments, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), arguments)

    expected = second(dense_lora(packed.dequantize(dtype)))
    try:
        found = second(lora(packed))
    except QloraError as error:
        assert "once_differentiable" in str(error)  # noqa: PT017
    else:
        for ours, torchs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, torchs, rtol=0.1, atol=float(torchs.abs().max()) / 20)


def test_the_gradient_of_a_strided_x_is_right() -> None:
    x, packed, a, b, bias = operands((4,))
    columns = x.detach().t().contiguous().requires_grad_()
    assert gradcheck(lambda c, *rest: lora(packed)(c.t(), *rest), (columns, a, b, bias), **EXACT)


def test_a_strided_gradient_gives_the_gradient_of_its_copy() -> None:
    x, packed, a, b, bias = operands((4,))
    y = lora(packed)(x, a, b, bias)
    strided = torch.randn(5, 8, dtype=torch.float64).t()[::2]
    expected = torch.autograd.grad(y, (x, a, b, bias), strided.contiguous(), retain_graph=True)
    for ours, copys in zip(torch.autograd.grad(y, (x, a, b, bias), strided), expected, strict=True):
        torch.testing.assert_close(ours, copys, rtol=1e-14, atol=1e-14)


def test_an_expanded_gradient_is_understood() -> None:
    x, packed, *rest = operands((4,))
    (gradient,) = torch.autograd.grad(lora(packed)(x, *rest).sum(), x)
    expected = packed.dequantize(torch.float64).sum(0) + 0.7 * rest[1].sum(0) @ rest[0]
    torch.testing.assert_close(gradient, expected.expand(4, 33))


def dense_lora(weight: Tensor) -> Callable[..., Tensor]:
    def product(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        hidden = x @ a.to(x.dtype).t()
        return x @ weight.to(x.dtype).t() + bias + 0.7 * (hidden @ b.to(x.dtype).t())

    return product


@given(strategies.products(), st.sampled_from((1, 3, 16)), st.booleans())
def test_gradients_are_as_accurate_as_those_of_the_dense_layer(
    product: Product, rank: int, adapter_in_x_dtype: bool
) -> None:
    packed, dtype = qlora_rs.quantize(product.weight, product.block_size), product.x.dtype
    a, b = torch.randn(rank, packed.shape[1]), torch.randn(packed.shape[0], rank)
    if adapter_in_x_dtype:
        a, b = a.to(dtype), b.to(dtype)
    arguments = (product.x, a, b, torch.zeros(packed.shape[0], dtype=dtype))
    seed = torch.randn(*product.x.shape[:-1], packed.shape[0]).to(dtype)

    def gradients(function: Callable, convert: Callable = lambda t: t) -> tuple[Tensor, ...]:
        inputs = [convert(t).detach().requires_grad_() for t in arguments]
        return torch.autograd.grad(function(*inputs), inputs, convert(seed))

    weight = packed.dequantize(torch.float64)
    ours, torchs = gradients(lora(packed)), gradients(dense_lora(weight))
    # float64, from the adapter as x's dtype sees it; and the sums of magnitudes behind each value.
    exact = gradients(dense_lora(weight), lambda t: t.to(dtype).double())
    summed = gradients(dense_lora(weight.abs()), lambda t: t.to(dtype).double().abs())
    for mine, theirs, true, size in zip(ours, torchs, exact, summed, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        if mine.numel() == 0:
            continue
        error, torch_error = ((g.double() - true).abs().max() for g in (mine, theirs))
        assert error <= 2 * torch_error + 2 * torch.finfo(dtype).eps * size.max()


@pytest.mark.parametrize("dtype", FLOATS)
def test_adapter_gradients_come_back_in_the_adapters_own_dtype(dtype: torch.dtype) -> None:
    x, packed, a, b, _ = operands()
    a, b = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    qlora_rs.lora_linear(x.to(dtype), packed, a, b, 2.0).sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    x, packed, *rest = operands((6,))
    function = lora(packed)
    plain = torch.autograd.grad(function(x, *rest).square().sum(), (x, *rest))
    saved = checkpoint(function, x, *rest, use_reentrant=reentrant)
    saved.square().sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip((x, *rest), plain, strict=True))


def test_what_is_saved_for_backward_goes_through_saved_tensor_hooks() -> None:
    x, packed, *rest = operands((6,))
    plain = torch.autograd.grad(lora(packed)(x, *rest).sum(), (x, *rest))
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        seen.append(tensor.clone())
        return len(seen) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, seen.__getitem__):
        y = lora(packed)(x, *rest)
    hooked = torch.autograd.grad(y.sum(), (x, *rest))
    assert all(torch.equal(ours, expected) for ours, expected in zip(hooked, plain, strict=True))
    # x, x Aᵀ, five tensors of the weight, A and B: nothing of the weight's dense size.
    assert len(seen) == 9
    assert max(t.nbytes for t in seen) == max(x.nbytes, packed.nested_map.nbytes)


def test_the_graph_is_freed_with_its_output() -> None:
    x, packed, *rest = operands((6,))
    y = lora(packed)(x, *rest)
    node = weakref.ref(y.grad_fn)
    assert node() is not None
    del y
    assert node() is None


@pytest.mark.parametrize("name", ["linear", "lora_linear"])
def test_the_packed_weight_gets_no_gradient_and_blocks_none(name: str) -> None:
    x, packed, a, b, _ = operands()
    parameters = [torch.nn.Parameter(t, requires_grad=False) for t in packed._tensors()]
    arguments = (x, *parameters, *packed.arguments()[5:])
    if name == "lora_linear":
        arguments += (a, b, 1.0)
    y = getattr(torch.ops.qlora_rs, name)(*arguments, None)
    (y if name == "linear" else y[0]).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("adapted", [False, True])
def test_batched_gradients_are_one_gradient_each(adapted: bool) -> None:
    x, packed, a, b, _ = operands()
    x, a, b = (t.detach().float() for t in (x, a, b))
    x.requires_grad_()
    y = qlora_rs.lora_linear(x, packed, a, b, 2.0) if adapted else qlora_rs.linear(x, packed)
    directions = torch.randn(4, *y.shape)
    (many,) = torch.autograd.grad(y, x, directions, retain_graph=True, is_grads_batched=True)
    for got, direction in zip(many, directions, strict=True):
        (expected,) = torch.autograd.grad(y, x, direction, retain_graph=True)
        torch.testing.assert_close(got, expected)
