"""Products with packed weights, judged by how wrong torch is at the same precision.

flash-attention's rule: our error against float64 is at most twice that of torch's dense product
on the dequantized weight, plus a floor of one rounding of what was summed, since torch's error may
happen to be zero.
"""

from __future__ import annotations

import pytest
import reference
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, Product
from torch import Tensor

import qlora_rs
from qlora_rs import cpu


def assert_as_accurate_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, summed: Tensor, precision: torch.dtype
) -> None:
    """summed: the sum of magnitudes behind each output."""
    assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
    if ours.numel() == 0:
        return
    error = (ours.double() - exact).abs().max()
    torch_error = (torchs.double() - exact).abs().max()
    floor = torch.finfo(precision).eps * summed.max()
    assert error <= 2 * torch_error + floor, f"{error:.3g} against torch's {torch_error:.3g}"


def check_linear(product: Product) -> None:
    packed = qlora_rs.quantize(product.weight, product.block_size, product.double_quant)
    dense, x, bias = packed.dequantize(torch.float64), product.x.double(), product.bias
    exact_bias = torch.zeros(()) if bias is None else bias.double()
    exact = torch.from_numpy(reference.linear(x.numpy(), dense.numpy(), exact_bias.numpy()))
    assert_as_accurate_as_torch(
        qlora_rs.linear(product.x, packed, bias),
        torch.nn.functional.linear(product.x, dense.to(product.x.dtype), bias),
        exact,
        x.abs() @ dense.abs().t() + exact_bias.abs(),
        product.x.dtype,
    )


@given(strategies.products())
def test_linear_is_as_accurate_as_torch(product: Product) -> None:
    check_linear(product)


@pytest.mark.parametrize("tile", [1, 100, 5000])
@settings(max_examples=20)
@given(product=strategies.products(dtype=torch.float64))
def test_a_float64_product_cut_into_many_tiles_is_as_accurate(tile: int, product: Product) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_WEIGHTS", tile)
        check_linear(product)


@given(strategies.products())
def test_linear_backward_is_as_accurate_as_torch(product: Product) -> None:
    packed = qlora_rs.quantize(product.weight, product.block_size, product.double_quant)
    dense, dtype = packed.dequantize(torch.float64), product.x.dtype
    grad = torch.randn(*product.x.shape[:-1], packed.shape[0]).to(dtype)
    assert_as_accurate_as_torch(
        torch.ops.qlora_rs.linear_backward(grad, *packed.arguments()),
        grad @ dense.to(dtype),
        grad.double() @ dense,
        grad.double().abs() @ dense.abs(),
        dtype,
    )


@given(strategies.products(), st.sampled_from((1, 2, 3, 16, 256)), st.sampled_from((0.25, 2.0)))
def test_lora_linear_is_as_accurate_as_torch(product: Product, rank: int, scaling: float) -> None:
    packed = qlora_rs.quantize(product.weight, product.block_size, product.double_quant)
    dtype, dense = product.x.dtype, packed.dequantize(torch.float64)
    a = torch.randn(rank, packed.shape[1]) / rank**0.5
    b = torch.randn(packed.shape[0], rank)
    ours = qlora_rs.lora_linear(product.x, packed, a, b, scaling, product.bias)
    torchs = torch.nn.functional.linear(product.x, dense.to(dtype), product.bias)
    torchs = torchs + scaling * (product.x @ a.to(dtype).t() @ b.to(dtype).t())
    bias = torch.zeros(()) if product.bias is None else product.bias.double()
    x, a, b = product.x.double(), a.to(dtype).double(), b.to(dtype).double()
    base = reference.linear(x.numpy(), dense.numpy(), bias.numpy())
    exact = torch.from_numpy(base + reference.lora(x.numpy(), a.numpy(), b.numpy(), scaling))
    summed = x.abs() @ dense.abs().t() + scaling * (x.abs() @ a.abs().t() @ b.abs().t())
    assert_as_accurate_as_torch(ours, torchs, exact, summed + bias.abs(), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 4, 8, 9, 64, 513])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_a_layer_of_real_size_is_as_accurate_as_torch(
    block_size: int, rows: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, 4096).to(dtype), torch.randn(193, 4096)
    check_linear(Product(x, weight, block_size, True, torch.randn(193).to(dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_with_very_many_inputs_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(200, 20_000).to(dtype), torch.randn(40, 20_000)
    check_linear(Product(x, weight, 64, True, None))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_layer_with_very_many_outputs_is_as_accurate_as_torch(
    rows: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, 192).to(dtype), torch.randn(4001, 192)
    check_linear(Product(x, weight, 64, True, torch.randn(4001).to(dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [5, 9, 20])
@pytest.mark.parametrize("block_size", [32, 64])
def test_rows_that_end_inside_a_step_far_on_are_as_accurate_as_torch(
    block_size: int, rows: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, 1088).to(dtype), torch.randn(37, 1088)
    check_linear(Product(x, weight, block_size, True, None))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("large", [30.0, 300.0, 3e4])
def test_a_large_activation_that_meets_zeros_costs_the_others_no_bits(
    large: float, rows: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, 1024).to(dtype), torch.randn(400, 1024)
    # 32 apart in one run of 64: kernels may look at such values side by side.
    x[-1, [70, 102]], weight[:, [70, 102]] = large, 0
    packed = qlora_rs.quantize(weight)
    dense = packed.dequantize(torch.float64)
    torchs = torch.nn.functional.linear(x, dense.to(dtype))
    exact = x.double() @ dense.t()
    # No floor: the sums are far from zero, and so is torch's error.
    assert_as_accurate_as_torch(qlora_rs.linear(x, packed), torchs, exact, torch.zeros(1), dtype)


@given(strategies.products(), strategies.views)
def test_a_view_of_x_gives_the_product_of_its_copy(product: Product, view: str) -> None:
    if product.x.dim() != 2:
        return
    packed = qlora_rs.quantize(product.weight, product.block_size)
    seen = strategies.VIEWS[view](product.x)
    assert torch.equal(
        qlora_rs.linear(seen, packed).detach(), qlora_rs.linear(product.x.clone(), packed)
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_permuted_and_expanded_x_give_the_product_of_their_copies(dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.randn(33, 64))
    permuted = torch.randn(64, 3, 5).to(dtype).permute(2, 1, 0)
    expanded = torch.randn(1, 1, 64).to(dtype).expand(4, 3, 64)
    for x in (permuted, expanded):
        assert torch.equal(qlora_rs.linear(x, packed), qlora_rs.linear(x.contiguous(), packed))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (0, 0, 64)])
def test_an_empty_batch_gives_an_empty_result(shape: tuple, dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.randn(5, 64))
    assert qlora_rs.linear(torch.empty(shape, dtype=dtype), packed).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("rows", [0, 3, 50])
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_a_layer_without_inputs_or_outputs_acts_as_torchs(shape: tuple, rows: int) -> None:
    packed, x = qlora_rs.quantize(torch.zeros(shape)), torch.randn(rows, shape[1])
    x.requires_grad_()
    bias = torch.randn(shape[0])
    y = qlora_rs.linear(x, packed, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, torch.zeros(shape), bias))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))
    a = torch.randn(4, shape[1], requires_grad=True)
    b = torch.randn(shape[0], 4, requires_grad=True)
    y = qlora_rs.lora_linear(x, packed, a, b, 2.0, bias)
    assert torch.allclose(y, 2 * (x @ a.t()) @ b.t() + bias, atol=1e-4)
    ours = torch.autograd.grad(y.square().sum(), (x, a, b))
    expected = torch.autograd.grad((2 * (x @ a.t()) @ b.t() + bias).square().sum(), (x, a, b))
    for got, like in zip(ours, expected, strict=True):
        assert torch.allclose(got, like, rtol=1e-3, atol=1e-2)


@given(strategies.products(), st.integers(1, 7))
def test_linear_does_not_touch_its_inputs_nor_share_their_memory(
    product: Product, rank: int
) -> None:
    packed = qlora_rs.quantize(product.weight, product.block_size)
    a, b = torch.randn(rank, packed.shape[1]), torch.randn(packed.shape[0], rank)
    inputs = [product.x, a, b, packed.codes, packed.absmax, packed.nested_absmax]
    before = [tensor.clone() for tensor in inputs]
    qlora_rs.lora_linear(product.x, packed, a, b, 1.0, product.bias).fill_(7)
    qlora_rs.linear(product.x, packed, product.bias).fill_(7)
    assert all(torch.equal(old, new) for old, new in zip(before, inputs, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [7, 40, 600])
def test_lora_and_its_gradients_do_not_depend_on_the_number_of_threads(
    rows: int, dtype: torch.dtype, torch_threads: object
) -> None:
    # With one row torch's own product with B depends on it, in float32.
    packed, x = qlora_rs.quantize(torch.randn(500, 512)), torch.randn(rows, 512).to(dtype)
    inputs = [x, torch.randn(16, 512), torch.randn(500, 16)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    seen = []
    for threads in (1, 2, 3):
        torch_threads(threads)
        y = qlora_rs.lora_linear(inputs[0], packed, *inputs[1:], 0.5)
        seen.append((y, *torch.autograd.grad(y.sum(), inputs)))
    assert all(all(map(torch.equal, seen[0], found)) for found in seen)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 7, 40, 600])
@pytest.mark.parametrize("shape", [(576, 576), (33, 100), (512, 2048)])
def test_products_do_not_depend_on_the_number_of_threads(
    shape: tuple, rows: int, dtype: torch.dtype, torch_threads: object
) -> None:
    packed, x = qlora_rs.quantize(torch.randn(shape)), torch.randn(rows, shape[1]).to(dtype)
    seen = []
    for threads in (1, 2, 3, 2, 1):
        torch_threads(threads)
        seen.append(qlora_rs.linear(x, packed))
    assert all(torch.equal(seen[0], y) for y in seen)
