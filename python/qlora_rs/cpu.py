"""CPU compute of the operators: Rust on the tensors' own memory.

The extension chooses between a kernel that decodes weights in registers (few rows of activations)
and one that decodes blocks of at most 128 KiB into the cache (many rows). Neither ever holds a
dequantized matrix (README, "Laws"). float64 exists for gradient checks and goes through torch,
one tile of weights at a time.

All functions take contiguous two-dimensional tensors on the CPU; `ops.py` brings them there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust

# Decoded weights that a float64 product holds at any one time.
TILE_WEIGHTS = 1 << 20


class Packed(NamedTuple):
    """The tensors and sizes of a packed weight, in the order of the operators' arguments."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_map: Tensor | None
    out_features: int
    in_features: int
    block_size: int

    def capsules(self) -> tuple:
        """The tensors as DLPack capsules, which keep them alive during a call."""
        return tuple(None if t is None else to_dlpack(t) for t in self[:5])


def quantize(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, ...]:
    """codes, absmax, nested_absmax, nested_offset; the last two are empty without double_quant."""
    blocks = -(-weight.numel() // block_size)
    threads = torch.get_num_threads()
    codes = torch.empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    _rust.quantize(to_dlpack(weight), block_size, to_dlpack(codes), to_dlpack(absmax), threads)
    if not double_quant:
        return codes, absmax, torch.empty(0), torch.empty(0)
    nested_codes = torch.empty(blocks, dtype=torch.uint8)
    nested_absmax = torch.empty(-(-blocks // 256), dtype=torch.float32)
    offset = _rust.double_quantize(
        to_dlpack(absmax), to_dlpack(nested_codes), to_dlpack(nested_absmax), threads
    )
    return codes, nested_codes, nested_absmax, torch.tensor(offset, dtype=torch.float32)


def dequantize_tile(
    packed: Packed, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """W[rows, columns] as a dense tensor."""
    size = (rows[1] - rows[0], columns[1] - columns[0])
    # float64 serves gradient checks: the weight's value is the float32 one, exactly.
    out = torch.empty(size, dtype=torch.float32 if dtype == torch.float64 else dtype)
    _rust.dequantize(
        packed.capsules(),
        (packed.out_features, packed.in_features),
        packed.block_size,
        rows,
        columns,
        to_dlpack(out),
        torch.get_num_threads(),
    )
    return out.to(dtype)


def _multiply(
    backward: bool,
    activations: Tensor,
    packed: Packed,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activations times Wᵀ (or W, backward), plus hidden times factor, plus bias."""
    features = packed.in_features if backward else packed.out_features
    if out is None:
        out = torch.empty((activations.shape[0], features), dtype=activations.dtype)
    if activations.dtype == torch.float64:
        return _multiply_float64(backward, activations, packed, low_rank, bias, out)
    if low_rank is not None:
        hidden, factor = low_rank
        # Kept until the call is over: a capsule of a temporary copy keeps the copy alive.
        low_rank_argument = (
            to_dlpack(hidden.contiguous()),
            to_dlpack(factor.contiguous()),
            hidden.shape[1],
        )
    _rust.multiply(
        backward,
        to_dlpack(activations),
        activations.shape[0],
        packed.capsules(),
        (packed.out_features, packed.in_features),
        packed.block_size,
        None if low_rank is None else low_rank_argument,
        None if bias is None else to_dlpack(bias.contiguous()),
        to_dlpack(out),
        torch.get_num_threads(),
    )
    return out


def _multiply_float64(
    backward: bool,
    activations: Tensor,
    packed: Packed,
    low_rank: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    rows, columns = packed.out_features, packed.in_features
    step = max(TILE_WEIGHTS // max(columns if not backward else rows, 1), 1)
    for start in range(0, out.shape[1], step):
        end = min(start + step, out.shape[1])
        if backward:
            tile = dequantize_tile(packed, (0, rows), (start, end), out.dtype)
        else:
            tile = dequantize_tile(packed, (start, end), (0, columns), out.dtype).t()
        torch.mm(activations, tile, out=out[:, start:end])
    if low_rank is not None:
        hidden, factor = low_rank
        out.addmm_(hidden, factor if backward else factor.t())
    return out if bias is None else out.add_(bias)


def linear(x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """y [tokens, out] = x [tokens, in] Wᵀ + bias, in `out` if given."""
    return _multiply(False, x, packed, bias=bias, out=out)


def linear_backward(grad: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """dX [tokens, in] = dY [tokens, out] W, from the same bytes: no transposed copy."""
    return _multiply(True, grad, packed, out=out)


def lora_linear(
    x: Tensor, packed: Packed, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """y = x Wᵀ + scaling (x Aᵀ) Bᵀ + bias, the low-rank part in x's precision."""
    hidden = (x @ lora_a.to(x.dtype).t()).mul_(scaling)
    return _multiply(False, x, packed, (hidden, lora_b.to(x.dtype)), bias)


def lora_linear_backward(
    grad: Tensor, x: Tensor, packed: Packed, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = dY W + scaling (dY B) A, dA = scaling (dY B)ᵀ x, dB = scaling dYᵀ (x Aᵀ)."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    grad_hidden = (grad @ b).mul_(scaling)
    grad_x = _multiply(True, grad, packed, (grad_hidden, a))
    grad_a = grad_hidden.t() @ x
    # x Aᵀ is computed again rather than kept: r / out_features of the product's work.
    grad_b = (grad.t() @ (x @ a.t())).mul_(scaling)
    return grad_x, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    """Write the loss of each row of logits, and its gradient over the logits if asked to.

    logits: [tokens, vocabulary]; targets: [tokens], int64, in range; losses: [tokens], float32
    (float64 with float64 logits).
    """
    if logits.dtype == torch.float64:
        return _cross_entropy_float64(logits, targets, losses, gradient)
    return _rust.cross_entropy(
        to_dlpack(logits),
        logits.shape[1],
        to_dlpack(targets),
        to_dlpack(losses),
        gradient,
        torch.get_num_threads(),
    )


def _cross_entropy_float64(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    normalizer, targets = logits.logsumexp(1, keepdim=True), targets[:, None]
    losses.copy_((normalizer - logits.gather(1, targets)).squeeze(1))
    if gradient:
        logits.sub_(normalizer).exp_()
        logits.scatter_add_(1, targets, -torch.ones_like(normalizer))
