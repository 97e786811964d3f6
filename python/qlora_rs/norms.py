"""Give a transformers model's RMS norms one pass over memory each, and take it away again.

    r = 1 / √(mean x² + ε)      y = w ∘ (x r)                       (arXiv 1910.07467, equation 4)
    g = w ∘ dY                  dX = r (g - x r mean(g ∘ x r))      (differentiated by hand)

Written out in torch, as transformers has it, a norm is eight operators forward and more backward,
each of which reads and writes all activations, and it keeps a float32 copy of them. A model has two
norms for every seven linear layers, so they show. The arithmetic is `rust/rms_norm.rs`: float32,
rounded where the written-out norm rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust, cpu, ops
from qlora_rs.errors import QloraError, check_model
from qlora_rs.fusion import OwnForward, remove_forwards

# Rows of the rehearsal, of different sizes: epsilon matters in the smallest.
_REHEARSED_SIZES = (1.0, 1e-3, 30.0)


def fuse_norms(model: nn.Module) -> nn.Module:
    """Compute the model's RMS norms in one pass each, forward and backward, in place.

    model: of transformers, plain or wrapped by peft. Fused are modules named "...RMSNorm" whose
    results, on a rehearsal, are w ∘ x / √(mean x² + ε) within two roundings; others (Gemma's, which
    multiply by 1 + w; LayerNorm) stay as they are. A fused norm's call takes its own way again
    where x is not on the CPU or not float32, float16 or bfloat16 as w is, where w is trained, and
    under torch.compile.
    Values change in their last bit, saved weights never know of it; `copy.deepcopy` and pickle keep
    the fused norms. Returns the model. Raises QloraError where there is no norm to fuse, or where
    norms are fused already.

    >>> from transformers.models.llama.modeling_llama import LlamaRMSNorm
    >>> norm = LlamaRMSNorm(64).requires_grad_(False)
    >>> x = torch.randn(3, 64)
    >>> expected = norm(x)
    >>> bool(torch.allclose(fuse_norms(norm)(x), expected))
    True
    """
    check_model(model)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    if any(isinstance(norm.__dict__.get("forward"), FusedNorm) for norm in norms):
        raise QloraError("the model has fused norms already; unfuse_norms(model) removes them")
    # One whose forward somebody has replaced (accelerate's hooks do) is theirs.
    own = [norm for norm in norms if "forward" not in norm.__dict__]
    fitting = [norm for norm in own if _is_root_mean_square(norm)]
    if not fitting:
        found = ", ".join(sorted({type(norm).__name__ for norm in norms})) or "none"
        raise QloraError(
            f"{type(model).__name__} has no RMS norm of the usual formula on the CPU (norms named "
            f"so: {found}), or something replaced its forward; leave fuse_norms out"
        )
    for norm in fitting:
        FusedNorm(norm).install()
    return model


def unfuse_norms(model: nn.Module) -> nn.Module:
    """Undo `fuse_norms`, in place. Returns the model."""
    check_model(model)
    remove_forwards(model, FusedNorm, "norms")
    return model


class FusedNorm(OwnForward):
    """Of a norm."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if len(arguments) == 1 and not options and self._fits(arguments[0]):
            x, weight, epsilon = arguments[0], self.module.weight, _epsilon(self.module)
            if torch.is_grad_enabled() and x.requires_grad:
                return _Norm.apply(x, weight, epsilon)
            return _rms_norm(x, weight, epsilon)
        # Not `__wrapped__`, which makes a method: a compiler could not follow that.
        return type(self.module).forward(self.module, *arguments, **options)

    def _fits(self, x: Any) -> bool:
        weight = self.module.weight
        return (
            ops.runs_directly(x)
            and x.is_cpu
            and weight.is_cpu
            and x.dtype is weight.dtype
            and x.dtype in ops.FLOATS
            and x.shape[-1:] == weight.shape
            and not (weight.requires_grad and torch.is_grad_enabled())
        )


class _Norm(torch.autograd.Function):
    """Keeps x alone, and computes r again: that is cheaper than memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return _rms_norm(x, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if ops.runs_directly(grad) and not torch.is_grad_enabled():
            return _rms_norm(x, weight, ctx.epsilon, grad), None, None
        # Somebody looks on, or differentiates once more: the same, written out.
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + ctx.epsilon).rsqrt()
        normal, wide_grad = wide * scale, (grad * weight).float()
        mean = (wide_grad * normal).mean(-1, keepdim=True)
        return (scale * (wide_grad - normal * mean)).to(x.dtype), None, None


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, grad: Tensor | None = None) -> Tensor:
    """The norm of x, or, with the result's gradient, the gradient over x."""
    x = cpu.plain(x)
    out = torch.empty_like(x)
    _rust.rms_norm(
        to_dlpack(x),
        to_dlpack(cpu.plain(weight)),
        epsilon,
        None if grad is None else to_dlpack(cpu.plain(grad)),
        to_dlpack(out),
        torch.get_num_threads(),
    )
    return out


def _epsilon(norm: Any) -> Any:
    """ε under the name that transformers gives it, or torch; None where there is none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_root_mean_square(norm: Any) -> bool:
    """Whether the norm, on a rehearsal, does what ours does."""
    weight: Any = getattr(norm, "weight", None)
    epsilon = _epsilon(norm)
    if (
        [name for name, _ in norm.named_parameters()] != ["weight"]
        or not isinstance(epsilon, float)
        or weight.dim() != 1
        or weight.dtype not in ops.FLOATS
        or not weight.is_cpu
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    shape = (len(_REHEARSED_SIZES), 1, len(weight))
    sizes = torch.tensor(_REHEARSED_SIZES, device="cpu")[:, None, None]
    x = torch.randn(shape, generator=generator, device="cpu") * sizes
    x = x.to(weight.dtype)
    with torch.no_grad():
        ours = _rms_norm(x, weight, epsilon)
        try:
            theirs = norm(x)
        except Exception:  # another kind of norm: it wants more than x
            return False
    if not isinstance(theirs, Tensor) or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return False
    return torch.allclose(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6)
