"""A launcher for `qlora_rs.gpu` that runs the kernels' PTX in the emulator, on tensors of the CPU.

Everything else is what a GPU gets: sources and options from `kernels.compile_kernel`, grid and
block from the launch. Buffers are handed to the emulator with what the kernel may do with each, so
a write to an input, a read of an output or of memory beyond a tensor is refused, and so is an
output of which a byte is left unwritten.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from ptx_emulator import Module, Refusal, Result, inout, output
from torch import Tensor

from qlora_rs import kernels
from qlora_rs.kernels import Launch

# The parameters that a kernel writes, by position: those it fills, and those it adds to.
FILLED = {
    "quantize_nf4": (2, 3),
    "double_quantize": (4, 5, 6),
    "dequantize_nf4": (7,),
    "few_rows_nf4": (13,),
    "tensor_cores_nf4": (13,),
}
ADDED_TO = {"quantize_nf4": (4, 5)}

# Orders in which a GPU may run warps, lanes and blocks.
SCHEDULES = ("ascending", "descending", "ahead", *(f"random:{seed}" for seed in range(5)))


@functools.cache
def _module(_text: str, *compiled: Any) -> Module:
    return Module(kernels.compile_kernel(*compiled).ptx)


def module(kernel: str, constants: tuple[tuple[str, str], ...], architecture: int) -> Module:
    """A kernel as NVRTC compiles it."""
    return _module(repr(kernels._source(kernel)), kernel, constants, architecture)


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes; numpy has no bfloat16."""
    flat = tensor.detach().reshape(-1)
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def sums_of_mantissas(absmax: np.ndarray) -> np.ndarray:
    """What quantize_nf4.cu adds up: float32 mantissas, one sum for each exponent."""
    bits = absmax.view(np.uint32).astype(np.int64)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    sums = np.zeros(254, np.int64)
    np.add.at(sums, np.maximum(exponent - 1, 0), fraction + ((exponent > 0) << 23))
    return sums


class EmulatedGPU:
    """Call it with a launch and its arguments; `results` keeps what each launch counted, `kernels`
    the names."""

    def __init__(self, schedule: str = "ascending", architecture: int = 80, **options: Any) -> None:
        self.architecture = architecture
        self.options = {"schedule": schedule, **options}
        self.results: list[Result] = []
        self.kernels: list[str] = []

    def __call__(self, launch: Launch, *arguments: Tensor | int | None) -> None:
        written: list[Tensor] = []
        lent: list[Any] = []
        for position, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                lent.append(argument)
                continue
            assert argument.is_contiguous()
            array = as_array(argument)
            if position in FILLED[launch.kernel]:
                array = output(array)
            elif position in ADDED_TO.get(launch.kernel, ()):
                array = inout(array)
            if not isinstance(array, np.ndarray):
                written.append(argument)
            lent.append(array)
        code = module(launch.kernel, launch.constants, self.architecture)
        result = code.launch(
            launch.kernel, lent, grid=launch.grid, block=launch.block, **self.options
        )
        # Else an output could hold the right answer of an earlier launch in recycled memory.
        if result.unwritten:
            raise Refusal("unwritten", f"{launch.kernel} leaves bytes out: {result.unwritten}")
        for tensor, content in zip(written, result.arrays, strict=True):
            as_array(tensor)[:] = content
        self.results.append(result)
        self.kernels.append(launch.kernel)
