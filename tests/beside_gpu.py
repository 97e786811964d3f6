"""Launches of the emulator repeated on the GPU at hand, their bytes compared: `--beside-gpu`.

    pytest --beside-gpu tests/test_ptx_*.py tests/test_cuda_*quantize.py

The emulator stands in for a GPU in all tests of the CUDA kernels; here a GPU says whether it may.
What the emulator refuses never reaches the GPU. Tensor-core sums follow the GPU's own model. Left
out, and counted: launches of some blocks only, with more shared memory than needs no leave, for a
newer architecture, and matrix products on a GPU whose way of summing is not known.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from ptx_emulator import Module, Result
from ptx_emulator.arguments import lend, three, value

# How the emulator adds within mma.sync to agree with a GPU, by compute capability.
MATRIX_MODELS = {80: "a100", 90: "h100"}
# More needs leave from the driver.
LARGEST_SHARED = 48 << 10

compared = left_out = 0


@functools.cache
def _function(ptx: str, kernel: str) -> Any:
    from cupy.cuda.function import Module as Loaded

    loaded = Loaded()
    loaded.load(ptx.encode() + b"\0")
    return loaded.get_function(kernel)


def on_gpu(
    module: Module, kernel: str, arguments: Sequence[Any], grid: Any, block: Any, shared: int
) -> list[np.ndarray]:
    """The arrays that a launch on the GPU leaves; unwritten bytes are 0xff, as the emulator's."""
    import cupy
    from cupy_backends.cuda.api import driver

    written: list[tuple[Any, np.ndarray]] = []
    kept: list[Any] = []
    parameters: list[Any] = []
    described = module._parameters(kernel)
    for index, (argument, parameter) in enumerate(zip(arguments, described, strict=True)):
        buffer = lend(index, argument)
        if buffer is None:
            content = value(index, argument, *parameter)
        else:
            array = np.ascontiguousarray(buffer.array)
            image = array.view(np.uint8) if array.size else np.zeros(1, np.uint8)
            held = cupy.asarray(image.reshape(-1)) if buffer.defined else None
            if held is None:
                held = cupy.full(image.size, 0xFF, cupy.uint8)
            kept.append(held)
            content = (held.data.ptr - buffer.offset).to_bytes(8, "little", signed=False)
            if buffer.writable:
                written.append((held, array))
        parameters.append(ctypes.create_string_buffer(content, max(len(content), 1)))
    addresses = (ctypes.c_void_p * max(len(parameters), 1))(*map(ctypes.addressof, parameters))
    sizes = (*three("grid", grid), *three("block", block), shared)
    function = _function(module.ptx, kernel)
    driver.launchKernel(function.ptr, *sizes, 0, ctypes.addressof(addresses), 0)
    cupy.cuda.runtime.deviceSynchronize()
    return [
        held.get()[: array.nbytes].view(array.dtype).reshape(array.shape) for held, array in written
    ]


def beside(emulate: Any) -> Any:
    """`Module.launch`, compared with the GPU."""
    import cupy

    capability = int(cupy.cuda.Device().compute_capability)

    def launch(self: Module, kernel: str, arguments: Sequence[Any], **options: Any) -> Result:
        global compared, left_out
        result = emulate(self, kernel, arguments, **options)
        shared = options.get("shared", 0)
        target = int(re.search(r"^\.target sm_(\d+)", self.ptx, re.MULTILINE)[1])
        unlike = "mma." in self.ptx and capability not in MATRIX_MODELS
        too_much = shared > LARGEST_SHARED or target > capability
        if options.get("blocks") is not None or too_much or unlike:
            left_out += 1
            return result
        expected = result.arrays
        if "mma." in self.ptx:
            model = {"matrix_model": MATRIX_MODELS[capability]}
            expected = emulate(self, kernel, arguments, **{**options, **model}).arrays
        found = on_gpu(self, kernel, arguments, options["grid"], options["block"], shared)
        for mine, real in zip(expected, found, strict=True):
            mine_bytes, real_bytes = (part.reshape(-1).view(np.uint8) for part in (mine, real))
            differing = np.flatnonzero(mine_bytes != real_bytes)
            assert not differing.size, (
                f"{kernel}: {differing.size} of {mine.nbytes} bytes differ between the emulator "
                f"and the GPU, the first at {differing[0]}\n{mine}\n{real}"
            )
        compared += 1
        return result

    return launch
