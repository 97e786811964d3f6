"""The shortest way through a layer, for models that answer token by token on a CPU.

A small model calls hundreds of layers per token, and a layer's product of one row takes no longer
than Python needs for what every layer asks before it computes (who looks on, what is to be
differentiated, what fits) and for handing its tensors down. Here one function asks the same in the
fewest steps. Where an answer is not the usual one, it computes nothing and leaves the call to the
usual way, which knows what to do or whom to refuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust, ops
from qlora_rs.errors import QloraError

if TYPE_CHECKING:
    from qlora_rs.layers import NF4Linear

# The parameters of a layer that hold its packed weight, in the order of the operators' arguments.
PACKED = ("weight", "absmax", "nested_absmax", "nested_offset", "nested_map")

# What a tensor raises that is kept elsewhere, on another device, of another type, or with gaps.
_NOT_THIS_WAY = (
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


def product(layer: NF4Linear, x: Tensor, scaling: float | None) -> Tensor | None:
    """The layer's y [..., out] for x [..., in], or None where this way does not lead there.

    scaling: of the layer's adapter `lora_A`, `lora_B`; None leaves an adapter out.
    """
    if (
        _grad_enabled()
        or not ops.runs_directly(x)
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
    size, adapter = (layer.out_features, columns), None
    try:
        packed: Any = tuple(
            [None if (t := held[name]) is None else to_dlpack(t) for name in PACKED]
        )
        if scaling is not None:
            lora_a, lora_b = held["lora_A"], held["lora_B"]
            rank = lora_a.size(0)
            if (
                rank < 1
                or lora_a.shape != (rank, columns)
                or lora_b.shape != (size[0], rank)
                or lora_a.is_neg()
                or lora_b.is_neg()
            ):
                return None
            adapter = (to_dlpack(lora_a), to_dlpack(lora_b), rank, scaling, None)
        bias = held["bias"]
        if bias is not None and (bias.shape != (size[0],) or bias.is_neg()):
            return None
        y = _empty((*shape[:-1], size[0]), dtype=dtype)
        _rust.multiply(
            False,
            to_dlpack(x),
            x.numel() // columns,
            packed,
            size,
            layer.block_size,
            adapter,
            None if bias is None else to_dlpack(bias),
            to_dlpack(y),
            _threads(),
        )
    # Raised before anything is computed.
    except _NOT_THIS_WAY:
        return None
    return y
