"""Compute a transformers model's attention in float32 while it is trained in a half type.

On CPUs whose products of bfloat16 are slow, torch's attention takes longer in that type than in
float32, backward most of all, and it rounds every probability on the way. Here queries, keys and
values are widened on the way in, and results and gradients rounded once. Kept for backward are the
narrow ones (and a mask) alone; attention is computed again there, which costs less than memory. Of
short texts the wide ones are kept, with what torch keeps.

transformers looks its attention functions up by name. What is registered as "sdpa" becomes a
function that asks the layer whether it is widened, and calls what was registered before. The name
in the configuration stays, for models and trainers compare it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs import ops
from qlora_rs.errors import QloraError, check_model

_NARROW = (torch.bfloat16, torch.float16)
# A widened attention layer has this attribute.
_MARK = "_qlora_rs_widened"
# Float32 queries, keys and values that may be kept for backward, per layer. Those of 273 tokens of
# SmolLM2-135M: of such texts attention takes no longer than torch needs to begin with it again.
_KEPT_BYTES = 1 << 20


def widen_attention(model: nn.Module) -> nn.Module:
    """Let `model`, while it is trained on the CPU in bfloat16 or float16, attend in float32.

    model: of transformers, plain or wrapped by peft, whose attention is torch's ("sdpa", the
    default). Marks its layers named "...Attention...", and registers a function under "sdpa" that
    computes those in float32 and rounds results and gradients once; layers of other models take
    the way they took, and so do parts of this one that were loaded with another attention.
    Without gradients (`generate`, evaluation, the first pass of a reentrant checkpoint), with
    dropout inside attention, in float32, on other devices and under torch.compile attention is
    what it was. Saved weights and configurations never know of it; `copy.deepcopy` and pickle keep
    it (in another process, call this again).
    Returns the model. Raises QloraError where attention is computed by something else.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> model, ids = model.bfloat16(), torch.arange(8)[None]
    >>> expected = model(input_ids=ids, labels=ids).loss
    >>> loss = widen_attention(model)(input_ids=ids, labels=ids).loss
    >>> bool(torch.isclose(loss, expected, rtol=1e-2))
    True
    """
    check_model(model)
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    current = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if current is None:
        raise QloraError(
            f"{type(base).__name__} does not say how it computes attention, as models of "
            "transformers do; leave widen_attention out"
        )
    if current != "sdpa":
        raise QloraError(
            f"{type(base).__name__} computes attention by {current!r}, and torch's is the one that "
            'can be widened; load the model with attn_implementation="sdpa", or leave '
            "widen_attention out"
        )
    layers = [m for m in base.modules() if "Attention" in type(m).__name__]
    asks_registry = getattr(base, "_can_set_attn_implementation", None)
    if not layers or asks_registry is None or not asks_registry():
        raise QloraError(
            f"{type(base).__name__} does not take its attention from transformers' registry, so it "
            "cannot be widened; leave widen_attention out"
        )
    if _register() and all(_MARK in layer.__dict__ for layer in layers):
        raise QloraError(
            "the model's attention is widened already; unwiden_attention(model) undoes it"
        )
    for layer in layers:
        layer.__dict__[_MARK] = True
    return model


def unwiden_attention(model: nn.Module) -> nn.Module:
    """Undo `widen_attention`, in place. Returns the model; raises QloraError where it was not."""
    check_model(model)
    widened = [m for m in model.modules() if _MARK in m.__dict__]
    if not widened:
        raise QloraError(
            f"{type(model).__name__} has no widened attention to undo; widen_attention(model) "
            "was not called, or it was undone"
        )
    for layer in widened:
        del layer.__dict__[_MARK]
    return model


class _Attend:
    """transformers' sdpa function; in float32 for marked layers where that is asked for."""

    def __init__(self, before: Callable[..., tuple[Tensor, None]]) -> None:
        self.before = before

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *arguments: Any,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if (
            not torch.is_grad_enabled()
            or _MARK not in module.__dict__
            or not _fits(query, key, value, *arguments, **options)
        ):
            return self.before(module, query, key, value, *arguments, **options)
        attend = partial(self.before, module)

        def wide(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # A mask that is added has the activations' type; torch wants that of the queries.
            masks = [_wide(value) for value in arguments]
            named = {name: _wide(value) for name, value in options.items()}
            # Autocast would make everything narrow again.
            with torch.autocast("cpu", enabled=False):
                return attend(query.float(), key.float(), value.float(), *masks, **named)[0]

        return _widened(query, key, value, wide), None


def _register() -> bool:
    """Whether ours was registered already."""
    from transformers import AttentionInterface

    before = AttentionInterface()["sdpa"]
    if isinstance(before, _Attend):
        return True
    AttentionInterface.register("sdpa", _Attend(before))
    return False


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value


def _fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
    dropout: float = 0.0,
    **options: Any,
) -> bool:
    """Whether a narrow attention is trained here, and nothing beside query, key and value."""
    others = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor)]
    return (
        (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.dtype in _NARROW
        and query.dtype == key.dtype == value.dtype
        and query.is_cpu
        and ops.runs_directly(query)
        and not dropout
        # transformers names all but the mask; by place, a dropout could be among them.
        and len(arguments) <= 1
        # A bias of positions that is learned, a cache in pages: rare, and theirs.
        and not any(t.requires_grad for t in others)
        and options.get("cache") is None
    )


def _widened(
    query: Tensor, key: Tensor, value: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """What `attend` gives for wide operands, narrow."""
    if 4 * (query.numel() + key.numel() + value.numel()) <= _KEPT_BYTES:
        return attend(query, key, value).to(query.dtype)
    return _Widened.apply(query, key, value, attend)


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
        twice = torch.is_grad_enabled()
        # Wide and new each, so that a gradient is one operand's alone and is rounded once; with a
        # graph behind them where the gradient is to be differentiated again.
        with torch.set_grad_enabled(twice):
            inputs = [t.float() for t in ctx.saved_tensors]
        inputs = [t if t.requires_grad else t.requires_grad_() for t in inputs]
        with torch.enable_grad():
            result = ctx.attend(*inputs)
            grads = torch.autograd.grad(result, inputs, grad.to(result.dtype), create_graph=twice)
        return *(g.to(grad.dtype) for g in grads), None
