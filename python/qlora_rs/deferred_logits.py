"""What the output layer of a fused model returns while a loss is asked for: logits, not computed.

A causal language model does little with its logits: it reshapes them, may scale them, and hands
them to `torch.nn.functional.cross_entropy`. `DeferredLogits` does just that, on the hidden states,
and answers the cross-entropy with `linear_cross_entropy`. Everything else would need the logits
themselves, so it is refused by name: whatever a model adds to its loss is either honoured or an
error, and never lost (Gemma's soft-capping, Bamba's z-loss, label smoothing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qlora_rs.errors import QloraError
from qlora_rs.layers import NF4Linear
from qlora_rs.loss import Weight, linear_cross_entropy


def refuse(name: str) -> NoReturn:
    """Say what a model does to its logits that the fused loss cannot do without them."""
    raise QloraError(
        f"the model applies {name!r} to its logits, which the fused loss never holds; train it "
        "with its own loss (unfuse_loss(model) brings that back)"
    )


class DeferredLogits:
    """z = hidden Wᵀ + bias, of which only the cross-entropy is ever computed.

    hidden: [..., H]; weight: [V, H], dense or packed; bias: [V] or None.

    >>> logits = DeferredLogits(torch.zeros(2, 3, 8), torch.zeros(10, 8), None)
    >>> logits.shape, logits[..., :-1, :].float().view(-1, 10).shape
    (torch.Size([2, 3, 10]), torch.Size([4, 10]))
    """

    def __init__(self, hidden: Tensor, weight: Weight, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias

    @classmethod
    def of_layer(cls, layer: nn.Linear, hidden: Tensor) -> DeferredLogits:
        """What `layer(hidden)` would compute."""
        if isinstance(layer, NF4Linear):
            hidden, bias = layer.inputs(hidden)
            return cls(hidden, layer.packed, bias)
        return cls(hidden, layer.weight, layer.bias)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def float(self) -> DeferredLogits:
        return self  # the loss is computed in float32 as it is

    def contiguous(self) -> DeferredLogits:
        return self

    def to(self, target: torch.device | torch.dtype | str, **options: Any) -> DeferredLogits:
        if target not in (torch.float32, self.dtype, self.device, str(self.device)):
            refuse(f"to({target})")
        return self

    def view(self, *sizes: Any) -> DeferredLogits:
        sizes = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list, torch.Size)) else sizes
        if sizes[-1] != self.shape[-1]:
            refuse(f"view{sizes}")
        hidden = self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1])
        return DeferredLogits(hidden, self.weight, self.bias)

    reshape = view

    def __getitem__(self, index: Any) -> DeferredLogits:
        parts = index if isinstance(index, tuple) else (index,)
        reaches_last = any(part is Ellipsis for part in parts) or len(parts) >= self.dim()
        if reaches_last and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
            refuse("indexing in the vocabulary")
        return DeferredLogits(self.hidden[index], self.weight, self.bias)

    def __mul__(self, scale: Any) -> DeferredLogits:
        if type(scale) not in (int, float):
            refuse("multiplication by a tensor")
        bias = None if self.bias is None else self.bias * scale
        return DeferredLogits(self.hidden * scale, self.weight, bias)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> DeferredLogits:
        return self * (1 / scale)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Tensor:
        if function is not nn.functional.cross_entropy or not isinstance(arguments[0], cls):
            refuse(getattr(function, "__name__", str(function)))
        return _cross_entropy(*arguments, **(keywords or {}))

    def __getattr__(self, name: str) -> NoReturn:
        # Probing for anything but a tensor's methods gets the usual answer.
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        refuse(name)


def _cross_entropy(
    logits: DeferredLogits,
    targets: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """With the signature of torch's."""
    if weight is not None or label_smoothing != 0.0 or (size_average, reduce) != (None, None):
        refuse("cross_entropy with class weights, label smoothing or deprecated options")
    if logits.dim() > 2:  # torch takes dimension 1 for the classes then
        refuse(f"cross_entropy over dimension 1 of {list(logits.shape)}")
    return linear_cross_entropy(
        logits.hidden, logits.weight, targets, logits.bias, ignore_index, reduction
    )


def _refused_operator(name: str) -> Callable:
    def operator(self: DeferredLogits, *operands: Any) -> NoReturn:
        refuse(name)

    return operator


for _name in ("add", "radd", "sub", "rsub", "rtruediv", "neg", "pow", "matmul", "setitem"):
    setattr(DeferredLogits, f"__{_name}__", _refused_operator(_name))
