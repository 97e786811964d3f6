"""NVIDIA's run-time compiler, by its C interface: CUDA source → PTX and machine code.

CuPy can compile too, but only for a device that is present, and it hands out no PTX. Tests and the
table of static facts need both, from the very compiler call that a GPU gets its kernels from.

The library is the one that torch's CUDA wheels and `cupy-cuda13x[ctk]` install, or the system's.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_rs.errors import QloraError

# Newest first. The name carries the major version; its interface has not changed since CUDA 11.
SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
ADD_NVRTC = 'pip install "qlora_rs[cuda13]" (or [cuda12])'


class Compiled(NamedTuple):
    """One program: PTX as text (without its final NUL) and machine code of one architecture."""

    ptx: str
    cubin: bytes


def _candidates() -> list[str]:
    """Paths in pip's wheels (CUDA 12 and 13 lay them out differently), then the system's."""
    folders = [Path(entry) / "nvidia" for entry in sys.path]
    wheels = [str(p) for n in SONAMES for f in folders for p in sorted(f.glob(f"*/lib/{n}"))]
    return [*wheels, *SONAMES]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiler's library, loaded on first use, or None where there is none."""
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _call(name: str, *arguments: object) -> None:
    nvrtc = library()
    if nvrtc is None:
        raise QloraError(
            f"NVRTC, which compiles the CUDA kernels, is not installed: {ADD_NVRTC} brings it"
        )
    status = getattr(nvrtc, name)(*arguments)
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise QloraError(f"{name} failed: {nvrtc.nvrtcGetErrorString(status).decode()}")


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version, e.g. (13, 0)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def architectures() -> tuple[int, ...]:
    """Compute capabilities that this compiler knows, times 10: 80, 86, 90, ..."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", found)
    return tuple(found)


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw[: size.value]


def compile_program(
    name: str, source: str, headers: Mapping[str, str], options: Sequence[str]
) -> Compiled:
    """Compile `source`; `name` stands in messages, `headers` are what it may include.

    Raises QloraError with the compiler's messages when the source is wrong, and when NVRTC is
    missing.
    """
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
    _call(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        source.encode(),
        name.encode(),
        len(headers),
        texts,
        names,
    )
    try:
        switches = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _call("nvrtcCompileProgram", program, len(options), switches)
        except QloraError as error:
            messages = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise QloraError(f"{name} does not compile ({error}):\n{messages}") from error
        ptx = _read(program, "PTX").rstrip(b"\0").decode()
        return Compiled(ptx, _read(program, "CUBIN"))
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))
