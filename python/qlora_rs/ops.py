"""torch operators `torch.ops.qlora_rs.*`: schema, shape rule and kernel of each, in one place.

Autograd is attached in `autograd.py`; the public functions with PackedWeight are in
`functional.py`. Every operator takes a packed weight as the same eight arguments:

    codes, absmax, nested_absmax?, nested_offset?, nested_map?,
    out_features, in_features, block_size
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qlora_rs import cpu, gpu
from qlora_rs.cpu import LowRank, Packed
from qlora_rs.errors import QloraError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# float64 is for gradient checks: correct, not fast.
ACTIVATIONS = (*FLOATS, torch.float64)
# Where tensors may be. Computed on the first two, by `cpu.py` and `gpu.py`.
DEVICES = ("cpu", "cuda", "meta")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_PACKED = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "Tensor? nested_map, SymInt out_features, SymInt in_features, int block_size"
)
_SCHEMAS = {
    "quantize": "(Tensor weight, int block_size, bool double_quant) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "dequantize": f"({_PACKED}, ScalarType dtype) -> Tensor",
    "linear": f"(Tensor x, {_PACKED}, Tensor? bias) -> Tensor",
    "linear_backward": f"(Tensor grad, {_PACKED}) -> Tensor",
    # The second result is scaling x Aᵀ [rows, r], which the backward pass needs.
    "lora_linear": f"(Tensor x, {_PACKED}, Tensor lora_a, Tensor lora_b, float scaling, "
    "Tensor? bias) -> (Tensor, Tensor)",
    "lora_linear_backward": f"(Tensor grad, Tensor x, Tensor hidden, {_PACKED}, Tensor lora_a, "
    "Tensor lora_b, float scaling, bool needs_x) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"qlora_rs::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def check_block_size(block_size: int) -> None:
    """Refuse what is not one of the format's sizes."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise QloraError(f"block_size must be one of {sizes}, got {block_size!r} (64 is usual)")


def check_weight(weight: Tensor, block_size: int, double_quant: bool = True) -> None:
    """Refuse what cannot be quantized."""
    check_block_size(block_size)
    if not isinstance(double_quant, bool):
        raise QloraError(f"double_quant must be True or False, got {double_quant!r}")
    if weight.dim() != 2:
        raise QloraError(
            f"weight must have 2 dimensions [out_features, in_features], got shape "
            f"{list(weight.shape)}; reshape it first"
        )
    if weight.layout != torch.strided:
        raise QloraError(
            f"weight is a {weight.layout} tensor, and NF4 stores every weight; convert it with "
            ".to_dense()"
        )
    if weight.is_complex():
        raise QloraError(
            f"weight must be float32, float16 or bfloat16, got {weight.dtype}, of which a float "
            "holds only half; quantize weight.real and weight.imag"
        )
    if weight.dtype not in FLOATS:
        raise QloraError(
            f"weight must be float32, float16 or bfloat16, got {weight.dtype}; convert it with "
            ".to(torch.float32)"
        )


def check_activations(
    name: str, x: Tensor, shape: tuple[int, int], values: Tensor, bias: Tensor | None = None
) -> None:
    """Refuse activations [..., shape[1]] that do not fit the weight, naming both sides.

    shape: the matrix that multiplies them; values: a tensor where the weight is.
    """
    # The usual case by the cheapest questions: this is asked for every layer of every token.
    if (
        x.is_cpu
        and values.is_cpu
        and bias is None
        and x.dtype in FLOATS
        and x.dim() > 0
        and x.shape[-1] == shape[1]
    ):
        return
    if x.dtype not in ACTIVATIONS:
        raise QloraError(
            f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}; convert it first"
        )
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise QloraError(
            f"the last dimension of {name} must be {shape[1]} to fit the {shape[0]} x {shape[1]} "
            f"weight, got shape {list(x.shape)}; reshape {name}, or take weight.t() if the weight "
            "was stored as [in, out]"
        )
    if x.device != values.device:
        raise QloraError(
            f"{name} is on {x.device} but the weight is on {values.device}; move one of them"
        )
    if x.device.type not in DEVICES:
        raise QloraError(
            f"{name} is on {x.device}, where no product is implemented; move the model and its "
            'inputs to the CPU with .to("cpu")'
        )
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise QloraError(
            f"bias must have x's dtype and device ({x.dtype}, {x.device}), got {bias.dtype}, "
            f"{bias.device}"
        )


def check_rank(rank: int) -> None:
    """Refuse an adapter that adds nothing: the kernels divide their work by its rank."""
    if rank < 1:
        raise QloraError(
            f"r must be at least 1, got {rank}; without an adapter, call qlora_rs.linear"
        )


def check_lora(lora_a: Tensor, lora_b: Tensor, packed: Packed) -> None:
    """Refuse adapter matrices that do not fit the weight."""
    rank = lora_a.size(0) if lora_a.dim() == 2 else -1
    # The usual case by the cheapest questions, as above.
    if (
        rank > 0
        and lora_b.dim() == 2
        and lora_b.size(1) == rank
        and lora_b.size(0) == packed.out_features
        and lora_a.size(1) == packed.in_features
        and lora_a.dtype in FLOATS
        and lora_b.dtype in FLOATS
        and lora_a.is_cpu
        and lora_b.is_cpu
        and packed.codes.is_cpu
    ):
        return
    expected = ((rank, packed.in_features), (packed.out_features, rank))
    if (lora_a.shape, lora_b.shape) != expected:
        raise QloraError(
            f"lora_a must be [r, {packed.in_features}] and lora_b [{packed.out_features}, r] for "
            f"one r, got {list(lora_a.shape)} and {list(lora_b.shape)}"
        )
    check_rank(rank)
    for name, matrix in (("lora_a", lora_a), ("lora_b", lora_b)):
        if matrix.dtype not in ACTIVATIONS:
            raise QloraError(f"{name} must be a float tensor, got {matrix.dtype}")
        if not (matrix.is_cpu and packed.codes.is_cpu) and matrix.device != packed.codes.device:
            raise QloraError(
                f"{name} is on {matrix.device} but the weight is on {packed.codes.device}; move "
                "one of them"
            )


def _check_bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise QloraError(f"bias must have shape [{out_features}], got {list(bias.shape)}")


def _rows(x: Tensor) -> Tensor:
    """Any leading shape and strides → contiguous [rows, features]."""
    x = cpu.plain(x)
    # Not view(-1, ...): with no features, -1 could be anything.
    return x if x.dim() == 2 else x.view(math.prod(x.shape[:-1]), x.shape[-1])


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y [rows, features] with the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _compute(tensor: Tensor) -> Any:
    """The module that computes where the tensor is."""
    return gpu if tensor.is_cuda else cpu


@torch.library.register_kernel("qlora_rs::quantize", ("cpu", "cuda"))
def _quantize(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, ...]:
    check_weight(weight, block_size)
    return _compute(weight).quantize(weight.contiguous(), block_size, double_quant)


@torch.library.register_fake("qlora_rs::quantize")
def _quantize_shape(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, ...]:
    check_weight(weight, block_size)
    blocks = -(-weight.numel() // block_size)
    codes = weight.new_empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = weight.new_empty(-(-blocks // 256) if double_quant else 0, dtype=torch.float32)
    offset = weight.new_empty(() if double_quant else (0,), dtype=torch.float32)
    return codes, absmax, nested, offset


@torch.library.register_kernel("qlora_rs::dequantize", ("cpu", "cuda"))
def _dequantize(*arguments: Any) -> Tensor:
    packed, (dtype,) = Packed(*arguments[:8]), arguments[8:]
    _check_output_dtype(dtype)
    return _compute(packed.codes).dequantize(packed, dtype)


@torch.library.register_fake("qlora_rs::dequantize")
def _dequantize_shape(*arguments: Any) -> Tensor:
    packed, (dtype,) = Packed(*arguments[:8]), arguments[8:]
    _check_output_dtype(dtype)
    return packed.codes.new_empty((packed.out_features, packed.in_features), dtype=dtype)


def _check_output_dtype(dtype: torch.dtype) -> None:
    if dtype not in ACTIVATIONS:
        raise QloraError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """The operator's kernel; see `functional.linear`."""
    packed, (bias,) = Packed(*arguments[:8]), arguments[8:]
    check_activations("x", x, packed[5:7], packed.codes, bias)
    if bias is not None:
        _check_bias(bias, packed.out_features)
        bias = cpu.plain(bias)
    if x.is_cuda:
        return _shaped(gpu.linear(_rows(x), packed, bias), x)
    return cpu.linear(cpu.plain(x), packed, bias)


@torch.library.register_fake("qlora_rs::linear")
def _linear_shape(x: Tensor, *arguments: Any) -> Tensor:
    packed, (bias,) = Packed(*arguments[:8]), arguments[8:]
    check_activations("x", x, packed[5:7], packed.codes, bias)
    _check_bias(bias, packed.out_features)
    return x.new_empty((*x.shape[:-1], packed.out_features))


def linear_backward(grad: Tensor, *arguments: Any) -> Tensor:
    """The operator's kernel: dX [..., in] = dY [..., out] W."""
    packed = Packed(*arguments)
    check_activations("grad", grad, packed[6:4:-1], packed.codes)
    if grad.is_cuda:
        return _shaped(gpu.linear_backward(_rows(grad), packed), grad)
    return cpu.linear_backward(cpu.plain(grad), packed)


@torch.library.register_fake("qlora_rs::linear_backward")
def _linear_backward_shape(grad: Tensor, *arguments: Any) -> Tensor:
    packed = Packed(*arguments)
    check_activations("grad", grad, packed[6:4:-1], packed.codes)
    return grad.new_empty((*grad.shape[:-1], packed.in_features))


def lora_linear(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator's kernel; see `functional.lora_linear`."""
    packed, (lora_a, lora_b, scaling, bias) = Packed(*arguments[:8]), arguments[8:]
    check_activations("x", x, packed[5:7], packed.codes, bias)
    check_lora(lora_a, lora_b, packed)
    if bias is not None:
        _check_bias(bias, packed.out_features)
        bias = cpu.plain(bias)
    low_rank = LowRank(lora_a, lora_b, scaling)
    if x.is_cuda:
        y, hidden = gpu.lora_linear(_rows(x), packed, low_rank, bias)
        return _shaped(y, x), hidden
    return cpu.lora_linear(cpu.plain(x), packed, low_rank, bias)


@torch.library.register_fake("qlora_rs::lora_linear")
def _lora_linear_shape(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    packed, (lora_a, lora_b, _, bias) = Packed(*arguments[:8]), arguments[8:]
    check_activations("x", x, packed[5:7], packed.codes, bias)
    check_lora(lora_a, lora_b, packed)
    _check_bias(bias, packed.out_features)
    y = x.new_empty((*x.shape[:-1], packed.out_features))
    return y, x.new_empty((math.prod(x.shape[:-1]), lora_a.shape[0]))


def lora_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's kernel: dX (empty if it is not needed), dA, dB."""
    packed, (lora_a, lora_b, scaling, needs_x) = Packed(*arguments[:8]), arguments[8:]
    check_activations("grad", grad, packed[6:4:-1], packed.codes)
    check_rank(lora_a.shape[0])
    low_rank = LowRank(lora_a, lora_b, scaling)
    grad_x, grad_a, grad_b = _compute(grad).lora_linear_backward(
        _rows(grad), _rows(x), hidden.contiguous(), packed, low_rank, needs_x
    )
    return grad_x.view(x.shape) if needs_x else grad_x, grad_a, grad_b


@torch.library.register_fake("qlora_rs::lora_linear_backward")
def _lora_linear_backward_shape(
    grad: Tensor, x: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    packed, (lora_a, lora_b, _, needs_x) = Packed(*arguments[:8]), arguments[8:]
    check_activations("grad", grad, packed[6:4:-1], packed.codes)
    grad_x = x.new_empty(x.shape if needs_x else 0)
    return grad_x, lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


for _kernel in (linear, linear_backward, lora_linear, lora_linear_backward):
    torch.library.register_kernel(f"qlora_rs::{_kernel.__name__}", ("cpu", "cuda"), _kernel)


# Looked up once: this is asked for every layer of every token.
_compiling = torch.compiler.is_compiling
_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
# Of torch.autograd.grad(..., is_grads_batched=True), which is no functional transform.
_batched = torch._C._functorch.is_legacy_batchedtensor
# Of a functional transform, also one that has ended.
wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PLAIN, _STRIDED = (Tensor, torch.nn.Parameter), torch.strided


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for a function without `setup_context`, less what it does first: it asks
    whether a functional transform is active, as `runs_directly` does, and takes tensors out of the
    wrappers of transforms that have ended, which operands must not be (`wrapped`).
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def runs_directly(x: Tensor) -> bool:
    """Whether a kernel may be called for x without torch's dispatcher.

    A call through the dispatcher costs as much as a small product. It is only needed where
    somebody looks on (compilers, tracers, tensor subclasses, functional transforms, modes,
    forward-mode differentiation), and for tensors that are not what lies in their memory.
    """
    return (
        not _compiling()
        and type(x) in _PLAIN
        and (x.is_cpu or x.is_cuda)
        and x.layout is _STRIDED
        and not x.is_neg()
        and not _transformed()
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _tracing() is None
        and forward_ad._current_level < 0
        and not _batched(x)
        and not wrapped(x)
    )
