"""Layers that stand in for `torch.nn.Linear`.

`NF4Linear` holds a packed weight; `QLoRALinear` adds one low-rank adapter. Their state dict has
the keys that bitsandbytes writes, so checkpoints go both ways; the statistics are frozen
parameters, which move with `.to(device)` and keep their dtype through `.to(dtype)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_rs import autograd, shortcut
from qlora_rs.errors import QloraError
from qlora_rs.quantize import PackedWeight, quantize

# What a state dict holds below the key of a weight.
_ENTRIES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
)
_STATISTICS = shortcut.PACKED[1:]


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _autocast(x: Tensor) -> bool:
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    # The meta device knows no autocast, and asking is an error there.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


class NF4Linear(nn.Linear):
    """y = x Wᵀ + bias with W in NF4; a drop-in for `nn.Linear` in a frozen model.

    weight: uint8 [(out * in + 1) // 2, 1], the packed codes, frozen. absmax, nested_*: statistics
    (see PackedWeight), frozen, and float32 or uint8 whatever the model is cast to.
    compute_dtype: activations are cast to it for the product and back after; None computes in
    the activations' own dtype.

    >>> layer = NF4Linear.from_linear(nn.Linear(64, 32))
    >>> layer(torch.zeros(2, 64)).shape
    torch.Size([2, 32])
    """

    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None
    nested_map: nn.Parameter | None

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.compute_dtype = compute_dtype
        # Registered also where there is none, so that all are found in one place.
        self.register_parameter("bias", None if bias is None else _frozen(bias.detach()))
        self._set_packed(packed)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Linear:
        """Quantize a float layer; its bias is taken over, its weight is not modified."""
        return cls(quantize(linear.weight, block_size, double_quant), linear.bias, compute_dtype)

    def _set_packed(self, packed: PackedWeight) -> None:
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        for name in _STATISTICS:
            self.register_parameter(name, _frozen(getattr(packed, name)))
        self.weight_dtype = packed.dtype
        self.block_size = packed.block_size

    @property
    def packed(self) -> PackedWeight:
        """The weight as a `PackedWeight` that shares this layer's memory."""
        nested = (self.nested_absmax, self.nested_offset, self.nested_map)
        shape = torch.Size((self.out_features, self.in_features))
        return PackedWeight(
            self.weight, self.absmax, *nested, shape, self.weight_dtype, self.block_size
        )

    @property
    def W_q(self) -> Tensor:
        """The packed codes, under the name by which peft knows a layer that it may dequantize (for
        DoRA)."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out, in]; see `PackedWeight.dequantize`."""
        return self.packed.dequantize(dtype)

    def _tensors(self, *names: str) -> tuple:
        try:
            # Past nn.Module's search for attributes, which takes longer than some products.
            held = self._parameters
            return tuple([held[name] for name in names])
        except KeyError:  # somebody keeps a parameter elsewhere (parametrizations do)
            return tuple(getattr(self, name) for name in names)

    def _arguments(self) -> tuple:
        tensors = self._tensors(*shortcut.PACKED)
        return (*tensors, self.out_features, self.in_features, self.block_size)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x and bias in the dtype to compute in."""
        dtype = self.compute_dtype or x.dtype
        if _autocast(x):
            dtype = torch.get_autocast_dtype(x.device.type)
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return x if x.dtype == dtype else x.to(dtype), bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] → [..., out] in x's dtype (autocast's, where that is on)."""
        y = self._shortcut(x, None)
        if y is not None:
            return y
        inputs, bias = self.inputs(x)
        return self._outputs(autograd.linear(inputs, *self._arguments(), bias), x)

    def _shortcut(self, x: Tensor, scaling: float | None) -> Tensor | None:
        # A subclass may have changed what the shortcut passes by.
        if type(self) not in (NF4Linear, QLoRALinear):
            return None
        return shortcut.product(self, x, scaling)

    @staticmethod
    def _outputs(y: Tensor, x: Tensor) -> Tensor:
        return y if y.dtype == x.dtype or _autocast(x) else y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # `.to(dtype)`, `.half()`, `.type()` must not convert codes or statistics, whose dtype is
        # part of the format; moving them to another device must still work.
        def keep_dtype(tensor: Tensor) -> Tensor:
            if id(tensor) not in statistics:
                return fn(tensor)
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        owned = (getattr(self, name) for name in shortcut.PACKED)
        statistics = {id(parameter) for parameter in owned if parameter is not None}
        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in shortcut.PACKED:
            destination.pop(prefix + name, None)
        for key, tensor in self.packed.to_bitsandbytes(prefix + "weight").items():
            destination[key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        keys = [key for key in state_dict if key == name or key.startswith(name + ".")]
        entries = {key: state_dict.pop(key) for key in keys}
        if entries:
            try:
                packed_weight = PackedWeight.from_bitsandbytes(entries, name)
                self._load_packed(
                    packed_weight, local_metadata.get("assign_to_params_buffers", False)
                )
            except QloraError as error:
                error_msgs.append(str(error))
        elif strict:
            missing_keys.append(name)
        if strict:
            known = {name} | {f"{name}.{suffix}" for suffix in _ENTRIES}
            unexpected_keys.extend(key for key in entries if key not in known)
        ours: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, ours, unexpected_keys, error_msgs
        )
        packed = {prefix + name for name in shortcut.PACKED}
        missing_keys.extend(key for key in ours if key not in packed)
        state_dict.update(entries)

    def _load_packed(self, packed: PackedWeight, assign: bool) -> None:
        if packed.shape != (self.out_features, self.in_features):
            raise QloraError(
                f"the saved weight is {list(packed.shape)}, this layer is "
                f"[{self.out_features}, {self.in_features}]"
            )
        if assign:
            self._set_packed(packed)
            return
        new = packed.to(self.weight.device)
        for name in shortcut.PACKED:
            value = new.codes if name == "weight" else getattr(new, name)
            held = getattr(self, name)
            kind = None if value is None else (value.shape, value.dtype)
            if held is not None and value is not None and (held.shape, held.dtype) == kind:
                with torch.no_grad():
                    held.copy_(value)
            else:  # another block size, or single instead of double quantization
                setattr(self, name, _frozen(None if value is None else value.clone()))
        self.weight_dtype, self.block_size = packed.dtype, packed.block_size

    def reset_parameters(self) -> None:
        """Nothing: a packed weight comes from a trained one."""

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        nested = ", double_quant" if self.nested_absmax is not None else ""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, block_size={self.block_size}{nested}"


class QLoRALinear(NF4Linear):
    """y = x Wᵀ + scaling (dropout(x) Aᵀ) Bᵀ + bias: a frozen 4-bit W and a trainable A, B.

    lora_A: [r, in] and lora_B: [out, r], float32 unless `dtype` says otherwise. scaling:
    alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2312.03732). A starts uniform as
    `nn.Linear` does, B at zero, so the layer starts as its base.
    """

    def __init__(
        self,
        base: NF4Linear,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if type(r) is not int or r < 1:
            raise QloraError(f"r must be at least 1, got {r!r}; take a whole number such as 16")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise QloraError(f"alpha must be a finite number, got {alpha!r} (twice r is usual)")
        if not 0.0 <= dropout < 1.0:
            raise QloraError(f"dropout must be in [0, 1), got {dropout}")
        super().__init__(base.packed, base.bias, base.compute_dtype)
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.dropout = dropout
        self.adapter_enabled = True
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] → [..., out] in x's dtype (autocast's, where that is on)."""
        if not self.adapter_enabled:
            return super().forward(x)
        drops = self.training and self.dropout > 0.0
        if not drops:
            y = self._shortcut(x, self.scaling)
            if y is not None:
                return y
        inputs, bias = self.inputs(x)
        if drops:
            base = autograd.linear(inputs, *self._arguments(), bias)
            dropped = nn.functional.dropout(inputs, self.dropout)
            hidden = dropped @ self.lora_A.to(inputs.dtype).t()
            y = base + hidden @ self.lora_B.to(inputs.dtype).t() * self.scaling
        else:
            adapter = (*self._tensors("lora_A", "lora_B"), self.scaling)
            y = autograd.lora_linear(inputs, *self._arguments(), *adapter, bias)
        return self._outputs(y, x)

    def without_adapter(self) -> NF4Linear:
        """The base layer, sharing this layer's packed memory."""
        return NF4Linear(self.packed, self.bias, self.compute_dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        enabled = "" if self.adapter_enabled else ", adapter disabled"
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}{enabled}"
