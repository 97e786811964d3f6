"""Compiled kernels on disk: in `QLORA_RS_KERNEL_CACHE`, or the user's cache folder.

A file's name is NAME-KEY-CONTENT.SUFFIX: KEY is a hash of what the code was made from (sources,
options, architecture, compiler's version), CONTENT a hash of the file itself. So one atomic rename
publishes a file together with its checksum: processes that race write the same thing, and a file
that was damaged later does not match its own name and is built again.

CuPy has a cache of its own for what it compiles; its key and layout are private and change with
versions, and it cannot be filled for another architecture than the present device's.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from qlora_rs.files import write_atomically

VARIABLE = "QLORA_RS_KERNEL_CACHE"


def folder() -> Path:
    """Where compiled kernels are kept; it need not exist yet."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "qlora_rs" / "kernels"


@functools.cache
def _folder_of_this_process() -> tempfile.TemporaryDirectory[str]:
    """Where nothing may be kept (a read-only home): CuPy loads from files."""
    return tempfile.TemporaryDirectory(prefix="qlora_rs-kernels-")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def key(*ingredients: object) -> str:
    """A hash of everything that the compiled code depends on."""
    return _hash("\0".join(map(repr, ingredients)).encode())


def _is_intact(file: Path) -> bool:
    try:
        return _hash(file.read_bytes()) == file.stem.rpartition("-")[2]
    except OSError:
        return False


def fetch(name: str, key: str, suffix: str, build: Callable[[], bytes]) -> Path:
    """The file that holds what `build` returns, from the cache if it is there and intact.

    name: for people who look into the folder. Files that are damaged are replaced.
    """
    place = folder()
    files = sorted(place.glob(f"{name}-{key}-*.{suffix}"))
    for file in files:
        if _is_intact(file):
            return file
    data = build()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = _write(place, name, key, suffix, data)
        for damaged in files:
            if damaged != file:
                damaged.unlink(missing_ok=True)
        return file
    except OSError:
        return _write(Path(_folder_of_this_process().name), name, key, suffix, data)


def _write(place: Path, name: str, key: str, suffix: str, data: bytes) -> Path:
    file = place / f"{name}-{key}-{_hash(data)}.{suffix}"
    write_atomically(file, data)
    return file
