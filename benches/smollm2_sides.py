"""The sides of `benches.smollm2`: each builds the same model from the same 4-bit folder.

ours            qlora_rs
bitsandbytes    transformers + bitsandbytes + peft
rest            ours with adapted layers that take no time, called one by one: what is left is the
                bound of any library that replaces these layers and nothing else

Each imports its own libraries, where it is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

R, ALPHA = 16, 32


def write_folder(folder: Path) -> None:
    """SmolLM2-135M with NF4 layers, as both sides load it."""
    import qlora_rs
    from qlora_rs.recipes.base_model import demo_model_path, load_base_model
    from qlora_rs.recipes.quantized_folder import save_quantized_folder

    base = load_base_model(demo_model_path(), "bfloat16")
    save_quantized_folder(qlora_rs.quantize_model(base.model), base.tokenizer, folder)


def build(side: str, folder: Path) -> nn.Module:
    """The model with adapters on all linear layers, as a user of either library builds it."""
    torch.manual_seed(0)
    if side == "bitsandbytes":
        return theirs(folder)
    import qlora_rs
    from qlora_rs.model import lora_layers, replace_module
    from qlora_rs.recipes.quantized_folder import load_quantized_folder

    model = load_quantized_folder(folder, "bfloat16", with_tokenizer=False).model
    model = qlora_rs.add_lora(model, r=R, alpha=ALPHA)
    qlora_rs.speed_up(model)
    if side == "rest":
        for name, layer in lora_layers(model).items():
            replace_module(model, name, FreeLayer(layer))
    return model


def theirs(folder: Path) -> nn.Module:
    """peft over bitsandbytes' layers, loaded by transformers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.requires_grad_(False)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


class FreeLayer(nn.Module):
    """A layer whose results and gradients are constants that are ready before it is called."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.sizes = (layer.out_features, layer.in_features)
        self.ready: dict[tuple[int, int], Tensor] = {}

    def constant(self, like: Tensor, features: int) -> Tensor:
        """Small numbers of the shape [..., features]."""
        rows = like.numel() // max(like.shape[-1], 1)
        if (rows, features) not in self.ready:
            self.ready[rows, features] = 0.01 * torch.randn(rows, features, dtype=like.dtype)
        return self.ready[rows, features].view(*like.shape[:-1], features)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return Constant.apply(x, self.lora_A, self.lora_B, self)
        return self.constant(x, self.sizes[0])


class Constant(torch.autograd.Function):
    """Constant results, constant gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: FreeLayer) -> Tensor:
        ctx.layer = layer
        return layer.constant(x, layer.sizes[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        layer = ctx.layer
        factors = (layer.constant(m, m.shape[1]) for m in (layer.lora_A, layer.lora_B))
        return layer.constant(grad, layer.sizes[1]), *factors, None
