"""Give a transformers model the fused loss, and take it away again.

The model's own `forward` runs as ever. While it is called with labels, its output layer returns
`DeferredLogits`, and the model's own loss, with its shift, its `num_items_in_batch` and whatever it
adds, ends in `linear_cross_entropy` without logits. Nothing of transformers is imported or copied,
so nothing can drift from it.

Two objects are set in place of methods: `model.forward` and the output layer's `forward`, as
instance attributes (not hooks: peft calls `model.forward` past them).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs import _rust, cpu, ops
from qlora_rs.deferred_logits import DeferredLogits
from qlora_rs.errors import QloraError, check_model
from qlora_rs.layers import NF4Linear

# The output layer of the fused model that this thread is inside of, if it was called with labels.
_DEFERRING: ContextVar[Any] = ContextVar("qlora_rs_deferring", default=None)


def fuse_loss(model: nn.Module) -> nn.Module:
    """Let `model(input_ids=..., labels=...).loss` be computed without logits, in place.

    model: a causal language model of transformers, or one that peft wrapped. Its output layer must
    be an `nn.Linear` or `NF4Linear` without an adapter.
    From then on a call with labels, in training or evaluation, returns the model's own loss with
    `logits=None` (a tuple leaves them out), up to rounding; `linear_cross_entropy` says in which
    memory. Auxiliary losses (MoE) and scaled logits (Granite, Cohere) are honoured. Without labels,
    and in `generate`, there are logits as ever; those of up to 8 tokens without gradients are
    summed in float32 in one pass over a dense output layer's weight (last bits may differ).
    Gradient checkpointing works; `copy.deepcopy` and pickle keep the fused loss, saved weights
    never know of it.
    The model is called with two tokens, without gradients, to see that its loss can be computed
    so: one that does more with its logits (soft-capping in Gemma 2) is refused, and left as it was.
    Returns the model. Raises QloraError.

    transformers' Trainer takes this loss; metrics from logits (`compute_metrics`) get none. trl's
    SFTTrainer (1.16) brings a chunked loss of its own and never asks the model for one, so nothing
    changes there, unless a subclass says `compute_loss = transformers.Trainer.compute_loss`: it
    then trains with this loss, and logs neither entropy nor token accuracy. Releases of trl that
    take those from `outputs.logits` need the same subclass.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> ids = torch.arange(8)[None]
    >>> expected = model(input_ids=ids, labels=ids).loss
    >>> outputs = fuse_loss(model)(input_ids=ids, labels=ids)
    >>> bool(torch.isclose(outputs.loss, expected)), outputs.logits
    (True, None)
    """
    check_model(model)
    base = _base_model(model)
    if isinstance(base.__dict__.get("forward"), _FusedForward):
        raise QloraError("the model has the fused loss already; unfuse_loss(model) removes it")
    if "labels" not in inspect.signature(base.forward).parameters:
        raise QloraError(
            f"{type(base).__name__}.forward takes no labels, so it computes no loss to fuse; "
            "compute yours with linear_cross_entropy(hidden, weight, targets)"
        )
    layer = _output_layer(base)
    _FusedForward(base, layer).install()
    _DeferringForward(layer).install()
    try:
        _rehearse(base, layer.weight.device)
    except BaseException as error:
        unfuse_loss(base)
        if not isinstance(error, Exception) or isinstance(error, QloraError):
            raise
        raise QloraError(
            f"{type(base).__name__} cannot be called with two tokens to see how it computes its "
            f"loss ({type(error).__name__}: {error}); train it with its own loss"
        ) from error
    return model


def unfuse_loss(model: nn.Module) -> nn.Module:
    """Undo `fuse_loss`, in place: calls with labels return logits again. Returns the model."""
    check_model(model)
    base = _base_model(model)
    forward = base.__dict__.get("forward")
    if not isinstance(forward, _FusedForward):
        raise QloraError(
            f"{type(base).__name__} has no fused loss, or its forward was replaced since (as trl's "
            "trainers do); undo that first"
        )
    forward.layer.__dict__["forward"].remove()
    forward.remove()
    return model


def has_fused_loss(model: nn.Module) -> bool:
    """Whether `fuse_loss` fitted the model, whatever has been put around its forward since."""
    layer = _base_model(model).get_output_embeddings()
    return layer is not None and isinstance(layer.__dict__.get("forward"), _DeferringForward)


@contextmanager
def deferred_logits(model: nn.Module) -> Iterator[None]:
    """Inside, calls of a model with fused loss return `DeferredLogits`, also without labels.

    For a loss that the model does not compute itself, as of some positions; a cross-entropy of
    them is all that they are good for. Other models return logits as ever.
    """
    before = _DEFERRING.set(_base_model(model).get_output_embeddings())
    try:
        yield
    finally:
        _DEFERRING.reset(before)


class OwnForward:
    """A module's `forward` that replaces its class's, and goes where the module is copied to."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.replaced = module.__dict__.get("forward")

    @property
    def __wrapped__(self) -> Callable:
        """What was there before; `inspect.signature` asks for it too."""
        return self.replaced or MethodType(type(self.module).forward, self.module)

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        if self.replaced is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.replaced


def has_hook(module: Any) -> bool:
    """Whether somebody looks at what goes into a module, or comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def remove_forwards(model: nn.Module, kind: type[OwnForward], what: str) -> None:
    """Take away every forward of a kind; raise QloraError, naming `what`, where there is none."""
    found = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), kind)]
    if not found:
        raise QloraError(
            f"{type(model).__name__} has no fused {what} to undo; if they were fused, something "
            "replaced their forward since (as accelerate's hooks do): undo that first"
        )
    for module in found:
        module.__dict__["forward"].remove()


class _DeferringForward(OwnForward):
    """Of an output layer."""

    def __call__(self, hidden: Tensor) -> Tensor | DeferredLogits:
        if _DEFERRING.get() is self.module:
            return DeferredLogits.of_layer(self.module, hidden)
        if self.replaced is None and self._is_small(hidden):
            weight, bias = self.module.weight, self.module.bias
            bias = None if bias is None else cpu.plain(bias)
            return cpu.multiply_dense(False, cpu.plain(hidden), cpu.plain(weight), bias)
        return self.__wrapped__(hidden)

    def _is_small(self, hidden: Tensor) -> bool:
        """Whether the product is bound by reading the weight, and nobody looks on."""
        layer, shape = self.module, hidden.shape
        return (
            type(layer) is nn.Linear
            and not torch.is_grad_enabled()
            and ops.runs_directly(hidden)
            and ops.runs_directly(layer.weight)
            and hidden.is_cpu
            and layer.weight.is_cpu
            and layer.weight.is_contiguous()
            and hidden.dtype in ops.FLOATS
            and hidden.dtype is layer.weight.dtype
            and (layer.bias is None or layer.bias.dtype is hidden.dtype)
            and not torch.is_autocast_enabled("cpu")
            and shape[-1:] == layer.weight.shape[1:]
            and hidden.numel() <= _rust.FEW_DENSE_TOKENS * shape[-1]
        )


class _FusedForward(OwnForward):
    """Of a model."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__(model)
        self.layer = layer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._labels(arguments, options) is None:
            return self.__wrapped__(*arguments, **options)
        if self.module.get_output_embeddings() is not self.layer:
            raise QloraError(
                "the model's output layer was replaced after fuse_loss(model); call "
                "unfuse_loss(model) and fuse_loss(model) again"
            )
        before = _DEFERRING.set(self.layer)
        try:
            outputs = self.__wrapped__(*arguments, **options)
        finally:
            _DEFERRING.reset(before)
        return _without_logits(outputs)

    def _labels(self, arguments: tuple, options: dict) -> Tensor | None:
        if not arguments:  # as `generate` calls it for every token: a signature takes a while
            return options.get("labels")
        place = list(inspect.signature(self.__wrapped__).parameters).index("labels")
        return arguments[place] if len(arguments) > place else options.get("labels")


def _without_logits(outputs: Any) -> Any:
    """A tuple leaves out what is None, as transformers has it; a dataclass has the field None."""
    if isinstance(outputs, tuple):
        return tuple(value for value in outputs if not isinstance(value, DeferredLogits))
    if not dataclasses.is_dataclass(outputs):
        return outputs
    names = [field.name for field in dataclasses.fields(outputs)]
    deferred = [name for name in names if isinstance(getattr(outputs, name), DeferredLogits)]
    return dataclasses.replace(outputs, **dict.fromkeys(deferred))  # type: ignore[type-var]


def _rehearse(model: nn.Module, device: torch.device) -> None:
    """Call the model once, leaving its random numbers as they are."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = model(input_ids=ids, labels=ids, return_dict=True)
    if getattr(outputs, "loss", None) is None or getattr(outputs, "logits", None) is not None:
        raise QloraError(
            f"{type(model).__name__} does not compute its loss from what its output layer returns; "
            "train it with its own loss"
        )


def _base_model(model: Any) -> Any:
    """The model inside peft's wrapper, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _output_layer(model: Any) -> nn.Linear:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, NF4Linear):
        raise QloraError(
            f"the output layer of {type(model).__name__} is {type(layer).__name__}, and the fused "
            "loss takes an nn.Linear or an NF4Linear without adapter; leave it out of "
            "target_modules and modules_to_save, or compute the loss with linear_cross_entropy"
        )
    if layer.weight.device.type != "cpu":
        raise QloraError(
            f"the output layer is on {layer.weight.device}, and the fused loss is computed on the "
            'CPU; move the model there with .to("cpu")'
        )
    return layer
