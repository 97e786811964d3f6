"""The speed-ups of a transformers model that are opt-in in the library, each where it fits.

The commands take them all. In the library each is a call of its own, which refuses a model that it
does not fit; here such a model just goes without.
"""

from __future__ import annotations

from typing import Any

import qlora_rs
from qlora_rs import cpu
from qlora_rs.errors import QloraError


def speed_up(model: Any) -> tuple[str, ...]:
    """Fuse the model's loss, norms and MLPs and widen its attention, in place, where that fits.

    model: quantized, with its adapter if it gets one. Attention is widened on CPUs that multiply
    float32 faster than the model's half type. Returns the names of the functions that fitted.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> speed_up(qlora_rs.add_lora(qlora_rs.quantize_model(model)))
    ('fuse_loss', 'fuse_norms', 'fuse_mlps')
    """
    functions = [qlora_rs.fuse_loss, qlora_rs.fuse_norms, qlora_rs.fuse_mlps]
    if cpu.is_faster_in_float32(model.dtype):
        functions.append(qlora_rs.widen_attention)
    taken = []
    for function in functions:
        try:
            function(model)
        except QloraError:
            continue  # each leaves a model that it refuses as it was
        taken.append(function.__name__)
    return tuple(taken)
