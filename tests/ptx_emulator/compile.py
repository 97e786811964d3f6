"""CUDA C → PTX with NVRTC from the wheel `nvidia-cuda-nvrtc`; no GPU and no toolkit needed."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    import nvidia

    for root in nvidia.__path__:
        for library in sorted(Path(root).glob("c*/lib/libnvrtc.so.*")):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                # NVRTC looks for its built-in functions by name: load them first.
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    raise RuntimeError("NVRTC is missing: pip install nvidia-cuda-nvrtc")


def _include_flags() -> list[str]:
    """Folders of CUDA's own headers in the wheels nvidia-cuda-runtime and nvidia-cuda-cccl."""
    import nvidia

    folders = [folder for root in nvidia.__path__ for folder in Path(root).glob("cu*/include")]
    return [f"-I{path}" for folder in folders for path in (folder, folder / "cccl")]


def compile_cuda(
    source: str, arch: str = "sm_80", options: Sequence[str] = (), headers: bool = False
) -> str:
    """PTX of CUDA C source for an architecture such as "sm_80".

    With `headers`, CUDA's own headers (cuda_fp16.h, mma.h, cooperative_groups.h, ...) can be
    included. Messages and counters call the source "kernel.cu". Raises ValueError with the
    compiler's log when the source does not compile.
    """
    if not re.fullmatch(r"(sm|compute)_\d+[af]?", arch):
        raise ValueError(f'arch: expected a name such as "sm_80"; got {arch!r}')
    if isinstance(options, str):
        raise TypeError(f"options: expected a list of flags, [{options!r}]; got a str")
    library = _nvrtc()
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    flags = [f"--gpu-architecture={arch.replace('sm_', 'compute_')}", "-lineinfo", *options]
    if headers:
        flags += ["-default-device", *_include_flags()]
    arguments = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
    try:
        failed = library.nvrtcCompileProgram(program, len(flags), arguments)
        if failed:
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise ValueError(log + _advice(log, arch, headers))
        return _text(library.nvrtcGetPTXSize, library.nvrtcGetPTX, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _advice(log: str, arch: str, headers: bool) -> str:
    """What to do about a compiler's complaint, where it does not say so itself."""
    if "could not open source file" in log and not headers:
        return "CUDA's own headers are found with headers=True."
    if "invalid value for --gpu-architecture" in log:
        return f"This NVRTC has no {arch}; the emulator is for sm_80 to sm_120."
    return ""


def _text(size_function, text_function, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    size_function(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    text_function(program, buffer)
    return buffer.value.decode()
