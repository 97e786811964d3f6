"""The CUDA kernels of `cuda/`: how each is compiled and launched.

A `Launch` says everything about one: source, -D constants, grid and block. It comes from a pure
function of sizes, which tests call too when they run the same PTX without a GPU: what is tested
is what launches.

`launch` compiles for the device at hand (once per machine: `kernel_cache.py`), loads with CuPy and
starts the kernel on torch's current stream. Tensors are allocated by torch; nothing is allocated or
waited for here, so a CUDA graph can capture it, once the kernel was launched before the capture.
Products of 1, 2, and of up to 4, 8, 16, 32, 128 and more rows are different kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_rs import _rust, kernel_cache, nvrtc
from qlora_rs.errors import QloraError

THREADS = 256
# Weights that one CTA decodes. A small matrix takes the small tile, so that it has enough CTAs for
# all multiprocessors; both are multiples of every block size.
TILES = (1 << 13, 1 << 15)
LARGE_MATRIX = 1 << 24
# By rows of x per warp: its rows of W, and the steps that it loads ahead. Chosen on an H100.
FEW_ROWS_TILES = {1: (2, 8), 2: (2, 8), 4: (2, 8), 8: (2, 2)}
# By rows of x at most: tiles of 16 rows of W and of 8 rows of x that a CTA computes, its warps,
# chunks of columns per turn of its loop, and the CTAs that a multiprocessor holds. Chosen on an
# H100. All have as many warps, so that a row is summed in the same order in each.
TENSOR_CORES_TILES = {
    8: (1, 1, 8, 1, 4),
    16: (2, 2, 8, 1, 2),
    32: (2, 4, 8, 2, 1),
    128: (2, 4, 8, 1, 2),
}
# What a warp multiplies at a time has one absmax: so many columns.
TENSOR_CORES_COLUMNS = 64
# A warp each.
NESTED_GROUPS_PER_CTA = THREADS // 32
# The kernels convert with instructions of compute capability 8.0 (A100 and newer).
OLDEST_ARCHITECTURE = 80
# The format's arithmetic is IEEE: subnormal numbers kept, divisions rounded to nearest, products
# and sums rounded one by one unless a kernel asks for a fused multiply-add.
OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    # For profilers, compute-sanitizer and the emulator: which line an instruction comes from.
    "--generate-line-info",
)
_FLOATS = {torch.float32: "32", torch.float16: "16", torch.bfloat16: "0x16B"}


class Launch(NamedTuple):
    """One kernel launch but for its arguments: `grid` CTAs of `block` threads."""

    kernel: str
    constants: tuple[tuple[str, str], ...]
    grid: int
    block: int = THREADS


# Starts a kernel with tensors and integers as arguments.
Launcher = Callable[..., None]


def _vector(dtype: torch.dtype) -> int:
    """Weights in 16 bytes."""
    return 16 // dtype.itemsize


def quantize_nf4(count: int, dtype: torch.dtype, block_size: int, double_quant: bool) -> Launch:
    """`cuda/quantize_nf4.cu` over `count` weights.

    >>> quantize_nf4(4096 * 4096, torch.bfloat16, 64, True).grid
    2048
    """
    lanes = min(block_size // _vector(dtype), 32)
    steps = 4 if block_size == lanes * _vector(dtype) else 1
    blocks = steps * (THREADS // lanes)
    constants = (
        ("FLOAT", _FLOATS[dtype]),
        ("BLOCK_SIZE", str(block_size)),
        ("BLOCKS_PER_CTA", str(blocks)),
        ("DOUBLE_QUANT", str(int(double_quant))),
    )
    return Launch("quantize_nf4", constants, -(-count // (blocks * block_size)))


def double_quantize(blocks: int) -> Launch:
    """`cuda/double_quantize.cu` over `blocks` absmax.

    >>> double_quantize(4096 * 64).grid
    128
    """
    constants = (("GROUPS_PER_CTA", str(NESTED_GROUPS_PER_CTA)),)
    return Launch("double_quantize", constants, -(-blocks // (256 * NESTED_GROUPS_PER_CTA)))


@functools.lru_cache(1024)
def dequantize_nf4(count: int, dtype: torch.dtype, block_size: int, double_quant: bool) -> Launch:
    """`cuda/dequantize_nf4.cu` over `count` weights.

    >>> dequantize_nf4(4096 * 4096, torch.bfloat16, 64, True).grid
    512
    """
    tile = TILES[count >= LARGE_MATRIX]
    constants = (
        ("FLOAT", _FLOATS[dtype]),
        ("BLOCK_SIZE", str(block_size)),
        ("TILE", str(tile)),
        ("DOUBLE_QUANT", str(int(double_quant))),
    )
    return Launch("dequantize_nf4", constants, -(-count // tile))


@functools.lru_cache(1024)
def few_rows_nf4(
    rows: int, features: int, dtype: torch.dtype, block_size: int, double_quant: bool
) -> Launch:
    """`cuda/few_rows_nf4.cu` for x [rows, in], 8 rows at most, and W [features, in].

    >>> few_rows_nf4(1, 4096, torch.bfloat16, 64, True).grid
    256
    """
    at_once = next(size for size in FEW_ROWS_TILES if size >= rows)
    outputs, unroll = FEW_ROWS_TILES[at_once]
    constants = (
        ("FLOAT", _FLOATS[dtype]),
        ("BLOCK_SIZE", str(block_size)),
        ("ROWS", str(at_once)),
        ("OUTPUTS", str(outputs)),
        ("UNROLL", str(unroll)),
        ("DOUBLE_QUANT", str(int(double_quant))),
    )
    return Launch("few_rows_nf4", constants, -(-features // (THREADS // 32 * outputs)))


@functools.lru_cache(1024)
def tensor_cores_nf4(
    rows: int, features: int, dtype: torch.dtype, block_size: int, double_quant: bool
) -> Launch:
    """`cuda/tensor_cores_nf4.cu` for x [rows, in] of 16 bits, 128 rows at most, and W [out, in].

    >>> tensor_cores_nf4(100, 4096, torch.bfloat16, 64, True).grid
    512
    """
    at_once = next(size for size in TENSOR_CORES_TILES if size >= rows)
    w_tiles, x_tiles, warps, unroll, ctas = TENSOR_CORES_TILES[at_once]
    constants = (
        ("FLOAT", _FLOATS[dtype]),
        ("BLOCK_SIZE", str(block_size)),
        ("W_TILES", str(w_tiles)),
        ("X_TILES", str(x_tiles)),
        ("WARPS", str(warps)),
        ("UNROLL", str(unroll)),
        ("CTAS", str(ctas)),
        ("DOUBLE_QUANT", str(int(double_quant))),
    )
    grid = -(-features // (16 * w_tiles)) * -(-rows // (8 * x_tiles))
    return Launch("tensor_cores_nf4", constants, grid, 32 * warps)


def _text(name: str) -> str:
    """A file of `cuda/` as the extension carries it, or from the folder `QLORA_RS_CUDA`.

    The variable lets an edited kernel be tested without building the extension again.
    """
    folder = os.environ.get("QLORA_RS_CUDA")
    if not folder:
        return _rust.cuda_source(name)
    try:
        return (Path(folder) / name).read_text(encoding="utf-8")
    except OSError as error:
        raise QloraError(
            f"QLORA_RS_CUDA={folder} holds no readable {name} ({error.strerror}); set it to the "
            "folder cuda/ of a clone, or unset it"
        ) from error


@functools.cache
def _source(kernel: str) -> tuple[str, dict[str, str]]:
    """A kernel's text and that of the headers it includes."""
    text = _text(f"{kernel}.cu")
    names = re.findall(r'^#include "(.+)"$', text, re.MULTILINE)
    return text, {name: _text(name) for name in names}


def compile_kernel(
    kernel: str, constants: tuple[tuple[str, str], ...], architecture: int
) -> nvrtc.Compiled:
    """PTX and machine code of a kernel for one compute capability times 10, e.g. 90."""
    text, headers = _source(kernel)
    defines = [f"-D{name}={value}" for name, value in constants]
    options = [*OPTIONS, f"--gpu-architecture=sm_{architecture}", *defines]
    return nvrtc.compile_program(f"{kernel}.cu", text, headers, options)


def target(capability: tuple[int, int], known: tuple[int, ...]) -> tuple[int, bool]:
    """The architecture to compile for, and whether its machine code runs on the device.

    capability: the device's; known: the compiler's. Machine code runs on its own major version from
    its minor version on; PTX of an older one is translated by the driver.
    Raises QloraError for a device that is too old.

    >>> target((8, 9), (80, 86, 89, 90)), target((12, 1), (80, 90, 120)), target((13, 0), (80, 120))
    ((89, True), (120, True), (120, False))
    """
    device = 10 * capability[0] + capability[1]
    usable = [a for a in known if OLDEST_ARCHITECTURE <= a <= device]
    if not usable:
        raise QloraError(
            f"the kernels need a GPU of compute capability 8.0 (A100) or newer, this one has "
            f'{capability[0]}.{capability[1]}; use the CPU: .to("cpu")'
        )
    best = max(usable)
    return best, best // 10 == capability[0]


def _build(launch: Launch, architecture: int, machine_code: bool) -> bytes:
    compiled = compile_kernel(launch.kernel, launch.constants, architecture)
    # The driver reads PTX up to a NUL.
    return compiled.cubin if machine_code else compiled.ptx.encode() + b"\0"


def binary(launch: Launch, capability: tuple[int, int]) -> str:
    """The file with a kernel's code for a device, compiled if it is not cached."""
    architecture, machine_code = target(capability, nvrtc.architectures())
    text, headers = _source(launch.kernel)
    key = kernel_cache.key(
        text, *headers.values(), *OPTIONS, launch.constants, architecture, nvrtc.version()
    )
    suffix = "cubin" if machine_code else "ptx"
    name = f"{launch.kernel}-{architecture}"
    build = functools.partial(_build, launch, architecture, machine_code)
    return str(kernel_cache.fetch(name, key, suffix, build))


# CuPy unloads a module that nobody holds, even while its kernel runs; and two threads that load the
# same kernel at the same time leave a second module.
_loaded: list[Any] = []


@functools.cache
def _load(kernel: str, constants: tuple[tuple[str, str], ...], index: int) -> Any:
    """A kernel as CuPy has loaded it into a device's context, which must be current."""
    try:
        import cupy
    except ImportError as error:
        raise QloraError(
            "CuPy, which launches the CUDA kernels, cannot be imported "
            f'({error}): {nvrtc.ADD_NVRTC} brings it, or use the CPU: .to("cpu")'
        ) from error
    module = cupy.cuda.function.Module()
    launch = Launch(kernel, constants, 0)
    module.load_file(binary(launch, torch.cuda.get_device_capability(index)))
    _loaded.append(module)
    return module.get_function(kernel)


def _start(launch: Launch, index: int, arguments: tuple[Tensor | int | None, ...]) -> None:
    """Start a kernel on the current device, which is number `index`.

    The driver is called without the layers above it: they cost more than a small kernel takes.
    """
    function = _load(launch.kernel, launch.constants, index)
    from cupy_backends.cuda.api import driver, runtime

    if not driver.ctxGetCurrent():
        runtime.free(0)  # gives a thread that is new to CUDA its device's context
    count = len(arguments)
    # Every parameter has 64 bits; the driver takes the address of each.
    values = (ctypes.c_uint64 * count)(
        *(a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments)
    )
    first = ctypes.addressof(values)
    addresses = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
    stream = torch._C._cuda_getCurrentRawStream(index)
    size = (launch.grid, 1, 1, launch.block, 1, 1)
    driver.launchKernel(function.ptr, *size, 0, stream, ctypes.addressof(addresses), 0)


def launch(launch: Launch, *arguments: Tensor | int | None) -> None:
    """Start a kernel on the current stream of the device that holds its tensors.

    Tensors are passed by address (None by the null address) and must be contiguous; integers have
    64 bits.
    """
    index = next(a.device.index for a in arguments if isinstance(a, Tensor))
    if index == torch.cuda.current_device():
        _start(launch, index, arguments)
        return
    with torch.cuda.device(index):
        _start(launch, index, arguments)
