"""Compute a transformers model's attention in float32 while it is trained in a half type.

torch's attention for the CPU multiplies bfloat16 backward at a quarter of the speed it has in
float32 on CPUs whose products of bfloat16 are slow, and rounds every probability on the way. Here
queries, keys and values are widened on the way in, and results and gradients rounded once. Kept for
backward are the narrow ones alone; attention is computed again there, which costs less than memory.

Nothing is replaced: transformers' own registry of attention functions gets one more name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs import ops
from qlora_rs.errors import QloraError

# What the configuration calls it.
NAME = "sdpa_widened_by_qlora_rs"
_NARROW = (torch.bfloat16, torch.float16)


def widen_attention(model: nn.Module) -> nn.Module:
    """Let `model`, while it is trained on the CPU in bfloat16 or float16, attend in float32.

    model: of transformers, plain or wrapped by peft, whose attention is torch's ("sdpa", the
    default). Without gradients (`generate`, evaluation), with dropout inside attention, in float32,
    on other devices and under torch.compile, attention is what it was. Results are those of float32
    attention, rounded once; saved models and configurations never know of it. Undo it with
    `model.set_attn_implementation("sdpa")`. A copy keeps it; call this again after unpickling.
    Returns the model. Raises QloraError where attention is computed by something else.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> model = model.bfloat16()
    >>> ids = torch.arange(8)[None]
    >>> expected = model(input_ids=ids, labels=ids).loss
    >>> loss = widen_attention(model)(input_ids=ids, labels=ids).loss
    >>> bool(torch.isclose(loss, expected, rtol=1e-2))
    True
    """
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    current = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if current == NAME:
        raise QloraError(
            "the model's attention is widened already; model.set_attn_implementation("
            '"sdpa") undoes it'
        )
    if current != "sdpa" or not hasattr(base, "set_attn_implementation"):
        raise QloraError(
            f"{type(base).__name__} computes attention by {current!r}, and torch's is the one that "
            'can be widened; load the model with attn_implementation="sdpa", or leave '
            "widen_attention out"
        )
    _register()
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise QloraError(
            f"{type(base).__name__} does not take its attention from transformers' registry, so it "
            "cannot be widened; leave widen_attention out"
        )
    return model


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa function, in float32 where that is asked for."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attend = partial(sdpa_attention_forward, module)
    if not _is_trained_narrow(query, key, value, *arguments, **options):
        return attend(query, key, value, *arguments, **options)

    def wide(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A mask that is added has the activations' type; torch wants that of the queries.
        masks = [_wide(value) for value in arguments]
        named = {name: _wide(value) for name, value in options.items()}
        return attend(query.float(), key.float(), value.float(), *masks, **named)[0]

    return _Widened.apply(query, key, value, wide), None


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value


def _is_trained_narrow(
    query: Tensor, *arguments: Any, dropout: float = 0.0, **options: Any
) -> bool:
    tensors = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor)]
    key, value, *others = tensors
    return (
        torch.is_grad_enabled()
        and query.requires_grad
        and query.dtype in _NARROW
        and query.dtype == key.dtype == value.dtype
        and query.is_cpu
        and ops.runs_directly(query)
        and not dropout
        # A bias of positions that is learned, a cache in pages: rare, and theirs.
        and not any(t.requires_grad for t in others)
        and options.get("cache") is None
    )


class _Widened(torch.autograd.Function):
    """attend(query, key, value) with nothing kept but these."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.attend = attend
        return attend(query, key, value).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        inputs, twice = ctx.saved_tensors, torch.is_grad_enabled()
        if not twice:
            # Leaves of a graph of their own, already wide: their gradients are rounded once.
            inputs = [t.float().requires_grad_() for t in inputs]
        with torch.enable_grad():
            result = ctx.attend(*inputs)
            grads = torch.autograd.grad(result, inputs, grad.to(result.dtype), create_graph=twice)
        return *(g.to(grad.dtype) for g in grads), None
