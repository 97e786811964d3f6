"""Every speed-up of a transformers model that fits it, in one call.

Each is opt-in, a function of its own, and refuses a model that it does not fit. Here such a model
just goes without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import nn

from qlora_rs import cpu
from qlora_rs.attention import fuse_attention, unfuse_attention
from qlora_rs.errors import QloraError, check_model
from qlora_rs.fusion import fuse_loss, unfuse_loss
from qlora_rs.integrations.attention import unwiden_attention, widen_attention
from qlora_rs.mlp import fuse_mlps, unfuse_mlps
from qlora_rs.norms import fuse_norms, unfuse_norms


def speed_up(model: nn.Module) -> tuple[str, ...]:
    """Call `fuse_loss`, `fuse_norms`, `fuse_mlps`, `fuse_attention` and `widen_attention`.

    model: of transformers, quantized, in place. Call this last: what is fused depends on the
    adapter, and a second call takes what has come to fit since.
    Attention is widened on CPUs that multiply float32 faster than the model's half type. What each
    does, where it takes the model's own way, and what undoes it is said there: with them a call
    with labels returns a loss and no logits.
    Returns the names of the functions that fitted; one that was called before is not among them.
    Called apart, each says by a `QloraError` why it does not fit; `undo_speed_up` undoes all.
    Raises QloraError where model is no module.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> speed_up(add_lora(quantize_model(model)))
    ('fuse_loss', 'fuse_norms', 'fuse_mlps', 'fuse_attention')
    """
    functions: list[Callable] = [fuse_loss, fuse_norms, fuse_mlps, fuse_attention]
    if cpu.is_faster_in_float32(getattr(model, "dtype", torch.float32)):
        functions.append(widen_attention)
    return _fitting(functions, model)


def undo_speed_up(model: nn.Module) -> tuple[str, ...]:
    """Undo every speed-up that the model has, in place; returns the names of what undid them.

    Raises QloraError where model is no module.

    >>> from transformers.models.llama.modeling_llama import LlamaRMSNorm
    >>> undo_speed_up(fuse_norms(LlamaRMSNorm(64)))
    ('unfuse_norms',)
    """
    functions = [unfuse_loss, unfuse_norms, unfuse_mlps, unfuse_attention, unwiden_attention]
    return _fitting(functions, model)


def _fitting(functions: Sequence[Callable[[nn.Module], object]], model: nn.Module) -> tuple:
    """Call each; the names of those that did not refuse, which leaves the model as it was."""
    check_model(model)
    taken = []
    for function in functions:
        with suppress(QloraError):
            function(model)
            taken.append(function.__name__)
    return tuple(taken)
