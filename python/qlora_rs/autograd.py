"""Backward of the operators.

    linear        y = x Wᵀ + b                          dX = dY W                    db = Σ dY
    lora_linear   y = x Wᵀ + s (x Aᵀ) Bᵀ + b            dX = dY W + s (dY B) A       db = Σ dY
                                                        dA = s (dY B)ᵀ x
                                                        dB = s dYᵀ (x Aᵀ)

(LoRA, arXiv 2106.09685, equation 3, differentiated by hand.) W is frozen and stays packed: what is
saved for backward is its bytes, which the model holds anyway, x, and s x Aᵀ.

Each class serves twice: as the operators' registered autograd, and as a
`torch.autograd.Function` for code that builds on it. Gradients accumulate nowhere here; they are
returned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_rs import ops
from qlora_rs.errors import QloraError

# Gradients of the eight arguments that describe a packed weight.
_NO_PACKED_GRADIENTS = (None,) * 8


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """`torch.ops.qlora_rs.linear`, past the dispatcher where nobody looks on."""
    if not ops.runs_directly(x):
        _check_tensor(x)
        return torch.ops.qlora_rs.linear(x, *arguments)
    if _wants_gradient(x, arguments[-1]):
        return _DirectLinear.apply(x, arguments[:8], arguments[8])
    return ops.linear(x, *arguments)


def lora_linear(x: Tensor, *arguments: Any) -> Tensor:
    """The first result of `torch.ops.qlora_rs.lora_linear`, likewise."""
    if not ops.runs_directly(x):
        _check_tensor(x)
        return torch.ops.qlora_rs.lora_linear(x, *arguments)[0]
    lora_a, lora_b, _, bias = arguments[8:]
    if _wants_gradient(x, lora_a, lora_b, bias):
        return _DirectLoRALinear.apply(x, arguments[:8], *arguments[8:])
    return ops.lora_linear(x, *arguments)[0]


def _check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise QloraError(
            f"x must be a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor"
        )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kernel(name: str, x: Tensor) -> Any:
    """An operator's kernel, or the operator itself where it is to be seen or differentiated."""
    direct = ops.runs_directly(x) and not torch.is_grad_enabled()
    return getattr(ops if direct else torch.ops.qlora_rs, name)


class LinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b with a packed W; arguments as `torch.ops.qlora_rs.linear`."""

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        return _kernel("linear", x)(x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, *packed, _bias = inputs
        ctx.save_for_backward(*packed[:5])
        ctx.sizes = packed[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _kernel("linear_backward", grad)(grad, *ctx.saved_tensors, *ctx.sizes)
        if ctx.needs_input_grad[9]:
            grad_bias = _bias_gradient(grad)
        return grad_x, *_NO_PACKED_GRADIENTS, grad_bias


class LinearBackwardFunction(torch.autograd.Function):
    """dX = dY W is linear in dY, so its own gradient is the forward product."""

    @staticmethod
    def forward(grad: Tensor, *packed: Any) -> Tensor:
        return torch.ops.qlora_rs.linear_backward(grad, *packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, *packed = inputs
        ctx.save_for_backward(*packed[:5])
        ctx.sizes = packed[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_grad = torch.ops.qlora_rs.linear(grad, *ctx.saved_tensors, *ctx.sizes, None)
        return grad_grad, *_NO_PACKED_GRADIENTS


class LoRALinearFunction(torch.autograd.Function):
    """y = x Wᵀ + hidden Bᵀ + b and hidden = s x Aᵀ; arguments as `torch.ops.qlora_rs.lora_linear`.

    hidden [rows, r] is a by-product for the backward pass and has no gradient of its own.
    """

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _kernel("lora_linear", x)(x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, *packed, lora_a, lora_b, scaling, _bias = inputs
        _, hidden = output
        ctx.mark_non_differentiable(hidden)
        ctx.save_for_backward(x, hidden, *packed[:5], lora_a, lora_b)
        ctx.sizes = packed[5:]
        ctx.scaling = scaling

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_hidden: Tensor | None = None) -> tuple:
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 9, 10))
        grads = _lora_gradients(ctx, grad, needs_x, needs_a or needs_b)
        grad_bias = _bias_gradient(grad) if ctx.needs_input_grad[12] else None
        return grads[0], *_NO_PACKED_GRADIENTS, *grads[1:], None, grad_bias


class _DirectLinear(torch.autograd.Function):
    """`LinearFunction` without what the dispatcher needs.

    torch spends some 40 µs per call on a Function with a `setup_context`, and more on each tensor
    argument: as much as a product of a small model takes. Here the packed weight is one argument.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: tuple, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*packed[:5])
        ctx.sizes = packed[5:]
        return ops.linear(x, *packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _kernel("linear_backward", grad)(grad, *ctx.saved_tensors, *ctx.sizes)
        if ctx.needs_input_grad[2]:
            grad_bias = _bias_gradient(grad)
        return grad_x, None, grad_bias


class _DirectLoRALinear(torch.autograd.Function):
    """`LoRALinearFunction` likewise; returns y alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: tuple,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        bias: Tensor | None,
    ) -> Tensor:
        y, hidden = ops.lora_linear(x, *packed, lora_a, lora_b, scaling, bias)
        ctx.save_for_backward(x, hidden, *packed[:5], lora_a, lora_b)
        ctx.sizes = packed[5:]
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs_x, _, needs_a, needs_b, _, needs_bias = ctx.needs_input_grad
        grads = _lora_gradients(ctx, grad, needs_x, needs_a or needs_b)
        grad_bias = _bias_gradient(grad) if needs_bias else None
        return grads[0], None, *grads[1:], None, grad_bias


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad


def _lora_gradients(ctx: Any, grad: Tensor, needs_x: bool, needs_factors: bool) -> tuple:
    """dX, dA and dB from what the forward pass saved."""
    if not (needs_x or needs_factors):
        return None, None, None
    x, hidden, *packed, lora_a, lora_b = ctx.saved_tensors
    arguments = (*packed, *ctx.sizes, lora_a, lora_b, ctx.scaling, needs_x)
    kernel = _kernel("lora_linear_backward", grad)
    grad_x, grad_a, grad_b = kernel(grad, x, hidden, *arguments)
    return grad_x if needs_x else None, grad_a, grad_b


for _name, _function in (
    ("linear", LinearFunction),
    ("linear_backward", LinearBackwardFunction),
    ("lora_linear", LoRALinearFunction),
):
    torch.library.register_autograd(
        f"qlora_rs::{_name}", _function.backward, setup_context=_function.setup_context
    )


def _refuse_second_gradients(ctx: Any, *grads: Tensor) -> tuple:
    raise QloraError(
        "second gradients of lora_linear are not implemented (its backward is "
        "once_differentiable): compute x Wᵀ with qlora_rs.linear, which has them, and the "
        "low-rank part with torch"
    )


torch.library.register_autograd("qlora_rs::lora_linear_backward", _refuse_second_gradients)
