"""CPU compute of the operators: Rust on the tensors' own memory, one tile of weights at a time.

Few rows of activations go to the fused kernel, which decodes weights in registers. Many rows are
bound by arithmetic: a tile of the weight is decoded into a buffer of at most `TILE_WEIGHTS` and
multiplied by torch. Neither ever holds a dequantized matrix (README, "Laws").

All functions take contiguous two-dimensional tensors on the CPU; `ops.py` brings them there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust

# Decoded weights that exist at any one time: a million, 2 MiB of bf16. Small enough for
# the second-level caches to keep, large enough that torch's product runs at full speed on it.
TILE_WEIGHTS = 1 << 20

# Activation rows up to which the fused kernel is faster; measured by `python -m benches.crossover`.
FUSED_ROWS = {torch.float32: 8, torch.bfloat16: 8, torch.float16: 8, torch.float64: 0}


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


def _tiles(length: int, other: int, multiple: int) -> list[tuple[int, int]]:
    """Cut `length` into ranges that, times `other`, fit in TILE_WEIGHTS, at multiples of `multiple`."""
    step = max(TILE_WEIGHTS // max(other, 1) // multiple, 1) * multiple
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y [tokens, out] = x [tokens, in] Wᵀ + bias."""
    y = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype)
    if x.shape[0] <= FUSED_ROWS[x.dtype]:
        _rust.linear(
            to_dlpack(x),
            x.shape[0],
            packed.capsules(),
            (packed.out_features, packed.in_features),
            packed.block_size,
            None if bias is None else to_dlpack(bias),
            to_dlpack(y),
            torch.get_num_threads(),
        )
        return y
    columns = (0, packed.in_features)
    for rows in _tiles(packed.out_features, packed.in_features, 32):
        tile = dequantize_tile(packed, rows, columns, x.dtype)
        torch.mm(x, tile.t(), out=y[:, rows[0] : rows[1]])
    return y if bias is None else y.add_(bias)


def linear_backward(grad: Tensor, packed: Packed) -> Tensor:
    """dX [tokens, in] = dY [tokens, out] W, from the same bytes: no transposed copy."""
    grad_x = torch.empty((grad.shape[0], packed.in_features), dtype=grad.dtype)
    rows = (0, packed.out_features)
    for columns in _tiles(packed.in_features, packed.out_features, packed.block_size):
        tile = dequantize_tile(packed, rows, columns, grad.dtype)
        torch.mm(grad, tile, out=grad_x[:, columns[0] : columns[1]])
    return grad_x


def lora_linear(
    x: Tensor, packed: Packed, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """y = x Wᵀ + scaling (x Aᵀ) Bᵀ + bias, the low-rank part in x's precision."""
    y = linear(x, packed, bias)
    hidden = x @ lora_a.to(x.dtype).t()
    return y.addmm_(hidden, lora_b.to(x.dtype).t(), alpha=scaling)


def lora_linear_backward(
    grad: Tensor, x: Tensor, packed: Packed, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = dY W + scaling (dY B) A, dA = scaling (dY B)ᵀ x, dB = scaling dYᵀ (x Aᵀ)."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    grad_hidden = (grad @ b).mul_(scaling)
    grad_x = linear_backward(grad, packed).addmm_(grad_hidden, a)
    grad_a = grad_hidden.t() @ x
    # x Aᵀ is computed again rather than kept: r / out_features of the product's work.
    grad_b = (grad.t() @ (x @ a.t())).mul_(scaling)
    return grad_x, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)
