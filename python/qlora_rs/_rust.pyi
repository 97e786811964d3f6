"""Types of the extension module; `mypy.stubtest` compares them with the binary."""

from typing import Any, TypeAlias

# A DLPack capsule, as torch.utils.dlpack.to_dlpack makes it.
_Capsule: TypeAlias = Any
_Packed: TypeAlias = tuple[_Capsule, _Capsule, _Capsule | None, _Capsule | None, _Capsule | None]

__all__ = [
    "FEW_DENSE_TOKENS",
    "QloraError",
    "__version__",
    "cpu_path",
    "cpu_paths",
    "cross_entropy",
    "cuda_source",
    "dequantize",
    "double_quantize",
    "dynamic_map",
    "factor_gradients",
    "gated",
    "gated_gradients",
    "levels",
    "merge_calibrate",
    "merge_curvature",
    "merge_factor_length",
    "merge_moment",
    "multiply",
    "multiply_dense",
    "quantize",
    "refuse_non_finite",
    "rms_norm",
    "rotate",
]

FEW_DENSE_TOKENS: int
__version__: str

class QloraError(ValueError): ...

def cpu_path() -> str: ...
def cpu_paths() -> list[str]: ...
def levels() -> list[float]: ...
def dynamic_map() -> list[float]: ...
def cuda_source(name: str) -> str: ...
def refuse_non_finite(count: int, rows: int, columns: int, first: int) -> None: ...
def multiply_dense(
    backward: bool,
    activations: _Capsule,
    tokens: int,
    weight: _Capsule,
    shape: tuple[int, int],
    bias: _Capsule | None,
    out: _Capsule,
    threads: int,
) -> None: ...
def rms_norm(
    x: _Capsule,
    weight: _Capsule,
    epsilon: float,
    grad: _Capsule | None,
    out: _Capsule,
    threads: int,
) -> None: ...
def quantize(
    weight: _Capsule,
    columns: int,
    block_size: int,
    codes: _Capsule,
    absmax: _Capsule,
    threads: int,
) -> None: ...
def double_quantize(
    absmax: _Capsule,
    codes: _Capsule,
    nested_absmax: _Capsule,
    threads: int,
    offset: float | None = None,
) -> float: ...
def dequantize(
    packed: _Packed,
    shape: tuple[int, int],
    block_size: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: _Capsule,
    threads: int,
) -> None: ...
def multiply(
    backward: bool,
    activations: _Capsule,
    tokens: int,
    packed: _Packed,
    shape: tuple[int, int],
    block_size: int,
    low_rank: tuple[_Capsule, _Capsule, int, float, _Capsule | None] | None,
    bias: _Capsule | None,
    out: _Capsule,
    threads: int,
) -> None: ...
def factor_gradients(
    x: _Capsule,
    grad_hidden: _Capsule,
    grad: _Capsule,
    hidden: _Capsule,
    tokens: int,
    rank: int,
    shape: tuple[int, int],
    grad_a: _Capsule,
    grad_b: _Capsule,
    threads: int,
) -> None: ...
def gated(gate: _Capsule, up: _Capsule, out: _Capsule, threads: int) -> None: ...
def gated_gradients(
    gate: _Capsule,
    up: _Capsule,
    grad: _Capsule,
    grad_gate: _Capsule,
    grad_up: _Capsule,
    threads: int,
) -> None: ...
def rotate(
    backward: bool,
    cosine: _Capsule,
    sine: _Capsule,
    dimensions: int,
    parts: list[tuple[_Capsule, int, _Capsule]],
    threads: int,
) -> None: ...
def cross_entropy(
    logits: _Capsule,
    vocabulary: int,
    targets: _Capsule,
    losses: _Capsule,
    gradient: bool,
    threads: int,
) -> None: ...
def merge_factor_length(columns: int, block_size: int) -> int: ...
def merge_moment(x: _Capsule, columns: int, total: _Capsule, threads: int) -> None: ...
def merge_curvature(
    statistics: _Capsule,
    columns: int,
    block_size: int,
    damping: float,
    order: _Capsule,
    hessian: _Capsule,
    factor: _Capsule,
    threads: int,
) -> float: ...
def merge_calibrate(
    target: _Capsule,
    nearest: _Packed,
    shape: tuple[int, int],
    block_size: int,
    curvature: tuple[_Capsule, _Capsule, _Capsule],
    given: int,
    sweeps: int,
    tolerance: float,
    feedback: bool,
    anneal: int,
    codes: _Capsule,
    absmax: _Capsule,
    coupling: tuple[int, int, _Capsule, float] | None,
    threads: int,
) -> list[float]: ...
