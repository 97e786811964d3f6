"""Rotary position embeddings of queries and keys, one pass over memory, forward and backward.

    y1 = x1 c1 - x2 s1        y2 = x2 c2 + x1 s2              (arXiv 2104.09864, equation 34)

of the halves of each head. Written out in torch, as transformers has it, that is sixteen operators
per layer and more backward. The arithmetic is `rust/rotary.rs`, which rounds where the operators
round. `attention.py` brings it into a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust, cpu, ops


def fits(q: Any, k: Any, cosine: Any, sine: Any) -> bool:
    """Whether queries and keys [batch, heads, tokens, dimensions] are what `rotate` takes."""
    if not ops.runs_directly(q) or not ops.runs_directly(k) or q.dim() != 4 or k.dim() != 4:
        return False
    (batch, _, tokens, dimensions), dtype, positions = q.shape, q.dtype, cosine.shape
    return (
        dtype in ops.FLOATS
        and k.dtype is dtype
        and cosine.dtype is dtype
        and sine.dtype is dtype
        and k.shape[::2] == (batch, tokens)
        and k.shape[3] == dimensions
        and positions in ((1, tokens, dimensions), (batch, tokens, dimensions))
        and sine.shape == positions
        and dimensions % 2 == 0
        and q.is_cpu
        and k.is_cpu
        and cosine.is_cpu
        and sine.is_cpu
        and not cosine.requires_grad
        and not sine.requires_grad
    )


def rotate(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [batch, heads, tokens, dimensions] turned; `fits` says which."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotation.apply(q, k, cosine, sine)
    return _rotate(False, q, k, cosine, sine)


class _Rotation(torch.autograd.Function):
    """Keeps cosines and sines, which all layers share."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        return _rotate(False, q, k, cosine, sine)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple:
        cosine, sine = ctx.saved_tensors
        direct = ops.runs_directly(grad_q) and ops.runs_directly(grad_k)
        if direct and not torch.is_grad_enabled():
            return *_rotate(True, grad_q, grad_k, cosine, sine), None, None
        # Somebody looks on, or differentiates once more: the same, written out.
        return *(_turn_back(grad, cosine, sine) for grad in (grad_q, grad_k)), None, None


def _turn_back(grad: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = (grad * sine[:, None]).chunk(2, dim=-1)
    return grad * cosine[:, None] + torch.cat((second, -first), dim=-1)


def _rotate(
    backward: bool, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor]:
    # One token's heads lie one after another either way. Of several, tokens come first, as
    # projections leave them and as torch's operators would leave the results.
    several = q.shape[2] > 1
    if several:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = cpu.plain(q), cpu.plain(k)
    # Not views, which a model could not write to.
    results = [_empty(x, several) for x in (q, k)]
    written = [y.transpose(1, 2) for y in results] if several else results
    heads = 2 if several else 1
    _rust.rotate(
        backward,
        to_dlpack(cpu.plain(cosine)),
        to_dlpack(cpu.plain(sine)),
        q.shape[3],
        [
            (to_dlpack(x), x.shape[heads], to_dlpack(y))
            for x, y in zip((q, k), written, strict=True)
        ],
        torch.get_num_threads(),
    )
    return results[0], results[1]


def _empty(x: Tensor, several: bool) -> Tensor:
    """Room for x; of several tokens, heads before tokens and in the order of x's memory."""
    if not several:
        return torch.empty_like(x)
    batch, tokens, heads, dimensions = x.shape
    token = heads * dimensions
    strides = (tokens * token, dimensions, token, 1)
    return torch.empty_strided((batch, heads, tokens, dimensions), strides, dtype=x.dtype)
