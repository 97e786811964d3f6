"""Train a transformers model's gated MLPs in one step each, and take that away again.

    y = (silu(x Gᵀ) ∘ x Uᵀ) Dᵀ                      (SwiGLU, arXiv 2002.05202, equation 6)

with G, U and D packed and adapted. Module by module, autograd keeps four matrices as wide as the
MLP: both products, the activation and what `down_proj` takes. Here it keeps the two products and
computes the others again, in the pass that yields the gradients (`rust/gated.rs`). A step's time
goes down too, in a small model's by what modules and graph nodes cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust, autograd, cpu, ops, shortcut
from qlora_rs.errors import QloraError
from qlora_rs.fusion import OwnForward
from qlora_rs.layers import QLoRALinear

# The layers' names in transformers: gate, up, down.
LAYERS = ("gate_proj", "up_proj", "down_proj")


def fuse_mlps(model: nn.Module) -> nn.Module:
    """Compute each gated MLP of `model`, while it is trained, in one step, in place.

    model: of transformers, with adapters by `add_lora` on gate_proj, up_proj and down_proj. Fused
    are modules with these three whose results, on a rehearsal, are down(silu(gate x) ∘ up x);
    others (Gemma's, whose activation is GELU; layers with a bias) stay as they are. The adapters'
    dropout, a layer's hook, a disabled adapter, another compute_dtype, autocast, torch.compile and
    calls without gradients take the modules' own way, on other devices too.
    Between the products values are float32, rounded once, where torch rounds the activation as
    well: last bits change. Saved weights never know of it; `copy.deepcopy` and pickle keep it.
    Returns the model. Raises QloraError where there is no MLP to fuse, or where they are fused
    already.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=1, **sizes))
    >>> model = add_lora(quantize_model(model))
    >>> ids = torch.arange(8)[None]
    >>> expected = model(input_ids=ids, labels=ids).loss
    >>> bool(torch.isclose(fuse_mlps(model)(input_ids=ids, labels=ids).loss, expected))
    True
    """
    found = [m for m in model.modules() if all(hasattr(m, name) for name in LAYERS)]
    if any(isinstance(m.__dict__.get("forward"), FusedMlp) for m in found):
        raise QloraError("the model has fused MLPs already; unfuse_mlps(model) removes them")
    # One whose forward somebody has replaced (accelerate's hooks do) is theirs.
    fitting = [m for m in found if "forward" not in m.__dict__ and _is_gated_mlp(m)]
    if not fitting:
        names = ", ".join(sorted({type(m).__name__ for m in found})) or "none"
        raise QloraError(
            f"{type(model).__name__} has no MLP of the form down(silu(gate x) * up x) with an "
            f"adapter on all three layers (modules with {', '.join(LAYERS)}: {names}); call "
            "add_lora(model) first, or leave fuse_mlps out"
        )
    for mlp in fitting:
        FusedMlp(mlp).install()
    return model


def unfuse_mlps(model: nn.Module) -> nn.Module:
    """Undo `fuse_mlps`, in place. Returns the model; raises QloraError where nothing is fused."""
    fused = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedMlp)]
    if not fused:
        raise QloraError(
            f"{type(model).__name__} has no fused MLPs, or their forward was replaced since (as "
            "accelerate's hooks do); undo that first"
        )
    for mlp in fused:
        mlp.__dict__["forward"].remove()
    return model


class FusedMlp(OwnForward):
    """Of an MLP."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if len(arguments) == 1 and not options:
            y = self._step(arguments[0])
            if y is not None:
                return y
        # Not `__wrapped__`, which makes a method: a compiler could not follow that.
        return type(self.module).forward(self.module, *arguments, **options)

    def _step(self, x: Any) -> Tensor | None:
        """The MLP's y, or None where this way does not lead there."""
        if (
            not torch.is_grad_enabled()
            or not ops.runs_directly(x)
            or not x.is_cpu
            or not x.requires_grad
            or not x.is_contiguous()
            or x.dtype not in ops.FLOATS
            or torch.is_autocast_enabled("cpu")
            or torch_module._has_any_global_hook()
        ):
            return None
        layers = [self.module._modules.get(name) for name in LAYERS]
        if not all(_is_usual(layer, x.dtype) for layer in layers):
            return None
        try:
            weights = tuple([_weight(layer) for layer in layers])
            factors = [m for layer in layers for m in _factors(layer)]
            return _Mlp.apply(x, *factors, weights)
        # Raised before anything is kept: the modules' own way knows what to do or whom to refuse.
        except shortcut.NOT_THIS_WAY:
            return None


def _is_usual(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer is nothing but a packed weight and a plain adapter that nobody looks at."""
    return (
        type(layer) is QLoRALinear
        and layer.adapter_enabled
        and not (layer.training and layer.dropout)
        and layer.compute_dtype in (None, dtype)
        and layer.bias is None
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )


def _weight(layer: Any) -> shortcut.Weight:
    held, size = layer._parameters, (layer.out_features, layer.in_features)
    packed = tuple([held[name] for name in shortcut.PACKED])
    return shortcut.Weight.of(packed, size, layer.block_size, layer.scaling)


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B; refused where they are not plain matrices that fit."""
    lora_a, lora_b = layer._parameters["lora_A"], layer._parameters["lora_B"]
    rank = lora_a.size(0)
    fits = (lora_a.shape, lora_b.shape) == ((rank, layer.in_features), (layer.out_features, rank))
    if not fits or rank < 1 or lora_a.is_neg() or lora_b.is_neg():
        raise QloraError("an adapter does not fit its layer")
    return lora_a, lora_b


class _Mlp(torch.autograd.Function):
    """The MLP for operands that fit; keeps x, both products, and the bottlenecks' activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Any) -> Tensor:
        gate_a, gate_b, up_a, up_b, down_a, down_b, weights = operands
        gate, gate_hidden = shortcut.forward(x, weights[0], gate_a, gate_b)
        up, up_hidden = shortcut.forward(x, weights[1], up_a, up_b)
        gated = torch.empty(gate.shape, dtype=gate.dtype)
        _rust.gated(to_dlpack(gate), to_dlpack(up), to_dlpack(gated), torch.get_num_threads())
        y, down_hidden = shortcut.forward(gated, weights[2], down_a, down_b)
        ctx.save_for_backward(x, gate, up, gate_hidden, up_hidden, down_hidden, *operands[:6])
        ctx.weights = weights
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, gate, up, gate_hidden, up_hidden, down_hidden, *factors = ctx.saved_tensors
        for weight in ctx.weights:
            weight.check_unchanged()
        if ops.runs_directly(grad) and not torch.is_grad_enabled():
            grad = cpu.plain(grad)
        if not shortcut.is_plain(grad, x):
            return *_written_out(grad, x, factors, ctx.weights), None
        gate_a, gate_b, up_a, up_b, down_a, down_b = factors
        of_gate, of_up, of_down = ctx.weights
        # `down_proj` took silu(gate) ∘ up. Its gradient comes first; the pass that turns it into
        # those of gate and up leaves that product in its place, for A's gradient.
        gated, grad_hidden = shortcut.backward_product(grad, of_down, down_a, down_b)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _rust.gated_gradients(
            to_dlpack(gate),
            to_dlpack(up),
            to_dlpack(gated),
            to_dlpack(grad_gate),
            to_dlpack(grad_up),
            torch.get_num_threads(),
        )
        downs = cpu.factor_gradients(grad, gated, down_hidden, grad_hidden, down_a, down_b)
        grad_x, *gates = shortcut.backward(grad_gate, x, gate_hidden, of_gate, gate_a, gate_b)
        other, *ups = shortcut.backward(grad_up, x, up_hidden, of_up, up_a, up_b)
        return grad_x.add_(other), *gates, *ups, *downs, None


def _written_out(
    grad: Tensor, x: Tensor, factors: list[Tensor], weights: tuple[shortcut.Weight, ...]
) -> list[Tensor | None]:
    """The gradients of x and the factors, where somebody looks on or differentiates once more."""
    twice = torch.is_grad_enabled()
    operands = [x, *factors]
    if not twice:
        operands = [tensor.detach().requires_grad_() for tensor in operands]
    with torch.enable_grad():
        x, *factors = operands

        def product(x: Tensor, i: int) -> Tensor:
            packed, size, block_size, scaling, _ = weights[i]
            adapter = (*factors[2 * i : 2 * i + 2], scaling)
            return autograd.lora_linear(x, *packed, *size, block_size, *adapter, None)

        y = product(nn.functional.silu(product(x, 0)) * product(x, 1), 2)
    wanted = [tensor for tensor in operands if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=twice))
    return [next(found) if tensor.requires_grad else None for tensor in operands]


def _is_gated_mlp(mlp: Any) -> bool:
    """Whether the module, on a rehearsal, does what ours does."""
    layers = [mlp._modules.get(name) for name in LAYERS]
    if not all(type(m) is QLoRALinear and m.weight.is_cpu and m.bias is None for m in layers):
        return False
    gate, up, down = layers
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 3, gate.in_features), generator=generator, device="cpu")
    x = x.to(gate.compute_dtype or gate.weight_dtype)
    with torch.no_grad():
        try:
            ours = down(nn.functional.silu(gate(x)) * up(x))
            theirs = mlp(x)
        except Exception:  # another kind of module: it wants more than x, or layers that fit not
            return False
    if not isinstance(theirs, Tensor) or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return False
    close = torch.finfo(ours.dtype).eps * 4 * float(ours.abs().max())
    return torch.allclose(ours, theirs, rtol=0.0, atol=close)
