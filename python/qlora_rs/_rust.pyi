"""Types of the extension module; `mypy.stubtest` compares them with the binary."""

from types import CapsuleType
from typing import Any, TypeAlias

__version__: str

_Packed: TypeAlias = tuple[
    CapsuleType, CapsuleType, CapsuleType | None, CapsuleType | None, CapsuleType | None
]

class QloraError(ValueError): ...

def cpu_path() -> str: ...
def cpu_paths() -> list[str]: ...
def levels() -> list[float]: ...
def dynamic_map() -> list[float]: ...
def quantize(
    weight: Any, block_size: int, codes: Any, absmax: Any, threads: int
) -> None: ...
def double_quantize(
    absmax: Any, codes: Any, nested_absmax: Any, threads: int, offset: float | None = None
) -> float: ...
def dequantize(
    packed: _Packed,
    shape: tuple[int, int],
    block_size: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: Any,
    threads: int,
) -> None: ...
def linear(
    x: Any,
    tokens: int,
    packed: _Packed,
    shape: tuple[int, int],
    block_size: int,
    bias: Any | None,
    y: Any,
    threads: int,
) -> None: ...
