"""What this process holds in memory, as Linux counts it (man 5 proc)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path


def resident() -> int | None:
    """Bytes in memory now; None where the system does not say."""
    return _status("VmRSS")


def peak() -> int | None:
    """The most bytes in memory since the process started, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> bool:
    """Start the peak count afresh, so that what came before does not hide what follows; whether
    the system does that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def release() -> None:
    """Hand freed memory back to the system: float weights are gone once they are quantized."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().split("\n"):
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None
