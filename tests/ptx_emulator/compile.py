"""CUDA C → PTX with NVRTC from the wheel `nvidia-cuda-nvrtc`; no GPU and no toolkit needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    import nvidia

    for root in nvidia.__path__:
        for library in sorted(Path(root).glob("c*/lib/libnvrtc.so.*")):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                # NVRTC looks for its built-in functions by name; loading them first lets it find them.
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    raise RuntimeError("NVRTC is missing: pip install nvidia-cuda-nvrtc")


def compile_cuda(source: str, arch: str = "sm_80", options: Sequence[str] = ()) -> str:
    """PTX of CUDA C source for an architecture such as "sm_80".

    Raises ValueError with the compiler's log when the source does not compile.
    """
    library = _nvrtc()
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    flags = [f"--gpu-architecture={arch.replace('sm_', 'compute_')}", "-lineinfo", *options]
    arguments = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
    try:
        failed = library.nvrtcCompileProgram(program, len(flags), arguments)
        if failed:
            raise ValueError(
                _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            )
        return _text(library.nvrtcGetPTXSize, library.nvrtcGetPTX, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_function, text_function, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    size_function(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    text_function(program, buffer)
    return buffer.value.decode()
