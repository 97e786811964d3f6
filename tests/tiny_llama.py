"""A random Llama of 0.3 million parameters, quantized and dense with the same weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_rs
from qlora_rs import NF4Linear

IDS = torch.arange(24).reshape(2, 12)


def dense() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def quantized() -> LlamaForCausalLM:
    return qlora_rs.quantize_model(dense())


def dequantized(model: nn.Module) -> nn.Module:
    """A plain float model that computes what the quantized model computes."""
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, NF4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight.data = layer.dequantize(torch.float32)
            qlora_rs.model.replace_module(plain, name, linear)
    return plain


def with_adapter(**options: object) -> LlamaForCausalLM:
    model = qlora_rs.add_lora(quantized(), **{"r": 4, "alpha": 8, **options})
    return randomize(model)


def randomize(model: nn.Module) -> nn.Module:
    """Give B values, so that the adapter changes something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def loss_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of a training step on ids."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits
