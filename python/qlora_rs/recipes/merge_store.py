"""Layers that a merge has finished, on disk, so that an interrupted one goes on where it stopped.

    .OUT.merging/identity.json        what must be equal for the layers to be used again
    .OUT.merging/<layer>.safetensors  one merged weight in bitsandbytes' format; written atomically
    .OUT.merging/<distillation>.safetensors   what distillation has learned so far

File names are digests. A file that cannot be read counts as absent: its layer is solved again.
Removed when the merge is complete.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from qlora_rs.errors import QloraError
from qlora_rs.files import write_atomically
from qlora_rs.quantize import PackedWeight
from qlora_rs.recipes.output_folder import read_json, write_json

IDENTITY = "identity.json"


class LayerStore:
    """Finished layers of one merge, by name."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Open `path`, dropping layers of another merge than `identity` describes."""
        self.path = path
        try:
            same = read_json(path / IDENTITY) == identity
        except QloraError:
            same = False
        if not same:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            write_json(path / IDENTITY, identity)

    def _file(self, name: str) -> Path:
        # Layer names may be long, and may hold what file names may not.
        return self.path / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def get(self, name: str) -> tuple[PackedWeight, tuple[Tensor, Tensor] | None] | None:
        """A finished layer and what stays beside it as an adapter (B, A); None if there is none."""
        tensors = self.load(name)
        if tensors is None:
            return None
        try:
            residual = None
            if "residual_b" in tensors:
                residual = (tensors.pop("residual_b"), tensors.pop("residual_a"))
            return PackedWeight.from_bitsandbytes(tensors, "weight"), residual
        except (ValueError, KeyError):
            return None

    def put(
        self, name: str, packed: PackedWeight, residual: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Keep a finished layer."""
        tensors = packed.to_bitsandbytes("weight")
        if residual is not None:
            tensors |= {"residual_b": residual[0], "residual_a": residual[1]}
        self.save(name, tensors)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that were saved; None if they are not there or damaged."""
        try:
            return safetensors.torch.load(self._file(name).read_bytes())
        except (OSError, ValueError, KeyError, safetensors.SafetensorError):
            return None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name that is no layer's, or a layer's."""
        data = safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()})
        write_atomically(self._file(name), data)

    def remove(self) -> None:
        """Delete everything: the merge is complete."""
        shutil.rmtree(self.path, ignore_errors=True)
