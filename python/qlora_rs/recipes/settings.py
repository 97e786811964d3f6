"""Every option of a fine-tuning run, in one frozen value that is checked once.

The defaults are the QLoRA recipe: rank 16, alpha 32, every linear layer but the LM head, learning
rate 2e-4 falling as a cosine after 3 % of warm-up, gradients clipped at norm 0.3, no weight decay.
Read next: ``finetune.py``, which carries them out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qlora_rs.errors import QloraError

DTYPES = ("bfloat16", "float32", "float16")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class FinetuneSettings:
    """What a run does. Every field is checked on construction; a bad one is a QloraError.

    model: model directory or .gguf file. data: JSONL file. output: folder the run may fill.
    batch_size: packed rows of max_length tokens per forward pass.
    gradient_accumulation: forward passes per optimizer step.
    epochs / max_steps: length of the run; max_steps (optimizer steps) wins where given.
    eval_fraction: share of the examples held out, on which the loss is measured.
    save_every: optimizer steps between checkpoints; 0 writes one only when interrupted.

    >>> FinetuneSettings("model", "train.jsonl", "out").learning_rate
    0.0002
    >>> FinetuneSettings("model", "train.jsonl", "out", r=0)
    Traceback (most recent call last):
        ...
    qlora_rs.QloraError: --r must be between 1 and 4096, got 0 (try 16)
    """

    model: str
    data: str
    output: str
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 1
    gradient_accumulation: int = 4
    max_length: int = 1024
    packing: bool = True
    seed: int = 0
    eval_fraction: float = 0.0
    save_every: int = 100
    keep_checkpoints: bool = False
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if not str(getattr(self, name)):
                raise QloraError(f"--{name} is empty; give a path")
            object.__setattr__(self, name, str(getattr(self, name)))
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        self._whole("r", 1, 4096, 16)
        self._whole("batch_size", 1, 4096, 1)
        self._whole("gradient_accumulation", 1, 65536, 4)
        self._whole("max_length", 8, 1 << 20, 1024)
        self._whole("seed", 0, 2**32 - 1, 0)
        self._whole("save_every", 0, 1 << 31, 100)
        if self.max_steps is not None:
            self._whole("max_steps", 1, 1 << 31, 100)
        self._real("alpha", 0.0, 1e6, 2 * self.r, open_left=True)
        self._real("learning_rate", 0.0, 1.0, 2e-4, open_left=True)
        self._real("epochs", 0.0, 1e6, 1, open_left=True)
        self._real("max_grad_norm", 0.0, 1e6, 0.3)
        self._real("weight_decay", 0.0, 1.0, 0.0)
        self._real("warmup", 0.0, 0.99, 0.03)
        self._real("dropout", 0.0, 0.99, 0.0)
        self._real("eval_fraction", 0.0, 0.9, 0.05)
        self._one_of("dtype", DTYPES)
        self._one_of("schedule", SCHEDULES)

    def _whole(self, name: str, low: int, high: int, advice: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise QloraError(
                f"{option(name)} must be between {low} and {high}, got {value} (try {advice})"
            )

    def _real(
        self, name: str, low: float, high: float, advice: float, open_left: bool = False
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise QloraError(
                f"{option(name)} must be between {low:g} and {high:g}, got {value} (try {advice:g})"
            )
        if open_left and value == low:
            raise QloraError(f"{option(name)} must be above {low:g} (try {advice:g})")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise QloraError(
                f"{option(name)} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict from which ``from_json`` rebuilds an equal value."""
        value = dataclasses.asdict(self)
        if isinstance(self.target_modules, tuple):
            value["target_modules"] = list(self.target_modules)
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FinetuneSettings:
        """Rebuild settings written by ``to_json``; unknown or missing fields are refused."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(value) != names:
            odd = ", ".join(sorted(set(value) ^ names))
            raise QloraError(
                f"the run was made by another version of qlora_rs (settings differ: {odd}); "
                "resume it with that version, or start again with --overwrite"
            )
        return cls(**value)


def option(name: str) -> str:
    """Return the command-line spelling of a settings field.

    >>> option("learning_rate")
    '--learning-rate'
    """
    return "--" + name.replace("_", "-")
