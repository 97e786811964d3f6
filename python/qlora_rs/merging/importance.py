"""Which tokens matter: H weighted by how much the model's answer depends on a layer's outputs.

The loss of answers to a small error d of a layer's output at one token is, to second order,
½ dᵀ F d with F = E[g gᵀ], g the gradient of log p(y) at that output, y drawn from the model's own
prediction (the Fisher information). Of F only its trace is used here, one weight per token: an
error counts where the model is sensitive. (`coupling.py` uses all of F.) Mixed into H by a share
(`WEIGHTED_SHARE`), it lowers the merged model's KL and costs plain output error; a larger share
does more of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.merging.evaluate import logits_of, scored
from qlora_rs.merging.shrinkage import draw_in, shrink
from qlora_rs.merging.statistics import Batch, Gram, Moment, hooks_on, squared_lengths
from qlora_rs.merging.unbiased import RETURNED


@dataclass(frozen=True)
class MethodSettings:
    """Whether a method's H is shrunk; whether rows are coupled (`coupling.py`); and how much is
    given back of what the update lacks, at most, as a share of its own effect (`unbiased.py`)."""

    shrunk: bool
    coupled: bool
    returned: float


# By the KL that the whole model ends with, no shrinkage is better where scales are trained
# afterwards; for the outputs of each layer by itself, which `calibrated` answers for, the other.
METHOD_SETTINGS = {
    "calibrated": MethodSettings(shrunk=True, coupled=False, returned=RETURNED),
    "distilled": MethodSettings(shrunk=False, coupled=True, returned=1.0),
}
# One batch of so many is enough for weights, which need a backward pass.
EVERY = 6
# Of H, its weighted form: more costs the outputs of single layers, less the model's answers.
WEIGHTED_SHARE = 0.25


def weighing(model: nn.Module) -> Callable[[list[Moment], int, Batch], bool]:
    """For `collect`: every `EVERY`-th batch gives its plain and its weighted H in one pass.

    Memory: the activations of one batch, as for a training step, and one more H per group.
    """

    def weigh(portion: list[Moment], place: int, batch: Batch) -> bool:
        if place % EVERY or not scored(batch)[0].any():
            return False
        frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            # Seeded by the batch's place: the draws of a budget that reads the text twice agree.
            with torch.enable_grad():
                _pass(model, portion, batch, torch.Generator().manual_seed(place))
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return True

    return weigh


def mixed(group: Moment, settings: MethodSettings) -> Tensor:
    """H of a group for the solver: shrunk, then what a few tokens have beyond the rest, then the
    weighted form mixed in, shrunk too, where there is one; traces are kept."""
    plain = draw_in(group.mean(), group.tokens) if settings.shrunk else group.mean()
    if group.excess is not None:
        plain.add_(group.excess.sum(), alpha=1.0 / group.tokens)
    if group.weighted is None:
        return plain
    weighted = group.weighted.sum()
    trace, own = float(plain.trace()), float(weighted.trace())
    if not (0.0 < own < float("inf")) or not torch.isfinite(weighted).all():
        return plain
    if settings.shrunk:
        weighted = shrink(weighted, group.weighted_tokens)
    return plain.mul_(1.0 - WEIGHTED_SHARE).add_(weighted, alpha=WEIGHTED_SHARE * trace / own)


def _pass(
    model: nn.Module, portion: list[Moment], batch: Batch, generator: torch.Generator
) -> None:
    mask, _ = scored(batch)
    kept = batch["attention_mask"].bool() if "attention_mask" in batch else None
    inputs: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}

    def look(place: int, name: str) -> Callable[..., None]:
        def after(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            if place not in inputs:
                inputs[place] = arguments[0].detach()
                portion[place].add(inputs[place], kept)
            if output.requires_grad:
                output.register_hook(lambda grad: count(place, name, grad))

        return after

    def count(place: int, name: str, grad: Tensor) -> None:
        weight = squared_lengths(grad)
        weights[place] = weights[place] + weight if place in weights else weight
        if name in portion[place].outputs:
            portion[place].outputs[name].add(grad)

    def start(module: nn.Module, arguments: tuple) -> None:
        # The gradient's graph begins here: before it, everything is frozen.
        if not arguments[0].requires_grad and arguments[0].is_leaf:
            arguments[0].requires_grad_(True)

    first: Any = portion[0].layers[0].module
    after = {m.module: look(i, m.name) for i, group in enumerate(portion) for m in group.layers}
    with hooks_on({first: start}), hooks_on(after, after=True):
        logits = logits_of(model, batch)[:, :-1][mask]
        if not logits.requires_grad:
            return
        with torch.no_grad():
            gradient = logits.detach().float().softmax(-1)
            drawn = _draw(gradient, generator)
            # What is not finite here is refused by name when H is taken.
            if drawn is None:
                return
            gradient.scatter_add_(1, drawn, torch.full_like(drawn, -1.0, dtype=torch.float32))
        logits.backward(gradient.to(logits.dtype))
    for place, weight in weights.items():
        group, x = portion[place], inputs[place]
        if group.weighted is None:
            group.weighted = Gram(group.columns)
        rows = x.reshape(-1, x.shape[-1]).float() * weight.reshape(-1, 1).sqrt()
        group.weighted.add(rows)
        # Rows that no answer depends on, padding among them, tell nothing.
        group.weighted_tokens += int(weight.count_nonzero())


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor | None:
    """One index [rows, 1] of each row of [rows, n], by inverting the distribution: a single random
    number per row, where `torch.multinomial` takes one per entry. None where a row holds NaN."""
    reached = probabilities.cumsum(-1)
    if reached[:, -1].isnan().any():
        return None
    uniform = torch.rand(reached.shape[0], 1, generator=generator)
    drawn = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    return drawn.clamp_(max=reached.shape[1] - 1)
