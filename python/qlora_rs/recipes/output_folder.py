"""What a run may write, and where: one output folder, every file old or new and never between.

    OUTPUT/
        run.json        settings and identity of the run; marks the folder as ours
        log.jsonl       one line per optimizer step
        checkpoints/    resumable states (checkpoint.py); removed once the run is complete
        adapter/        the result, in peft's layout
        loss.png        the loss curve
        summary.json    written last: its presence says that the run is complete

Read next: ``checkpoint.py``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_rs.errors import QloraError
from qlora_rs.files import write_atomically

RUN_FILE, SUMMARY_FILE, LOG_FILE = "run.json", "summary.json", "log.jsonl"
LOSS_FILE, ADAPTER_FOLDER, CHECKPOINT_FOLDER = "loss.png", "adapter", "checkpoints"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class FolderKind:
    """How to tell a folder that a command of ours made, and all that the command puts there."""

    command: str
    marker: str
    format: str
    names: tuple[str, ...]


RUN = FolderKind(
    "finetune",
    RUN_FILE,
    "qlora_rs finetune run, version 1",
    (RUN_FILE, SUMMARY_FILE, LOG_FILE, LOSS_FILE, ADAPTER_FOLDER, CHECKPOINT_FOLDER),
)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8); a reader, or a crash, sees the old or the new."""
    write_atomically(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON in the given order; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise QloraError when it is missing, torn or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QloraError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise QloraError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise QloraError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def refuse_existing(output: Path, overwrite: bool, kind: FolderKind = RUN) -> None:
    """Check that a new run may take ``output``; changes nothing.

    An absent or empty folder is free. A used one needs ``overwrite`` and must have been made by
    the same command, with nothing else in it: this guards the only code that deletes user folders.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise QloraError(f"{output} exists and is not a directory; choose another --output")
    entries = sorted(set(os.listdir(output)) - {LOCK_FILE}) if output.exists() else []
    if not entries:
        return
    if not overwrite:
        ways = ["--overwrite to start again", "or another --output"]
        found = f"{len(entries)} " + ("entry" if len(entries) == 1 else "entries")
        found = f"{output} exists and holds {found}"
        if kind is RUN and is_ours(output):
            if (output / SUMMARY_FILE).exists():
                found = f"{output} holds a run that is complete"
            else:
                ways.insert(0, "--resume to continue it")
        raise QloraError(f"{found}; use {', '.join(ways)}")
    if not is_ours(output, kind):
        raise QloraError(
            f"{output} was not made by qlora-rs {kind.command} (no {kind.marker} of ours), so "
            "--overwrite will not delete it; remove it yourself or choose another --output"
        )
    foreign = [name for name in entries if name not in kind.names and not _is_temporary(name)]
    if foreign:
        raise QloraError(
            f"{output} also holds {', '.join(foreign[:5])}, which qlora-rs {kind.command} does not "
            "write, so --overwrite will not delete it; move that away or choose another --output"
        )


def _is_temporary(name: str) -> bool:
    """Say whether ``name`` is what a killed write leaves behind."""
    return name.startswith(".") and name.endswith(".tmp")


def is_ours(output: Path, kind: FolderKind = RUN) -> bool:
    """Say whether ``output`` is a folder that the command ``kind`` made."""
    try:
        return read_json(output / kind.marker).get("format") == kind.format
    except QloraError:
        return False


def clear(output: Path, kind: FolderKind = RUN) -> None:
    """Delete what an earlier run wrote. Call ``refuse_existing(output, True, kind)`` first.

    The marker goes last, so that an interrupted deletion can be repeated.
    """
    names = [name for name in os.listdir(output) if name not in (kind.marker, LOCK_FILE)]
    for name in [*names, kind.marker]:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Hold ``output`` for this process; a second run on the same folder is refused.

    The kernel drops the lock when the process dies, however it dies, so it never has to be
    removed by hand. Where fcntl is missing (Windows) there is no lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (output / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise QloraError(
                f"another process is writing to {output}; wait for it, stop it, or choose "
                "another --output"
            ) from None
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)
