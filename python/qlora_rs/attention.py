"""Give a transformers model's attention fewer steps, and take that away again.

Queries, keys and values are products of one x, and so one step; queries and keys are turned by
their positions in one pass (`rotary.py`).

A model's attention calls a function of its module, `apply_rotary_pos_emb`, and its projections. A
fused layer runs the same code, its class's `forward`, with our rotation under that name; and its
projections, when they are called, give what was computed beforehand. transformers' modules stay as
they are, and what else an attention does (caches, masks, norms of queries) is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_rs import rotary, shortcut
from qlora_rs.errors import QloraError, check_model
from qlora_rs.fusion import OwnForward, has_hook, remove_forwards
from qlora_rs.layers import QLoRALinear

# The layers' names in transformers.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_ROTATION = "apply_rotary_pos_emb"

# Per projection of the attention that this thread is inside of: x, its version, and its product.
_Ready: TypeAlias = dict[nn.Module, tuple[Tensor, int, Tensor]]
_READY: ContextVar[_Ready | None] = ContextVar("qlora_rs_ready", default=None)


def fuse_attention(model: nn.Module) -> nn.Module:
    """Compute each attention's projections in one step, and turn queries and keys in one pass.

    model: of transformers, plain or wrapped by peft; in place. Fused are modules whose `forward`
    calls `apply_rotary_pos_emb(q, k, cos, sin)`, if on a rehearsal that turns the halves of a head
    (Llama, Mistral, Qwen, Gemma; not neighbours, as GLM and Cohere do). While gradients are on, its
    projections q_proj, k_proj and v_proj go together, if all have adapters of `add_lora` (call
    this after it) and no bias.
    Results are equal to the bit, and gradients too where nothing else takes the attention's x
    (after a norm, that is; sums of more than its three parts have another order). Projections
    with dropout, hooks or another compute_dtype, and all under autocast, go one by one; other
    devices, positions of another type, heads turned in part and torch.compile take the model's own
    way, and so does everything if another `apply_rotary_pos_emb` is put into transformers later.
    Saved weights never know of it; `copy.deepcopy` and pickle keep it.
    Returns the model. Raises QloraError where there is nothing to fuse, or where it is fused
    already.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> model, ids = add_lora(quantize_model(model)), torch.arange(8)[None]
    >>> expected = model(input_ids=ids).logits
    >>> torch.equal(fuse_attention(model)(input_ids=ids).logits, expected)
    True
    """
    check_model(model)
    if any(isinstance(m.__dict__.get("forward"), FusedAttention) for m in model.modules()):
        raise QloraError("the model has fused attention already; unfuse_attention(model) undoes it")
    # One whose forward somebody has replaced (accelerate's hooks do) is theirs.
    own = [module for module in model.modules() if "forward" not in module.__dict__]
    fitting = [module for module in own if _turns_halves(type(module).forward)]
    if not fitting:
        raise QloraError(
            f"{type(model).__name__} has no module that calls {_ROTATION} to turn the halves of "
            "its heads, or something replaced its forward; leave fuse_attention out"
        )
    _with_rotation.cache_clear()  # what else transformers' modules hold may have been replaced
    for module in fitting:
        FusedAttention(module).install()
        for layer in _projections(module):
            if type(layer) is QLoRALinear and "forward" not in layer.__dict__:
                Projection(layer).install()
    return model


def unfuse_attention(model: nn.Module) -> nn.Module:
    """Undo `fuse_attention`, in place. Returns the model; raises QloraError where it was not."""
    check_model(model)
    remove_forwards(model, FusedAttention, "attention")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Projection):
            module.__dict__["forward"].remove()
    return model


class FusedAttention(OwnForward):
    """Of an attention."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.rotation = type(module).forward.__globals__[_ROTATION]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        forward: Any = type(self.module).forward
        # Not `__wrapped__`, which makes a method: a compiler could not follow that.
        if torch.compiler.is_compiling() or forward.__globals__[_ROTATION] is not self.rotation:
            return forward(self.module, *arguments, **options)
        forward = _with_rotation(forward)
        ready = self._projected(arguments[0] if arguments else options.get("hidden_states"))
        if ready is None:
            return forward(self.module, *arguments, **options)
        before = _READY.set(ready)
        try:
            return forward(self.module, *arguments, **options)
        finally:
            _READY.reset(before)

    def _projected(self, x: Any) -> _Ready | None:
        """What is ready for each projection; None where they are to be computed one by one."""
        if not torch.is_grad_enabled():  # graph nodes are what it saves
            return None
        layers = _projections(self.module)
        if not isinstance(x, Tensor) or not all(map(_is_usual, layers)):
            return None
        products = shortcut.products(layers, x)
        if products is None:
            return None
        version = x._version
        return {layer: (x, version, y) for layer, y in zip(layers, products, strict=True)}


class Projection(OwnForward):
    """Of a layer that an attention's other projections are computed with."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        ready = None if torch.compiler.is_compiling() else _READY.get()
        if ready is not None and len(arguments) == 1 and not options:
            x, version, y = ready.pop(self.module, (None, 0, None))
            if x is arguments[0] and x._version == version:
                return y
        return type(self.module).forward(self.module, *arguments, **options)


def _projections(module: nn.Module) -> list[Any]:
    return [module._modules.get(name) for name in PROJECTIONS]


def _is_usual(layer: Any) -> bool:
    """Whether a projection takes what is ready for it, and that is what it would compute."""
    return (
        type(layer) is QLoRALinear
        and isinstance(layer.__dict__.get("forward"), Projection)
        and not has_hook(layer)
        and not (layer.training and layer.dropout)
    )


@cache
def _with_rotation(forward: Any) -> Callable:
    """The same code, with our rotation under the name of its own."""
    theirs = forward.__globals__[_ROTATION]

    def apply(*arguments: Any, **options: Any) -> Any:
        if len(arguments) == 4 and not options and rotary.fits(*arguments):
            return rotary.rotate(*arguments)
        return theirs(*arguments, **options)

    # A function looks names up in a plain dict: those of its module, as they are now.
    names = {**forward.__globals__, _ROTATION: apply}
    rest = (forward.__name__, forward.__defaults__, forward.__closure__)
    ours = FunctionType(forward.__code__, names, *rest)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def _turns_halves(forward: Any) -> bool:
    """Whether a method calls a rotation that, on a rehearsal, does what ours does."""
    code = getattr(forward, "__code__", None)
    if code is None or _ROTATION not in code.co_names:
        return False
    return _is_ours(forward.__globals__.get(_ROTATION))


@cache
def _is_ours(theirs: Any) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    for dtype in (torch.float32, torch.bfloat16):
        # Two sequences, three tokens, heads of eight; a head's halves need not turn alike.
        q, k = (random(2, 3, heads, 8).to(dtype).transpose(1, 2) for heads in (4, 2))
        cosine, sine = random(1, 3, 8).to(dtype), random(1, 3, 8).to(dtype)
        with torch.no_grad():
            try:
                expected = theirs(q, k, cosine, sine)
            except Exception:  # another kind of function: it wants something else
                return False
        if not isinstance(expected, tuple) or len(expected) != 2:
            return False
        if not all(map(torch.equal, expected, rotary.rotate(q, k, cosine, sine))):
            return False
    return True
