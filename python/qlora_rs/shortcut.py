"""The shortest way through a layer on a CPU, for small models: token by token, and in training.

A small model calls hundreds of layers per token or step, and a layer's product of few rows takes no
longer than Python needs for what every layer asks before it computes (who looks on, what is to be
differentiated, what fits) and for handing its tensors down. Here one function asks the same in the
fewest steps. Where an answer is not the usual one, it computes nothing and leaves the call to the
usual way, which knows what to do or whom to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust, autograd, cpu, ops
from qlora_rs.errors import QloraError

if TYPE_CHECKING:
    from qlora_rs.layers import NF4Linear

# The parameters of a layer that hold its packed weight, in the order of the operators' arguments.
PACKED = ("weight", "absmax", "nested_absmax", "nested_offset", "nested_map")

# What a tensor raises that is kept elsewhere, on another device, of another type, or with gaps.
NOT_THIS_WAY = (
    AttributeError,
    BufferError,
    IndexError,
    KeyError,
    QloraError,
    RuntimeError,
    TypeError,
)

# Looked up once: each look-up costs a part of a product's time, hundreds of times per token.
_empty, _threads = torch.empty, torch.get_num_threads
_grad_enabled, _autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled


class Elsewhere(Exception):
    """This way does not lead there; the usual one does, and nothing was kept."""


def product(layer: NF4Linear, x: Tensor, scaling: float | None) -> Tensor | None:
    """The layer's y [..., out] for x [..., in], or None where this way does not lead there.

    scaling: of the layer's adapter `lora_A`, `lora_B`; None leaves an adapter out.
    """
    if (
        not ops.runs_directly(x)
        or not x.is_cpu
        or not x.is_contiguous()
        or _autocast_enabled("cpu")
    ):
        return None
    dtype, shape, columns = x.dtype, x.shape, layer.in_features
    if (
        not shape
        or shape[-1] != columns
        or columns == 0
        or layer.compute_dtype not in (None, dtype)
    ):
        return None
    held: Any = layer._parameters
    size, adapter, step = (layer.out_features, columns), None, None
    try:
        bias = held["bias"]
        trains = _grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad) or scaling is not None
        )
        if trains:
            if bias is not None:
                return None
            step = (_weight(layer, 0.0),) if scaling is None else operands(layer)
        else:
            packed = tuple([held[name] for name in PACKED])
            if scaling is not None:
                lora_a, lora_b = _factors(layer)
                rank = lora_a.size(0)
                adapter = (to_dlpack(lora_a), to_dlpack(lora_b), rank, scaling, None)
            if bias is not None and (bias.shape != (size[0],) or bias.is_neg()):
                return None
            y = _empty(*shape[:-1], size[0], dtype=dtype)
            _rust.multiply(
                False,
                to_dlpack(x),
                x.numel() // columns,
                _capsules(packed),
                size,
                layer.block_size,
                adapter,
                None if bias is None else to_dlpack(bias),
                to_dlpack(y),
                _threads(),
            )
            return y
    # Raised before anything is computed.
    except NOT_THIS_WAY:
        return None
    try:
        return (_apply_frozen_step if scaling is None else _apply_step)(x, *step)
    except Elsewhere:
        return None


def products(layers: Sequence[NF4Linear], x: Tensor) -> Sequence[Tensor] | None:
    """`product`, with adapters and gradients, of layers that take the same x, as one graph node.

    None where this way does not lead there. That gradients are on and dropout is off is the
    caller's to see to.
    """
    if (
        not ops.runs_directly(x)
        or not x.is_cpu
        or not x.is_contiguous()
        or _autocast_enabled("cpu")
    ):
        return None
    for layer in layers:
        if (
            not getattr(layer, "adapter_enabled", False)
            or layer.bias is not None
            or layer.compute_dtype not in (None, x.dtype)
            or layer.in_features == 0
            or x.shape[-1:] != (layer.in_features,)
        ):
            return None
    try:
        steps = [operand for layer in layers for operand in operands(layer)]
    # Raised before anything is computed.
    except NOT_THIS_WAY:
        return None
    try:
        return _apply_steps(x, *steps)
    except Elsewhere:
        return None


def operands(layer: Any) -> tuple[Weight, Tensor, Tensor]:
    """What `forward` takes of an adapted layer; raises one of NOT_THIS_WAY where it cannot."""
    return _weight(layer, layer.scaling), *_factors(layer)


def _weight(layer: Any, scaling: float) -> Weight:
    held = layer._parameters
    packed = tuple([held[name] for name in PACKED])
    size = (layer.out_features, layer.in_features)
    return Weight(packed, size, layer.block_size, scaling, _versions(packed))


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B; refused where they are not what lies in memory or do not fit."""
    lora_a, lora_b = layer._parameters["lora_A"], layer._parameters["lora_B"]
    rank = lora_a.size(0)
    if (
        rank < 1
        or lora_a.shape != (rank, layer.in_features)
        or lora_b.shape != (layer.out_features, rank)
        or lora_a.is_neg()
        or lora_b.is_neg()
        or ops.wrapped(lora_a)
        or ops.wrapped(lora_b)
    ):
        raise QloraError(f"lora_A {list(lora_a.shape)} and lora_B {list(lora_b.shape)} do not fit")
    return lora_a, lora_b


def _capsules(packed: tuple) -> tuple:
    return tuple([None if tensor is None else to_dlpack(tensor) for tensor in packed])


class Weight(NamedTuple):
    """A packed weight, what its adapter is scaled by (0 without one), and how often each part was
    written to."""

    packed: tuple
    size: tuple[int, int]
    block_size: int
    scaling: float
    versions: list[int]

    def arguments(self) -> tuple:
        """As operators take a packed weight."""
        return (*self.packed, *self.size, self.block_size)

    def check_unchanged(self) -> None:
        """Refuse gradients of a weight that is not the one of the forward pass."""
        if _versions(self.packed) != self.versions:
            raise QloraError(
                "the packed weight was modified after the forward pass, so no gradient can be "
                "computed; call backward() first"
            )


def _versions(packed: tuple) -> list[int]:
    return [tensor._version for tensor in packed if tensor is not None]


def forward(x: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + hidden Bᵀ and hidden = scaling x Aᵀ; raises Elsewhere."""
    try:
        return _multiply(False, x, weight, lora_a, lora_b)
    # Raised before anything is computed. Not of what autograd does next: that is the caller's.
    except NOT_THIS_WAY as error:
        raise Elsewhere from error


def backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dA and dB of `forward`."""
    grad_x, grad_hidden = backward_product(grad, weight, lora_a, lora_b)
    return grad_x, *cpu.factor_gradients(grad, x, hidden, grad_hidden, lora_a, lora_b)


def backward_product(
    grad: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor]:
    """dX = dY W + grad_hidden A and grad_hidden = scaling dY B."""
    return _multiply(True, grad, weight, lora_a, lora_b)


def _multiply(
    transposed: bool, x: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor]:
    rank = lora_a.size(0)
    hidden = _empty(math.prod(x.shape[:-1]), rank, dtype=x.dtype)
    adapter = (to_dlpack(lora_a), to_dlpack(lora_b), rank, weight.scaling, to_dlpack(hidden))
    return _call(transposed, x, weight, adapter), hidden


def _call(transposed: bool, x: Tensor, weight: Weight, adapter: tuple | None) -> Tensor:
    out = _empty(*x.shape[:-1], weight.size[int(transposed)], dtype=x.dtype)
    _rust.multiply(
        transposed,
        to_dlpack(x),
        math.prod(x.shape[:-1]),
        _capsules(weight.packed),
        weight.size,
        weight.block_size,
        adapter,
        None,
        to_dlpack(out),
        _threads(),
    )
    return out


class _FrozenStep(torch.autograd.Function):
    """y = x Wᵀ and dX = dY W: a layer without an adapter, through which gradients pass.

    It saves no tensor (see `_Step`), so gradients may be asked for as often as wanted.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        try:
            y = _call(False, x, weight, None)
        # Raised before anything is computed, as in `forward`.
        except NOT_THIS_WAY as error:
            raise Elsewhere from error
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        weight = ctx.weight
        weight.check_unchanged()
        if not _grad_enabled() and grad.is_contiguous() and ops.runs_directly(grad):
            try:
                return _call(True, grad, weight, None), None
            # A weight that was moved, say: the usual way says so.
            except NOT_THIS_WAY:
                pass
        return autograd._kernel("linear_backward", grad)(grad, *weight.arguments()), None


class _Step(torch.autograd.Function):
    """y = x Wᵀ + scaling (x Aᵀ) Bᵀ and its gradients (`autograd.py`), for operands that fit.

    The packed weight is frozen and the layer's own: it is not among the saved tensors, which cost
    time each and may be moved by those who save memory. That nobody has changed it is checked.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        y, hidden = forward(x, weight, lora_a, lora_b)
        ctx.save_for_backward(x, hidden, lora_a, lora_b)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs_x = ctx.needs_input_grad[0]
        grad_x, *grads = _gradients(needs_x, grad, ctx.weight, *ctx.saved_tensors)
        return grad_x, None, *grads


class _Steps(torch.autograd.Function):
    """`_Step` of layers that take the same x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        weights, factors = operands[::3], (*operands[1::3], *operands[2::3])
        steps = zip(weights, *_halves(factors), strict=True)
        results, hidden = zip(*(forward(x, *step) for step in steps), strict=True)
        ctx.save_for_backward(x, *hidden, *factors)
        ctx.weights = weights
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, *saved = ctx.saved_tensors
        layers = len(ctx.weights)
        hidden, factors = saved[:layers], _halves(saved[layers:])
        steps = list(zip(grads, ctx.weights, hidden, *factors, strict=True))
        needs_x, total = ctx.needs_input_grad[0], None
        of_operands: list[Tensor | None] = []
        # The last first, as autograd would go through layers of their own: sums have an order.
        for grad, weight, *saved in reversed(steps):
            grad_x, *others = _gradients(needs_x, grad, weight, x, *saved)
            total = grad_x if total is None or grad_x is None else _sum(total, grad_x)
            of_operands = [None, *others, *of_operands]
        return total, *of_operands


# Not asked again what `ops.runs_directly` was: a product of one row waits for every question.
_apply_frozen_step, _apply_step, _apply_steps = map(ops.direct_apply, (_FrozenStep, _Step, _Steps))


def _sum(total: Tensor, other: Tensor) -> Tensor:
    """In the first one's memory, unless somebody looks on."""
    if _grad_enabled() or not ops.runs_directly(total):
        return total + other
    return total.add_(other)


def _halves(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def _gradients(
    needs_x: bool,
    grad: Tensor,
    weight: Weight,
    x: Tensor,
    hidden: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dX (or None), dA and dB, also where somebody looks on."""
    weight.check_unchanged()
    if needs_x and is_plain(grad, x):
        return backward(grad, x, hidden, weight, lora_a, lora_b)
    arguments = (*weight.arguments(), lora_a, lora_b, weight.scaling, needs_x)
    kernel = autograd._kernel("lora_linear_backward", grad)
    grad_x, grad_a, grad_b = kernel(grad, x, hidden, *arguments)
    return grad_x if needs_x else None, grad_a, grad_b


def is_plain(grad: Tensor, x: Tensor) -> bool:
    """Whether `backward` may be called as it is, with nobody looking on, for saved tensors."""
    return (
        not _grad_enabled()
        and grad.dtype == x.dtype
        and grad.is_contiguous()
        and x.is_cpu
        and x.is_contiguous()
        and ops.runs_directly(grad)
    )
