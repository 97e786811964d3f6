"""Layers with an adapter, whoever made it: what is wanted, and what to put in their place.

Ours (`QLoRALinear`) and peft's `lora.Linear` over `NF4Linear` or bitsandbytes' `Linear4bit`; peft
and bitsandbytes are recognised by what their layers carry, never imported. All active adapters of
a layer are summed before anything is rounded. Read next: `solve.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.errors import QloraError
from qlora_rs.layers import NF4Linear, QLoRALinear
from qlora_rs.quantize import PackedWeight


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that computes W + delta: `module` in the model, over the packed weight `packed`.

    adapters: names of the active ones ("default" for our own).
    """

    name: str
    module: nn.Module
    packed: PackedWeight
    adapters: tuple[str, ...]

    def target(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights wanted, float32 [out, in].

        dtype: what W is rounded to before the update is added; peft rounds to the base's own.
        """
        base = self.packed.dequantize(dtype or torch.float32)
        if isinstance(self.module, QLoRALinear):
            return base.float() + self.delta()
        wanted = base
        for adapter in self.adapters:
            wanted = self._add(wanted, adapter)
        return wanted.float()

    def delta(self) -> Tensor:
        """What the adapters add to W, float32 [out, in]."""
        if isinstance(self.module, QLoRALinear):
            low_rank = self.module.lora_B.detach().float() @ self.module.lora_A.detach().float()
            return low_rank * self.module.scaling
        return self.target() - self.packed.dequantize(torch.float32)

    def _add(self, weight: Tensor, adapter: str) -> Tensor:
        layer: Any = self.module
        with torch.no_grad():
            variant = getattr(layer, "lora_variant", {}).get(adapter)
            if variant is None:
                return weight + layer.get_delta_weight(adapter).detach()
            # DoRA and the like: peft knows how they change a weight.
            return variant.merge_safe(layer, adapter, weight.float()).detach()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """scaling B [out, r] and A [r, in] of all adapters together; None where there is no such
        pair (DoRA)."""
        if isinstance(self.module, QLoRALinear):
            pairs = [(self.module.lora_A, self.module.lora_B, self.module.scaling)]
        else:
            layer: Any = self.module
            if any(name in getattr(layer, "lora_variant", {}) for name in self.adapters):
                return None
            pairs = [
                (layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n])
                for n in self.adapters
            ]
        lora_b = torch.cat([b.detach().float() * s for _, b, s in pairs], dim=1)
        return lora_b, torch.cat([a.detach().float() for a, _, _ in pairs])

    def bias(self) -> Tensor | None:
        """The bias wanted: the base's, plus those that adapters brought."""
        if isinstance(self.module, QLoRALinear):
            return self.module.bias
        layer: Any = self.module
        bias = None if layer.base_layer.bias is None else layer.base_layer.bias.detach()
        for name in self.adapters:
            extra = layer.lora_B[name].bias if getattr(layer, "lora_bias", {}).get(name) else None
            if extra is not None:
                extra = extra.detach() * layer.scaling[name]
                bias = extra if bias is None else bias + extra.to(bias.dtype)
        return bias

    def merged(
        self, packed: PackedWeight, residual: tuple[Tensor, Tensor] | None = None
    ) -> NF4Linear:
        """The layer that replaces this one. residual: (B, A) that stay beside it as an adapter."""
        base: Any = getattr(self.module, "base_layer", self.module)
        dtype = base.compute_dtype if isinstance(base, NF4Linear) else None
        layer = NF4Linear(packed, self.bias(), dtype)
        if residual is not None:
            lora_b, lora_a = residual
            layer = QLoRALinear(layer, lora_a.shape[0], lora_a.shape[0])
            with torch.no_grad():
                layer.lora_A.copy_(lora_a)
                layer.lora_B.copy_(lora_b)
        return layer.requires_grad_(False).train(self.module.training)


def find_adapted(model: nn.Module) -> list[AdaptedLayer]:
    """The layers of `model` that have an active adapter, in the model's order.

    Raises QloraError when there is none, when an adapter is merged already or stands around another
    one, and for adapters of layers that are not 4-bit linear ones.
    """
    found = []
    for name, module in model.named_modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, QLoRALinear) and inner.adapter_enabled:
            raise QloraError(
                f"{name} has an adapter of peft around one of ours, and only one can be merged: "
                "merge ours before peft wraps the model"
            )
        if isinstance(module, QLoRALinear):
            if module.adapter_enabled:
                found.append(AdaptedLayer(name, module, module.packed, ("default",)))
        elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            adapters = _active(name, module)
            if adapters:
                packed = _packed(name, module.base_layer)
                found.append(AdaptedLayer(name, module, packed, adapters))
    if not found:
        raise QloraError(
            "the model has no active adapter to merge; call load_adapter(model, path) first, or "
            "enable_adapter(model) if it was disabled"
        )
    return found


def _active(name: str, module: Any) -> tuple[str, ...]:
    if getattr(module, "merged", False):
        raise QloraError(
            f"{name} has an adapter that peft has merged already; call model.unmerge_adapter(), "
            "or better load base and adapter again, since peft's unmerge rounds a second time"
        )
    if getattr(module, "disable_adapters", False):
        return ()
    return tuple(n for n in module.active_adapters if n in module.lora_A)


def _packed(name: str, base: Any) -> PackedWeight:
    if isinstance(base, NF4Linear):
        return base.packed
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if state is None or getattr(state, "quant_type", None) != "nf4":
        raise QloraError(
            f"{name} adapts a {type(base).__name__}, which is no NF4 layer; quantize the base "
            "first (quantize_model), or merge in 16 bits with peft's merge_and_unload()"
        )
    if hasattr(state, "packing_format_for_cpu"):
        raise QloraError(
            f"{name}: bitsandbytes has repacked this weight for its CPU kernel (a forward pass in "
            "evaluation mode does that, with loss); load the base model again and merge before "
            "running it, or load it with qlora_rs"
        )
    entries = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return PackedWeight.from_bitsandbytes({"weight": base.weight.data, **entries}, "weight")
