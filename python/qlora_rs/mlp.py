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
from qlora_rs.errors import QloraError, check_model
from qlora_rs.fusion import OwnForward, has_hook, remove_forwards
from qlora_rs.layers import NF4Linear, QLoRALinear
from qlora_rs.model import is_of_peft

# The layers' names in transformers: gate, up, down.
LAYERS = ("gate_proj", "up_proj", "down_proj")


def fuse_mlps(model: nn.Module) -> nn.Module:
    """Compute each gated MLP of `model`, while it is trained, in one step, in place.

    model: of transformers, with adapters by `add_lora` on gate_proj, up_proj and down_proj. Fused
    are modules with these three whose results, on a rehearsal, are down(silu(gate x) ∘ up x);
    others (Gemma's, whose activation is GELU; layers with a bias) stay as they are. The adapters'
    dropout, hooks, a disabled adapter, another compute_dtype, autocast, torch.compile, calls
    without gradients and other devices take the modules' own way.
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
    check_model(model)
    found = [m for m in model.modules() if all(hasattr(m, name) for name in LAYERS)]
    if any(isinstance(m.__dict__.get("forward"), FusedMlp) for m in found):
        raise QloraError("the model has fused MLPs already; unfuse_mlps(model) removes them")
    reasons = [_reason_against(mlp) for mlp in found]
    if None not in reasons:
        kinds = sorted({f"{type(m).__name__} ({r})" for m, r in zip(found, reasons, strict=True)})
        raise QloraError(
            f"{type(model).__name__} has no MLP to fuse: "
            f"{', '.join(kinds) or 'no module has ' + ', '.join(LAYERS)}; or leave fuse_mlps out"
        )
    for mlp, reason in zip(found, reasons, strict=True):
        if reason is None:
            FusedMlp(mlp).install()
    return model


def unfuse_mlps(model: nn.Module) -> nn.Module:
    """Undo `fuse_mlps`, in place. Returns the model; raises QloraError where nothing is fused."""
    check_model(model)
    remove_forwards(model, FusedMlp, "MLPs")
    return model


class FusedMlp(OwnForward):
    """Of an MLP."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        # The activation, mostly: another one, or one with a hook, is not ours.
        self.others = _others(mlp)

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
        others = _others(self.module)
        if (
            not all(_is_usual(layer, x.dtype) for layer in layers)
            or len(others) != len(self.others)
            or not all(
                m is n and not _is_watched(m) for m, n in zip(others, self.others, strict=True)
            )
            or x.shape[-1:] != (layers[0].in_features,)
        ):
            return None
        try:
            operands: Any = [operand for layer in layers for operand in shortcut.operands(layer)]
        except shortcut.NOT_THIS_WAY:
            return None
        try:
            return _Mlp.apply(x, *operands)
        except shortcut.Elsewhere:
            return None


def _others(mlp: nn.Module) -> list[nn.Module | None]:
    return [module for name, module in mlp._modules.items() if name not in LAYERS]


def _is_watched(module: Any) -> bool:
    return has_hook(module) or "forward" in module.__dict__


def _is_usual(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer is nothing but a packed weight and a plain adapter that nobody looks at."""
    return (
        type(layer) is QLoRALinear
        and layer.adapter_enabled
        and not (layer.training and layer.dropout)
        and layer.compute_dtype in (None, dtype)
        and layer.bias is None
        and not _is_watched(layer)
    )


class _Mlp(torch.autograd.Function):
    """The MLP for operands that fit; keeps x, both products, and the bottlenecks' activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Any) -> Tensor:
        of_gate, gate_a, gate_b, of_up, up_a, up_b, of_down, down_a, down_b = operands
        gate, gate_hidden = shortcut.forward(x, of_gate, gate_a, gate_b)
        up, up_hidden = shortcut.forward(x, of_up, up_a, up_b)
        gated = torch.empty(gate.shape, dtype=gate.dtype)
        _rust.gated(to_dlpack(gate), to_dlpack(up), to_dlpack(gated), torch.get_num_threads())
        y, down_hidden = shortcut.forward(gated, of_down, down_a, down_b)
        products = (gate, up, gate_hidden, up_hidden, down_hidden)
        ctx.save_for_backward(x, *products, gate_a, gate_b, up_a, up_b, down_a, down_b)
        ctx.weights = (of_gate, of_up, of_down)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, gate, up, gate_hidden, up_hidden, down_hidden, *factors = ctx.saved_tensors
        for weight in ctx.weights:
            weight.check_unchanged()
        if ops.runs_directly(grad) and not torch.is_grad_enabled():
            grad = cpu.plain(grad)
        if not shortcut.is_plain(grad, x):
            grad_x, *grads = _written_out(grad, x, factors, ctx.weights)
            return grad_x, None, *grads[:2], None, *grads[2:4], None, *grads[4:]
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
        return grad_x.add_(other), None, *gates, None, *ups, None, *downs


def _written_out(
    grad: Tensor, x: Tensor, factors: list[Tensor], weights: tuple[shortcut.Weight, ...]
) -> list[Tensor | None]:
    """The gradients of x and the factors, where somebody looks on or differentiates once more."""
    twice = torch.is_grad_enabled()
    operands = [x, *factors]
    with torch.enable_grad():
        # New each, so that a gradient is one operand's alone: x may come of the same factors.
        if twice:
            operands = [tensor.view_as(tensor) for tensor in operands]
        else:
            operands = [tensor.detach().requires_grad_() for tensor in operands]
        x, *factors = operands

        def product(x: Tensor, i: int) -> Tensor:
            adapter = (*factors[2 * i : 2 * i + 2], weights[i].scaling)
            return autograd.lora_linear(x, *weights[i].arguments(), *adapter, None)

        y = product(nn.functional.silu(product(x, 0)) * product(x, 1), 2)
    wanted = [tensor for tensor in operands if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=twice))
    return [next(found) if tensor.requires_grad else None for tensor in operands]


# Rows of the rehearsal, of different sizes: where an MLP limits large values, it shows in the last.
_REHEARSED_SIZES = (1.0, 0.05, 300.0)


def _reason_against(mlp: Any) -> str | None:
    """Why the module cannot be fused, or None: on a rehearsal it does what ours does."""
    # Of a module whose forward somebody has replaced (accelerate's hooks do), it is theirs.
    if "forward" in mlp.__dict__:
        return "something replaced its forward"
    layers = {name: getattr(mlp, name) for name in LAYERS}
    for name, layer in layers.items():
        if type(layer) is not QLoRALinear:
            if is_of_peft(layer):
                return f"{name} has peft's adapter, which it computes itself"
            if isinstance(layer, NF4Linear):
                return f"{name} has no adapter: call add_lora(model) first"
            return f"{name} is {type(layer).__name__}: quantize_model and add_lora come first"
        if layer.bias is not None:
            return f"{name} has a bias"
        if not layer.weight.is_cpu:
            return f"{name} is on {layer.weight.device} and not on the CPU"
    try:
        fits = _rehearse(mlp, *layers.values())
    except Exception as error:  # it wants more than x, or layers that do not fit
        return f"{type(error).__name__} when called with rows of {LAYERS[0]}'s width"
    return None if fits else "it computes something else than down(silu(gate x) * up x)"


def _rehearse(mlp: Any, gate: Any, up: Any, down: Any) -> bool:
    """Whether the module's results while it trains, its adapters' dropout aside, are ours."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(_REHEARSED_SIZES), 1, gate.in_features)
    sizes = torch.tensor(_REHEARSED_SIZES, device="cpu")[:, None, None]
    x = torch.randn(shape, generator=generator, device="cpu") * sizes
    modes = [(module, module.training) for module in mlp.modules()]
    try:
        for module, _ in modes:
            module.training = module not in (gate, up, down)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ours = down(nn.functional.silu(gate(x)) * up(x))
            theirs = mlp(x)
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(theirs, Tensor) or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return False
    # A layer may compute in another type than x's: what it rounds, it rounds for both.
    largest = ours.abs().amax(-1, keepdim=True)
    return bool(((ours - theirs).abs() <= 1e-5 * largest).all())
