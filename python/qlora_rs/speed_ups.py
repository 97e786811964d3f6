"""Every speed-up of a transformers model that fits it, in one call.

Each is opt-in, a function of its own, and refuses a model that it does not fit. Here such a model
just goes without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qlora_rs import cpu
from qlora_rs.attention import fuse_attention
from qlora_rs.errors import QloraError, check_model
from qlora_rs.fusion import fuse_loss
from qlora_rs.integrations.attention import widen_attention
from qlora_rs.mlp import fuse_mlps
from qlora_rs.norms import fuse_norms


def speed_up(model: nn.Module) -> tuple[str, ...]:
    """Call `fuse_loss`, `fuse_norms`, `fuse_mlps`, `fuse_attention` and `widen_attention`.

    model: of transformers, quantized, in place; with its adapter, if it gets one: call this last.
    Attention is widened on CPUs that multiply float32 faster than the model's half type. What each
    does, where it takes the model's own way, and what undoes it is said there: with them a call
    with labels returns a loss and no logits.
    Returns the names of the functions that fitted; one that was called before is not among them.
    Raises QloraError where model is no module.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> speed_up(add_lora(quantize_model(model)))
    ('fuse_loss', 'fuse_norms', 'fuse_mlps', 'fuse_attention')
    """
    check_model(model)
    functions: list[Callable] = [fuse_loss, fuse_norms, fuse_mlps, fuse_attention]
    if cpu.is_faster_in_float32(getattr(model, "dtype", torch.float32)):
        functions.append(widen_attention)
    taken = []
    for function in functions:
        try:
            function(model)
        except QloraError:
            continue  # each leaves a model that it refuses as it was
        taken.append(function.__name__)
    return tuple(taken)
