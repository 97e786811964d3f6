"""Training checkpoints: complete or absent, and nothing in them is ever unpickled.

    checkpoints/step-00000042/
        adapter/               save_adapter's files: any checkpoint is a usable adapter
        optimizer.safetensors  moments by parameter
        rng.safetensors        torch's and numpy's generator states
        state.json             schedule, optimizer scalars, Python's generator, parameter names
        trainer_state.json     transformers' own record: step, epoch, log history
        manifest.json          size and SHA-256 of each file above; written last

A checkpoint is filled in a temporary folder, synced file by file, and renamed into place, so its
name appears only when it is whole. ``newest`` still reads every byte against the manifest before
it trusts one, and passes over what does not match. Read next: ``trainer.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch

from qlora_rs.errors import QloraError
from qlora_rs.files import sync_directory, write_atomically
from qlora_rs.recipes.output_folder import read_json, write_json

ADAPTER, OPTIMIZER, RNG = "adapter", "optimizer.safetensors", "rng.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = "qlora_rs checkpoint, version 1"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies (None: there is none) and why others were skipped."""

    path: Path | None
    step: int
    skipped: tuple[str, ...]


def write(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write checkpoint ``step`` into ``folder``; ``fill`` puts the files into the path it gets.

    Killed at any instant, the final name either holds a whole checkpoint or does not exist.
    Returns the checkpoint's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=folder))
    try:
        fill(temporary)
        files = _files_inside(temporary)
        for name in files:
            _sync_file(temporary / name)
        write_json(
            temporary / MANIFEST,
            {
                "format": FORMAT,
                "step": step,
                "files": {name: _measure(temporary / name) for name in files},
            },
        )
        for directory in sorted({(temporary / name).parent for name in files}):
            sync_directory(directory)
        # 0700 is mkdtemp's; a checkpoint is as readable as any other folder of the run.
        temporary.chmod(folder.stat().st_mode & 0o777)
        if final.exists():  # a damaged one of the same step, passed over when resuming
            remove(final)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder)
    return final


def verify(path: Path) -> str | None:
    """Read a checkpoint against its manifest; return None if whole, else what is wrong."""
    try:
        manifest = read_json(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            return f"manifest.json is not {FORMAT!r}"
        files = manifest["files"]
        for name, expected in files.items():
            file = path / name
            # A manifest must not make us read outside its folder.
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"manifest.json names {name!r}, outside the checkpoint"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
            if _measure(file)["sha256"] != expected["sha256"]:
                return f"{name} does not have the recorded SHA-256"
    except (QloraError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def newest(folder: Path) -> Found:
    """Find the newest checkpoint in ``folder`` that verifies.

    Reads every byte of the ones it looks at (a few hundred MB at most for a LoRA run).
    """
    skipped: list[str] = []
    for step, path in _listed(folder):
        fault = verify(path)
        if fault is None:
            return Found(path, step, tuple(skipped))
        skipped.append(f"{path.name}: {fault}")
    return Found(None, 0, tuple(skipped))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what killed writers left behind."""
    for _, path in _listed(folder)[keep:]:
        remove(path)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete one checkpoint; its manifest goes first, so a half-deleted one never verifies."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """List (step, path), newest first."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def _files_inside(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def _measure(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- what a run's state is made of ------------------------------------------------------------


def save_training_state(
    path: Path, optimizer: Any, scheduler: Any, parameter_names: list[str]
) -> None:
    """Write optimizer, schedule and random generators as safetensors and JSON.

    parameter_names: names of the trainable parameters in the optimizer's order; ``load`` refuses
    a model whose names differ. Raises QloraError if an optimizer keeps state that is neither a
    tensor nor plain JSON, because it could not be restored without pickle.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    plain = {
        "parameter_names": parameter_names,
        "param_groups": state["param_groups"],
        "scalars": scalars,
        "scheduler": scheduler.state_dict(),
        "python_rng": random.getstate(),
        "numpy_rng": {k: v for k, v in _numpy_state().items() if k != "keys"},
    }
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise QloraError(
            f"{type(optimizer).__name__} or its schedule keeps state that is not JSON ({error}), "
            "so it cannot be checkpointed without pickle; use --optimizer's default"
        ) from error
    write_atomically(path / STATE, text.encode())
    write_atomically(path / OPTIMIZER, safetensors.torch.save(tensors))
    generators = {
        "torch": torch.random.get_rng_state(),
        "numpy": torch.from_numpy(_numpy_state()["keys"].astype(numpy.int64)),
    }
    write_atomically(path / RNG, safetensors.torch.save(generators))


def load_training_state(
    path: Path, optimizer: Any, scheduler: Any, parameter_names: list[str]
) -> None:
    """Restore optimizer and schedule from ``save_training_state``'s files."""
    plain = read_json(path / STATE)
    if plain["parameter_names"] != parameter_names:
        raise QloraError(
            f"{path.name} was written for {len(plain['parameter_names'])} trainable parameters "
            f"with other names than this model's {len(parameter_names)}; resume with the "
            "settings the run was started with"
        )
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in plain["scalars"].items()
    }
    for name, tensor in safetensors.torch.load((path / OPTIMIZER).read_bytes()).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
    scheduler.load_state_dict(plain["scheduler"])


def load_random_state(path: Path) -> None:
    """Restore Python's, numpy's and torch's (CPU) random generators."""
    plain = read_json(path / STATE)
    generators = safetensors.torch.load((path / RNG).read_bytes())
    torch.random.set_rng_state(generators["torch"])
    version, internal, gauss = plain["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    keys = generators["numpy"].numpy().astype(numpy.uint32)
    state = plain["numpy_rng"]
    numpy.random.set_state({**state, "state": {**state["state"], "key": keys}})


def _numpy_state() -> dict[str, Any]:
    """Return numpy's legacy generator as JSON-ready scalars plus the array ``keys``."""
    state = numpy.random.get_state(legacy=False)
    return {
        "bit_generator": state["bit_generator"],
        "state": {"pos": int(state["state"]["pos"])},
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
        "keys": state["state"]["key"],
    }
