"""CPU compute of the operators: Rust on the tensors' own memory.

The extension chooses between a kernel that decodes weights in registers (few rows of activations)
and one that decodes blocks of at most 128 KiB into the cache (many rows). Neither ever holds a
dequantized matrix (README, "Laws"). float64 exists for gradient checks and goes through torch,
one tile of weights at a time.

All functions take contiguous tensors on the CPU, activations [..., features]; `ops.py` brings them
there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust

# Paths that widen half types to multiply many rows of them.
WIDENING_PATHS = ("avx2", "avx2_vnni", "avx512", "avx512_vnni")
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


def is_faster_in_float32(dtype: torch.dtype) -> bool:
    """Whether products of this half type are slower here than float32's of the same values."""
    return dtype in (torch.bfloat16, torch.float16) and _rust.cpu_path() in WIDENING_PATHS


def quantize(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, ...]:
    """codes, absmax, nested_absmax, nested_offset; the last two are empty without double_quant."""
    blocks = -(-weight.numel() // block_size)
    threads = torch.get_num_threads()
    codes = torch.empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32)
    _rust.quantize(
        to_dlpack(weight),
        weight.shape[1],
        block_size,
        to_dlpack(codes),
        to_dlpack(absmax),
        threads,
    )
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


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The dense matrix [out, in]."""
    return dequantize_tile(packed, (0, packed.out_features), (0, packed.in_features), dtype)


class LowRank(NamedTuple):
    """An adapter as a product's operand: A [r, in], B [out, r], alpha / r."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[0]


def _multiply(
    backward: bool,
    activations: Tensor,
    packed: Packed,
    low_rank: LowRank | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """activations [..., depth] times Wᵀ (or W, backward) plus the low-rank part plus bias.

    Also returns the bottleneck's activations [rows, r], scaling included; of no meaning without an
    adapter.
    """
    features, depth = packed.out_features, packed.in_features
    if backward:
        features, depth = depth, features
    shape, dtype = activations.shape, activations.dtype
    rows = activations.numel() // depth if depth else math.prod(shape[:-1])
    if out is None:
        out = torch.empty((*shape[:-1], features), dtype=dtype)
    if dtype == torch.float64:
        x, y = activations.view(rows, depth), out.view(rows, features)
        return out, _multiply_float64(backward, x, packed, low_rank, bias, y)
    if low_rank is None:
        hidden, adapter = out, None
    else:
        hidden = torch.empty((rows, low_rank.rank), dtype=dtype)
        factors = (to_dlpack(_factor(m, dtype)) for m in (low_rank.lora_a, low_rank.lora_b))
        adapter = (*factors, low_rank.rank, low_rank.scaling, to_dlpack(hidden))
    _rust.multiply(
        backward,
        to_dlpack(activations),
        rows,
        packed.capsules(),
        (packed.out_features, packed.in_features),
        packed.block_size,
        adapter,
        None if bias is None else to_dlpack(bias),
        to_dlpack(out),
        torch.get_num_threads(),
    )
    return out, hidden


def plain(tensor: Tensor) -> Tensor:
    """The tensor as its memory shows it: contiguous, nothing lazy, no gradient."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor.detach() if tensor.requires_grad else tensor
    return tensor.detach().resolve_neg().contiguous()


def _factor(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B as Rust reads it; a capsule of a temporary copy keeps the copy alive."""
    if not matrix.is_contiguous() or matrix.is_neg():
        matrix = plain(matrix)
    return matrix.to(dtype) if matrix.dtype == torch.float64 else matrix


def _multiply_float64(
    backward: bool,
    activations: Tensor,
    packed: Packed,
    low_rank: LowRank | None,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write to out, all in two dimensions; return the bottleneck's activations."""
    rows, columns = packed.out_features, packed.in_features
    step = max(TILE_WEIGHTS // max(columns if not backward else rows, 1), 1)
    for start in range(0, out.shape[1], step):
        end = min(start + step, out.shape[1])
        if backward:
            tile = dequantize_tile(packed, (0, rows), (start, end), out.dtype)
        else:
            tile = dequantize_tile(packed, (start, end), (0, columns), out.dtype).t()
        torch.mm(activations, tile, out=out[:, start:end])
    hidden = out
    if low_rank is not None:
        a, b = low_rank.lora_a.to(out.dtype), low_rank.lora_b.to(out.dtype)
        first, second = (b, a) if backward else (a.t(), b.t())
        hidden = (activations @ first).mul_(low_rank.scaling)
        out.addmm_(hidden, second)
    if bias is not None:
        out.add_(bias)
    return hidden


def linear(x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """y [..., out] = x [..., in] Wᵀ + bias, in `out` if given."""
    return _multiply(False, x, packed, bias=bias, out=out)[0]


def linear_backward(grad: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """dX [..., in] = dY [..., out] W, from the same bytes: no transposed copy."""
    return _multiply(True, grad, packed, out=out)[0]


def lora_linear(
    x: Tensor, packed: Packed, low_rank: LowRank, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + hidden Bᵀ + bias and hidden [rows, r] = scaling x Aᵀ, in one pass over x and y."""
    return _multiply(False, x, packed, low_rank, bias)


def lora_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, packed: Packed, low_rank: LowRank, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = dY W + g A with g = scaling dY B; dA = gᵀ x; dB = dYᵀ hidden, for x and dY [rows, ...].

    Without `needs_x`, dX is empty.
    """
    lora_a, lora_b, scaling = low_rank
    if needs_x:
        grad_x, grad_hidden = _multiply(True, grad, packed, low_rank)
    else:
        grad_x = grad.new_empty(0)
        grad_hidden = (grad @ lora_b.to(grad.dtype)).mul_(scaling)
    return grad_x, *factor_gradients(grad, x, hidden, grad_hidden, lora_a, lora_b)


def factor_gradients(
    grad: Tensor, x: Tensor, hidden: Tensor, grad_hidden: Tensor, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor]:
    """dA = grad_hiddenᵀ x and dB = dYᵀ hidden in the factors' dtypes; summed in float32.

    hidden and grad_hidden: [rows, r]; x and dY: [rows, ...] (of any shape, without float64).
    """
    if grad.dtype == torch.float64:
        grad_a, grad_b = grad_hidden.t() @ x, grad.t() @ hidden
        return grad_a.to(lora_a.dtype).contiguous(), grad_b.to(lora_b.dtype).contiguous()
    grad_a = torch.empty(lora_a.shape, dtype=_stored(lora_a.dtype))
    grad_b = torch.empty(lora_b.shape, dtype=_stored(lora_b.dtype))
    _rust.factor_gradients(
        to_dlpack(x),
        to_dlpack(grad_hidden),
        to_dlpack(grad),
        to_dlpack(hidden),
        hidden.shape[0],
        lora_a.shape[0],
        (lora_b.shape[0], lora_a.shape[1]),
        to_dlpack(grad_a),
        to_dlpack(grad_b),
        torch.get_num_threads(),
    )
    return grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What Rust writes for results of a type."""
    return torch.float32 if dtype == torch.float64 else dtype


def multiply_dense(
    backward: bool,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activations [..., depth] times a dense Wᵀ (or W, backward) plus bias, in `out` if given.

    All of one half type or float32, contiguous; summed in float32, rounded once.
    """
    shape = activations.shape[:-1]
    if out is None:
        out = torch.empty((*shape, weight.shape[int(backward)]), dtype=activations.dtype)
    _rust.multiply_dense(
        backward,
        to_dlpack(activations),
        math.prod(shape),
        to_dlpack(weight),
        (weight.shape[0], weight.shape[1]),
        None if bias is None else to_dlpack(bias),
        to_dlpack(out),
        torch.get_num_threads(),
    )
    return out


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
