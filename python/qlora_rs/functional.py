"""Products with packed weights, as functions of plain tensors."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from torch import Tensor

from qlora_rs import autograd
from qlora_rs.errors import QloraError
from qlora_rs.quantize import PackedWeight


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias with a 4-bit W, as `torch.nn.functional.linear` with a float one.

    x: [..., in], float32, float16, bfloat16 (or float64, slowly, for gradient checks), any strides.
    bias: [out] in x's dtype. Returns [..., out] in x's dtype. Gradients flow to x and bias.
    Products are summed in float32 at least; the weight is never held dequantized, only a block of
    at most 128 KiB of it per thread (on a GPU, 48 MiB or 128 rows altogether).
    Raises QloraError when dtypes, devices or shapes do not fit.

    >>> packed = quantize(torch.eye(64))
    >>> x = torch.arange(64.0)
    >>> bool((linear(x, packed) == x).all())
    True
    """
    if not isinstance(packed, PackedWeight) or not (bias is None or isinstance(bias, Tensor)):
        _refuse_types(packed=packed, bias=bias)
    return autograd.linear(x, *packed.arguments(), bias)


def lora_linear(
    x: Tensor,
    packed: PackedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + scaling (x Aᵀ) Bᵀ + bias (LoRA, arXiv 2106.09685, over a 4-bit W).

    x: [..., in]; lora_a: [r, in]; lora_b: [out, r]; scaling: alpha / r; bias: [out]. A and B may
    have another float dtype than x: at most they are rounded to x's for the product, and their
    gradients come back in their own. Gradients flow to x, lora_a, lora_b and bias.
    Raises QloraError when dtypes, devices or shapes do not fit.

    >>> packed = quantize(torch.eye(64))
    >>> x, ones = torch.arange(64.0), torch.ones(1, 64)
    >>> bool((lora_linear(x, packed, ones, ones.t() * 0, scaling=2.0) == x).all())
    True
    """
    if not (
        isinstance(packed, PackedWeight)
        and isinstance(lora_a, Tensor)
        and isinstance(lora_b, Tensor)
        and (bias is None or isinstance(bias, Tensor))
    ):
        _refuse_types(packed=packed, lora_a=lora_a, lora_b=lora_b, bias=bias)
    return autograd.lora_linear(x, *packed.arguments(), lora_a, lora_b, _finite(scaling), bias)


def _finite(scaling: Any) -> float:
    try:
        number = float(scaling)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise QloraError(f"scaling must be a finite number such as alpha / r, got {scaling!r}")
    return number


def _refuse_types(packed: object, **tensors: object) -> NoReturn:
    """The calls look at types with isinstance alone; what is wrong is found out here."""
    if not isinstance(packed, PackedWeight):
        raise QloraError(
            f"packed must be a PackedWeight, got {type(packed).__name__}; call "
            "qlora_rs.quantize(weight) first, and give x before it"
        )
    name, value = next((n, v) for n, v in tensors.items() if not isinstance(v, Tensor | None))
    raise QloraError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
