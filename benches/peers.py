"""Ours, torch and bitsandbytes behind one interface: a layer with the same packed bytes.

A contender is a function of x that returns y. `check` compares every contender with the float64
product before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import peft
import torch
from torch import Tensor, nn

import qlora_rs
from qlora_rs import NF4Linear, PackedWeight, QLoRALinear

Layer = Callable[[Tensor], Tensor]

# Largest error of y, divided by the largest |y|. bitsandbytes' eval path rounds absmax to bf16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
EVAL_TOLERANCE = 5e-2


def bitsandbytes_layer(packed: PackedWeight, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' Linear4bit around the bytes of a packed weight."""
    entries = packed.to_bitsandbytes("weight")
    codes = entries.pop("weight").clone()
    statistics = {key.removeprefix("weight."): value for key, value in entries.items()}
    out_features, in_features = packed.shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        codes, statistics, device="cpu", module=layer
    )
    return layer


def linear_layers(packed: PackedWeight, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Plain layers: no adapter."""
    dense = nn.Linear(packed.shape[1], packed.shape[0], bias=False, dtype=dtype)
    dense.weight = nn.Parameter(packed.dequantize(dtype), requires_grad=False)
    ours = NF4Linear(packed)
    return {
        "ours": ours,
        "ours eval": ours,
        "torch dense": dense,
        "dense eval": dense,
        "bnb autograd": bitsandbytes_layer(packed, dtype).train(),
        "bnb eval": bitsandbytes_layer(packed, dtype).eval(),
    }


def lora_layers(packed: PackedWeight, dtype: torch.dtype, r: int) -> dict[str, nn.Module]:
    """Layers with an adapter of rank r in x's dtype, with the same values; the peer is peft."""
    ours = QLoRALinear(NF4Linear(packed), r=r, alpha=2 * r, dtype=dtype)
    nn.init.normal_(ours.lora_B, std=0.1)
    plain = linear_layers(packed, dtype)
    names = ("torch dense", "bnb autograd", "bnb eval")
    theirs = {name: with_peft(plain[name], ours) for name in names}
    return {"ours": ours, "ours eval": ours, "dense eval": theirs["torch dense"], **theirs}


def with_peft(base: nn.Module, ours: QLoRALinear) -> nn.Module:
    """The same adapter by peft around another layer."""
    model = nn.Sequential(base).train(base.training)
    # How transformers tells peft to use its class for Linear4bit.
    model.is_loaded_in_4bit = isinstance(base, bitsandbytes.nn.Linear4bit)
    config = peft.LoraConfig(r=ours.r, lora_alpha=ours.alpha, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0]
    for matrices, values in ((layer.lora_A, ours.lora_A), (layer.lora_B, ours.lora_B)):
        matrices["default"].weight = nn.Parameter(values.detach().clone())
    return layer.train(base.training)


def forward(layer: Layer, x: Tensor, training: bool) -> Callable[[], Tensor]:
    """A call of the layer; in training, on an x that wants a gradient, as inside a model."""
    if training:
        return lambda: layer(x)

    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], tuple]:
    """Forward and the gradients of x and of the adapter."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, grad)


def check(name: str, y: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Refuse to time a contender whose answer is wrong."""
    tolerance = EVAL_TOLERANCE if name == "bnb eval" else TOLERANCE[dtype]
    error = float((y.detach().double() - exact).abs().max() / exact.abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong by {error:.2g} of the largest result: not timed")


def exact_product(x: Tensor, packed: PackedWeight, ours: nn.Module | None = None) -> Tensor:
    """y in float64, with the adapter that `ours` has, if it has one."""
    x = x.detach().double()
    y = x @ packed.dequantize(torch.float64).t()
    if isinstance(ours, QLoRALinear):
        a, b = ours.lora_A.detach().double(), ours.lora_B.detach().double()
        y += ours.scaling * (x @ a.t() @ b.t())
    return y


def packed_weight(out_features: int, in_features: int) -> PackedWeight:
    """A weight as trained ones look: normal, of the usual size."""
    torch.manual_seed(0)
    return qlora_rs.quantize(torch.randn(out_features, in_features) * in_features**-0.5)
