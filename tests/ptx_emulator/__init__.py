"""Run the PTX of CUDA kernels on this CPU, checked and counted: the Python face of the emulator.

    from ptx_emulator import Module, compile_cuda

    module = Module(compile_cuda(source, arch="sm_80"))
    result = module.launch("kernel", [x, output(y), numpy.int64(n)], grid=4, block=256)

Arrays are numpy arrays. A plain array is an input that the kernel must not write; `output`, `inout`
and `window` say otherwise. Results are new arrays: inputs are never changed.
"""

from ptx_emulator.arguments import inout, output, window
from ptx_emulator.compile import compile_cuda
from ptx_emulator.launch import Module, Refusal, Result, Unwritten

__all__ = [
    "Module",
    "Refusal",
    "Result",
    "Unwritten",
    "compile_cuda",
    "inout",
    "output",
    "window",
]
