"""Models side by side on the same tokens: KL, agreement and loss, without keeping logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.merging.report import ModelScores
from qlora_rs.merging.statistics import Batch
from qlora_rs.model import replace_modules

IGNORED = -100
# Tokens whose logits are compared at a time: 32 x 49152 float32 are 6 MB, which caches hold.
CHUNK = 32


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model is called with: everything but the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [batch, length, vocabulary] of a causal language model (or of any module that maps
    the batch's inputs to logits)."""
    inputs = model_inputs(batch)
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        outputs: Any = model(**inputs, use_cache=False)
    else:
        outputs = model(**inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """(mask [batch, length - 1] of the positions whose successor counts, successors).

    With labels, those that are not -100 (the answers); else every token that is not padding.
    """
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    targets = labels[:, 1:]
    return targets != IGNORED, targets


@contextlib.contextmanager
def replaced(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Other layers in the model for the length of a block."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        replace_modules(model, layers)
        yield
    finally:
        replace_modules(model, before)


@dataclass
class _Sums:
    kl: float = 0.0
    same: int = 0
    loss: float = 0.0


@torch.no_grad()
def compare(
    model: nn.Module,
    variants: dict[str, dict[str, nn.Module]],
    batches: Iterable[Batch],
    progress: Callable[[], None] | None = None,
) -> tuple[float, dict[str, ModelScores], int]:
    """Score variants of `model`, each given by the layers to replace, against the model itself.

    Returns the model's own loss, the scores, and the number of tokens. Memory: the logits of one
    batch for the model and one variant.
    """
    own, tokens = 0.0, 0
    sums = {name: _Sums() for name in variants}
    for batch in batches:
        mask, targets = scored(batch)
        count = int(mask.sum())
        if count == 0:
            continue
        tokens += count
        chosen = targets[mask]
        reference = logits_of(model, batch)[:, :-1][mask]
        for logits, target in zip(reference.split(CHUNK), chosen.split(CHUNK), strict=True):
            own += float(nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
        for name, layers in variants.items():
            with replaced(model, layers):
                logits = logits_of(model, batch)[:, :-1][mask]
            _add(sums[name], reference, logits, chosen)
            if progress is not None:
                progress()
    scores = {
        name: ModelScores(s.kl / tokens, s.same / tokens, s.loss / tokens)
        for name, s in sums.items()
        if tokens
    }
    return own / max(tokens, 1), scores, tokens


def _add(sums: _Sums, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
    parts = zip(reference.split(CHUNK), logits.split(CHUNK), targets.split(CHUNK), strict=True)
    for theirs, ours, target in parts:
        expected, found = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        sums.kl += float((expected.exp() * (expected - found)).sum(-1).double().sum())
        sums.same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        sums.loss -= float(found.gather(1, target[:, None]).sum(dtype=torch.float64))
