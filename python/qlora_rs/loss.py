"""Cross-entropy of a linear layer's outputs, without ever holding all of them.

    z = h Wᵀ + b        loss = log Σ exp z − z_t        dz = softmax z − [t]
                        dH = dZ W        dW = dZᵀ H        db = Σ dZ

Logits are computed for a few tokens at a time, in one buffer. While a chunk is there, its losses
are taken and dZ is written over it, which is multiplied on to dH (and dW and db where those are
trained). Backward only scales them. That is the fused linear cross-entropy of Liger Kernel
(arXiv 2410.10989, section 3.2). Cut Cross-Entropy (arXiv 2411.09009) keeps less, and computes the
logits again in backward: on a CPU that would cost more time than the memory is worth.

The softmax is `rust/cross_entropy.rs`; `fusion.py` brings this loss into a transformers model.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from qlora_rs import cpu
from qlora_rs.cpu import Packed
from qlora_rs.errors import QloraError
from qlora_rs.ops import check_activations
from qlora_rs.quantize import PackedWeight

# Logits at any one time: so many bytes, or so many tokens if that is more. Each chunk reads the
# whole weight twice, so with fewer tokens a large vocabulary costs up to twice the time
# (`benches/loss.py`); with more, little is gained. 128 tokens' logits are 128 / H of the weight.
CHUNK_BYTES = 16 << 20
CHUNK_TOKENS = 128
REDUCTIONS = ("mean", "sum", "none")

Weight: TypeAlias = Tensor | PackedWeight


def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets)` in bounded memory.

    hidden: [..., H], float32, float16, bfloat16 (or float64, slowly, for gradient checks).
    weight: [V, H] in hidden's dtype, or packed. targets: [...], int64, each below V or
    `ignore_index`; ignored tokens cost nothing. bias: [V] in hidden's dtype. num_items: what
    "mean" divides by, instead of the number of targets that count.
    Returns a scalar, or [...] with reduction "none" (0 where ignored), in float32 (float64 for
    float64): logits are rounded to hidden's dtype, everything after them is float32. "mean" of
    no targets is NaN, as in torch.
    Gradients flow to hidden, weight and bias, once; they are computed during the forward pass.
    Those of weight and bias need a "mean" or a "sum", and weight's is rounded to its dtype after
    each chunk. Products with a dense weight are torch's, and so is that which makes its gradient:
    their last bits may depend on the number of threads. On CPUs that multiply float32 faster than a
    half type, logits and hidden's gradient are ours, summed in float32; they and all else are the
    same on any number.
    Allocates 16 MiB of logits, or those of 128 tokens if that is more, the gradients that are
    needed (weight's twice), and about 8 MiB of scratch per thread.
    Raises QloraError when dtypes, devices, shapes or targets do not fit.

    >>> hidden, weight = torch.randn(3, 8, requires_grad=True), torch.zeros(100, 8)
    >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([5, -100, 99]))
    >>> loss.backward()
    >>> round(loss.exp().item()), hidden.grad.shape
    (100, torch.Size([3, 8]))
    """
    if torch.is_autocast_enabled("cpu") and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        hidden, bias = hidden.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight if isinstance(weight, PackedWeight) else weight.to(dtype)
    _check_operands(hidden, weight, bias)
    _check_reduction(reduction, num_items, weight, bias)
    _check_targets(targets, hidden, weight.shape[0], ignore_index)
    tokens = (targets != ignore_index).flatten().nonzero().squeeze(1)
    # Not reshape(-1, ...): with no features, -1 could be anything.
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    counted = targets.flatten()[tokens]
    if torch.is_grad_enabled():
        losses = LinearCrossEntropyFunction.apply(rows, weight, bias, counted, tokens)
    else:
        losses, _ = _losses_and_gradients(rows[tokens], weight, bias, counted, (False,) * 3)
    if reduction == "none":
        every = losses.new_zeros(targets.numel()).index_copy(0, tokens, losses)
        return every.reshape(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (tokens.numel() if num_items is None else num_items)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """losses [n] of the rows `tokens` [n] of hidden [m, H], with targets [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        targets: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        losses, gradients = _losses_and_gradients(
            hidden.detach()[tokens], weight, bias, targets, ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(*gradients, tokens)
        ctx.shape = hidden.shape
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        # Grad mode is on in a backward pass with create_graph=True. torch's `once_differentiable`
        # would give a gradient without graph here, which a gradient penalty takes for a constant.
        if torch.is_grad_enabled():
            raise QloraError(
                "second gradients of linear_cross_entropy are not implemented: its gradients are "
                "computed in the forward pass; use torch.nn.functional.cross_entropy on the logits"
            )
        grad_hidden, grad_weight, grad_bias, tokens = ctx.saved_tensors
        if grad_hidden is not None:
            # In grad's float32: rounded to a half type first, it would bias every element alike.
            scaled = (grad_hidden * grad[:, None]).to(grad_hidden.dtype)
            grad_hidden = scaled.new_zeros(ctx.shape).index_copy_(0, tokens, scaled)
        # One for all tokens (`_check_reduction` saw to it), so it applies to sums over them.
        scale = grad[0] if len(grad) else grad.new_zeros(())
        grad_weight, grad_bias = (
            None if total is None else (total * scale).to(total.dtype)
            for total in (grad_weight, grad_bias)
        )
        return grad_hidden, grad_weight, grad_bias, None, None


def _losses_and_gradients(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    targets: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Each token's loss, and the needed gradients of their sum: for hidden, weight, bias."""
    vocabulary = weight.shape[0]
    losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    grad_weight = hidden.new_zeros(weight.shape) if needed[1] else None
    grad_bias = losses.new_zeros(vocabulary) if needed[2] else None
    chunk = _tokens_at_a_time(len(hidden), vocabulary * hidden.element_size())
    buffer = hidden.new_empty(chunk, vocabulary)
    for start in range(0, len(hidden), chunk):
        tokens = slice(start, start + chunk)
        logits = buffer[: len(hidden[tokens])]
        _write_logits(hidden[tokens], weight, bias, logits)
        cpu.cross_entropy(logits, targets[tokens], losses[tokens], gradient=any(needed))
        if grad_hidden is not None:
            _write_grad_hidden(logits, weight, grad_hidden[tokens])
        if grad_weight is not None:
            grad_weight.addmm_(logits.t(), hidden[tokens])
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=grad_bias.dtype)
    grad_bias = None if grad_bias is None else grad_bias.to(hidden.dtype)
    return losses, (grad_hidden, grad_weight, grad_bias)


def _tokens_at_a_time(tokens: int, logits_bytes: int) -> int:
    """Chunks of nearly equal size: each reads the whole weight, so a rest would cost like one."""
    most = max(CHUNK_BYTES // max(logits_bytes, 1), CHUNK_TOKENS)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1)


def _write_logits(hidden: Tensor, weight: Weight, bias: Tensor | None, logits: Tensor) -> None:
    if isinstance(weight, PackedWeight):
        bias = None if bias is None else bias.detach()
        cpu.linear(hidden, Packed(*weight.arguments()), bias, out=logits)
    elif weight.is_contiguous() and cpu.is_faster_in_float32(hidden.dtype):
        bias = None if bias is None else cpu.plain(bias)
        cpu.multiply_dense(False, hidden, cpu.plain(weight), bias, out=logits)
    elif bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)


def _write_grad_hidden(grad: Tensor, weight: Weight, grad_hidden: Tensor) -> None:
    if isinstance(weight, PackedWeight):
        cpu.linear_backward(grad, Packed(*weight.arguments()), out=grad_hidden)
    elif weight.is_contiguous() and cpu.is_faster_in_float32(grad.dtype):
        cpu.multiply_dense(True, grad, cpu.plain(weight), out=grad_hidden)
    else:
        torch.mm(grad, weight, out=grad_hidden)


def _check_operands(hidden: Tensor, weight: Weight, bias: Tensor | None) -> None:
    if len(weight.shape) != 2:
        raise QloraError(
            f"weight must have 2 dimensions [vocabulary, hidden], got {list(weight.shape)}; "
            "pass the output layer's weight"
        )
    values = weight.codes if isinstance(weight, PackedWeight) else weight
    check_activations("hidden", hidden, (weight.shape[0], weight.shape[1]), values)
    if hidden.device.type == "meta":
        raise QloraError("hidden is on the meta device and has no values; load the model first")
    if hidden.device.type != "cpu":
        raise QloraError(
            f"hidden is on {hidden.device}, and this loss is computed on the CPU only; move the "
            'operands there with .to("cpu"), or use torch.nn.functional.cross_entropy'
        )
    if isinstance(weight, Tensor) and weight.dtype != hidden.dtype:
        raise QloraError(
            f"weight must have hidden's dtype, got {weight.dtype} and {hidden.dtype}; convert one"
        )
    if bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], hidden.dtype):
        raise QloraError(
            f"bias must be [{weight.shape[0]}] in hidden's dtype {hidden.dtype}, got "
            f"{list(bias.shape)} in {bias.dtype}"
        )


def _check_reduction(
    reduction: str, num_items: int | Tensor | None, weight: Weight, bias: Tensor | None
) -> None:
    if reduction not in REDUCTIONS:
        raise QloraError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise QloraError(
            f'num_items is what "mean" divides by, but reduction is {reduction!r}; drop one of them'
        )
    trained = any(isinstance(t, Tensor) and t.requires_grad for t in (weight, bias))
    if reduction == "none" and trained and torch.is_grad_enabled():
        raise QloraError(
            'reduction "none" gives each token a gradient of its own, but those of weight and bias '
            'are summed over tokens beforehand; use "mean" or "sum", or detach weight and bias'
        )


def _check_targets(targets: Tensor, hidden: Tensor, vocabulary: int, ignore_index: int) -> None:
    if (targets.shape, targets.dtype) != (hidden.shape[:-1], torch.int64):
        raise QloraError(
            f"targets must be {list(hidden.shape[:-1])} in torch.int64, one per token of hidden, "
            f"got {list(targets.shape)} in {targets.dtype}"
        )
    if targets.device != hidden.device:
        raise QloraError(f"targets are on {targets.device}, hidden on {hidden.device}; move one")
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if outside.any():
        first = int(outside.flatten().nonzero()[0])
        raise QloraError(
            f"{int(outside.sum())} target(s) are outside the vocabulary of {vocabulary}, the first "
            f"at flat index {first}: {int(targets.flatten()[first])}; mark tokens to leave out "
            f"with ignore_index, {ignore_index}"
        )
