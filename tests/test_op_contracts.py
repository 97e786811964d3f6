"""torch.library's own checks on every operator, and torch.compile without graph breaks."""

from __future__ import annotations

import pytest
import torch
from strategies import FLOATS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qlora_rs

OPS = torch.ops.qlora_rs
ALL_OPERATORS = (
    "dequantize", "linear", "linear_backward", "lora_linear", "lora_linear_backward", "quantize",
)  # fmt: skip


def opcheck(name: str, *arguments: object) -> None:
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def strided(shape: tuple, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)


@pytest.fixture(params=[False, True], ids=["single", "double"])
def packed(request: pytest.FixtureRequest) -> tuple:
    return qlora_rs.quantize(torch.randn(10, 50), 32, request.param).arguments()


@pytest.fixture(params=[*FLOATS, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def activations(features: int, dtype: torch.dtype) -> list[Tensor]:
    """Empty, one row, few, many, leading shapes, not contiguous; with gradients and without."""
    shapes = ((0, features), (features,), (3, features), (40, features), (2, 3, features))
    plain = [torch.randn(shape).to(dtype) for shape in shapes]
    views = [strided((5, features), dtype), torch.randn(1, features).to(dtype).expand(4, -1)]
    return [*plain, *views, plain[2].clone().requires_grad_()]


def test_this_file_checks_every_operator() -> None:
    defined = {name for name in torch._C._dispatch_get_all_op_names() if "qlora_rs::" in name}
    assert {name.removeprefix("qlora_rs::") for name in defined} == set(ALL_OPERATORS)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_keeps_its_contract(dtype: torch.dtype, double_quant: bool) -> None:
    for weight in (torch.randn(5, 70), strided((7, 33), torch.float32), torch.zeros(0, 8)):
        opcheck("quantize", weight.to(dtype), 32, double_quant)


def test_dequantize_keeps_its_contract(packed: tuple, dtype: torch.dtype) -> None:
    opcheck("dequantize", *packed, dtype)


def test_linear_keeps_its_contract(packed: tuple, dtype: torch.dtype) -> None:
    for x in activations(50, dtype):
        opcheck("linear", x, *packed, None)
    opcheck("linear", torch.randn(3, 50).to(dtype), *packed, torch.randn(10).to(dtype))


def test_linear_backward_keeps_its_contract(packed: tuple, dtype: torch.dtype) -> None:
    for grad in activations(10, dtype):
        opcheck("linear_backward", grad, *packed)


def test_lora_linear_keeps_its_contract(packed: tuple, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 50, requires_grad=True), torch.randn(10, 2, requires_grad=True)
    for x in activations(50, dtype):
        opcheck("lora_linear", x, *packed, a, b, 0.5, None)
    bias = torch.randn(10).to(dtype).requires_grad_()
    opcheck("lora_linear", torch.randn(3, 50).to(dtype), *packed, a, b, 0.5, bias)
    opcheck(
        "lora_linear", torch.randn(3, 50).to(dtype), *packed, a.to(dtype), b.to(dtype), 0.5, None
    )


def test_lora_linear_backward_keeps_its_contract(packed: tuple, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 50), torch.randn(10, 2)
    for x in activations(50, dtype)[:-1]:
        grad = torch.randn(*x.shape[:-1], 10).to(dtype)
        hidden = torch.randn(x.shape[:-1].numel(), 2).to(dtype)
        for needs_x in (True, False):
            opcheck("lora_linear_backward", grad, x, hidden, *packed, a, b, 0.5, needs_x)


def test_shapes_are_known_without_data(packed: tuple, dtype: torch.dtype) -> None:
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in packed]
    x = torch.empty(2, 3, 50, dtype=dtype, device="meta")
    y = OPS.linear(x, *meta, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 10), dtype, "meta")
    assert OPS.linear_backward(y, *meta).shape == x.shape


@pytest.mark.parametrize("name", ALL_OPERATORS)
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_every_operator_is_computed_on_both_kinds_of_device(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qlora_rs::{name}", key)


def test_a_graph_of_gpu_tensors_can_be_traced_without_a_gpu() -> None:
    with FakeTensorMode():
        weight, x = torch.empty(64, 128, device="cuda"), torch.empty(2, 3, 128, device="cuda")
        parts = OPS.quantize(weight, 64, True)
        packed = (*parts, torch.empty(256, device="cuda"), 64, 128, 64)
        a, b = torch.empty(4, 128, device="cuda"), torch.empty(64, 4, device="cuda")
        y, hidden = OPS.lora_linear(x, *packed, a, b, 0.5, None)
        dense = OPS.dequantize(*packed, torch.bfloat16)
        traced = (*parts, dense, y, hidden, OPS.linear_backward(y, *packed))
        assert {t.device.type for t in traced} == {"cuda"}
        assert y.shape == (2, 3, 64)


class Block(nn.Module):
    """A layer as models use it, small enough to compile in seconds."""

    def __init__(self) -> None:
        super().__init__()
        base = qlora_rs.NF4Linear.from_linear(nn.Linear(64, 32))
        self.layer = qlora_rs.QLoRALinear(base, r=4, alpha=8)
        nn.init.normal_(self.layer.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x) + 1) * 2


@pytest.mark.parametrize("rows", [3, 40])
def test_a_compiled_layer_has_no_graph_break_and_the_same_results(rows: int) -> None:
    block, x = Block(), torch.randn(rows, 64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    parameters = (x, block.layer.lora_A, block.layer.lora_B)
    expected = torch.autograd.grad(block(x).square().sum(), parameters)
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    assert torch.equal(compiled(x), block(x))
    assert all(torch.equal(ours, eager) for ours, eager in zip(found, expected, strict=True))


def test_a_compiled_layer_follows_a_changing_batch_size() -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5, 33):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), block(x))
