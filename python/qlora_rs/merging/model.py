"""`merge_model` and `unmerge`: a whole model, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.errors import QloraError, check_model
from qlora_rs.layers import NF4Linear
from qlora_rs.merging import distill as distillation
from qlora_rs.merging import importance, solve
from qlora_rs.merging.adapted import AdaptedLayer, find_adapted
from qlora_rs.merging.coupling import OutputMoment
from qlora_rs.merging.evaluate import compare, model_inputs
from qlora_rs.merging.report import LayerReport, MergeReport
from qlora_rs.merging.statistics import (
    Batch,
    Moment,
    as_batches,
    collect,
    count_tokens,
    group_by_input,
)
from qlora_rs.merging.unbiased import calibrate_unbiased
from qlora_rs.model import replace_modules
from qlora_rs.quantize import PackedWeight

# With fewer tokens than inputs, H has directions that no token ever showed.
FEWEST_TOKENS = 256
HELD_OUT = 8  # one batch of so many is set aside where no evaluation text is given
BUDGET = 2 << 30
_UNDO = "_qlora_rs_unmerged"

Report = Callable[[str, int, int], None]
Residual = tuple[Tensor, Tensor]  # B, A


def merge_model(
    model: nn.Module,
    method: str = "calibrated",
    calibration: Iterable[Any] | None = None,
    evaluation: Iterable[Any] | None = None,
    hybrid_rank: int = 0,
    limit_kl: float | None = None,
    reversible: bool = True,
    memory_budget: int = BUDGET,
    steps: int = distillation.STEPS,
    learning_rate: float = distillation.LEARNING_RATE,
    progress: Report | None = None,
    store: Any = None,
) -> MergeReport:
    """Merge all active adapters of a model into its 4-bit weights, in place.

    model: quantized, with adapters of ours or of peft (over our layers or bitsandbytes'). method:
    "nearest" rounds as peft does; "calibrated" keeps each layer's outputs on the calibration text;
    "distilled" solves for the answers of the whole model and then trains the block scales for
    `steps` steps towards the unmerged model's logits (0: leaves them as solved).
    calibration: token ids [batch, length], or dicts of model inputs ("labels", where given, choose
    the positions that count), like the text that the model will see. evaluation: text to measure
    on; by default every eighth batch of the calibration is set aside. hybrid_rank: so many
    directions of each update stay beside the merged weight as a small adapter. limit_kl: refuse a
    merged model farther from the unmerged one, in nats per token. reversible: keep the original
    layers so that `unmerge` can put them back (their memory stays in use). memory_budget: bytes
    that statistics may take; below what all layers need, the text is read several times. progress:
    called as (stage, done, total).
    Raises QloraError, and leaves the model as it was, when anything does not fit or is above the
    limit. Returns the report; warns where an update is as good as lost.
    """
    check_model(model)
    if method not in solve.METHODS:
        raise QloraError(f"method must be one of {', '.join(solve.METHODS)}, got {method!r}")
    if type(steps) is not int or steps < 0:
        raise QloraError(f"steps must be a whole number from 0 on, got {steps!r}")
    layers = find_adapted(model)
    report = MergeReport(method)
    fitting, held_out = _split(calibration, evaluation, method)
    report.calibration_tokens = count_tokens(fitting) if method != "nearest" else 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        job = _Job(model, layers, report, memory_budget, progress or (lambda *_: None), store)
        merged = job.run(method, fitting, held_out, hybrid_rank, steps, learning_rate)
    finally:
        for module, training in modes.items():
            module.training = training
    report.guard(limit_kl)
    undo = {layer.name: layer.module for layer in layers}
    replace_modules(
        model, {name: layer.train(undo[name].training) for name, layer in merged.items()}
    )
    if reversible:
        # Past nn.Module's own attribute setter: these are no submodules.
        earlier = model.__dict__.get(_UNDO, {})
        object.__setattr__(model, _UNDO, {**undo, **earlier})
    return report


def unmerge(model: nn.Module) -> nn.Module:
    """Put back the layers that `merge_model` replaced: the original bytes, and the adapters.

    Raises QloraError when the model was not merged, or merged with `reversible=False`.
    """
    check_model(model)
    undo = model.__dict__.pop(_UNDO, None)
    if not undo:
        raise QloraError(
            "the model was not merged by merge_model (or with reversible=False); load the base "
            "and the adapter again"
        )
    replace_modules(model, {name: layer.train(model.training) for name, layer in undo.items()})
    return model


def _split(
    calibration: Iterable[Any] | None, evaluation: Iterable[Any] | None, method: str
) -> tuple[list[Batch], list[Batch]]:
    fitting = as_batches(calibration) if calibration is not None else []
    held_out = as_batches(evaluation) if evaluation is not None else []
    if not held_out and len(fitting) >= 2:
        held_out = fitting[HELD_OUT - 1 :: HELD_OUT] or fitting[-1:]
        chosen = {id(batch) for batch in held_out}
        fitting = [batch for batch in fitting if id(batch) not in chosen]
    if method == "nearest":
        return fitting, held_out
    tokens = count_tokens(fitting)
    if tokens < FEWEST_TOKENS:
        raise QloraError(
            f'method "{method}" needs calibration text: {tokens} tokens are left to calibrate on, '
            f"at least {FEWEST_TOKENS} are needed and some 12,000 are good (in two batches or "
            'more, of which some are set aside to measure on); method "nearest" needs none'
        )
    return fitting, held_out


def _format(packed: PackedWeight) -> tuple:
    """What a stored result must have in common with the layer that it is for."""
    return packed.shape, packed.block_size, packed.double_quant


@dataclass(frozen=True)
class _Known:
    """What statistics tell the solver of one layer; curvature: None where blocks span rows."""

    second_moment: Tensor
    curvature: solve.Curvature | None
    anneal: int
    couplings: list[solve.Coupling] | None
    returned: float


class _Job:
    """One merge in progress."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[AdaptedLayer],
        report: MergeReport,
        budget: int,
        progress: Report,
        store: Any,
    ) -> None:
        self.model, self.layers, self.report = model, layers, report
        self.budget, self.progress, self.store = budget, progress, store
        self.nearest: dict[str, PackedWeight] = {}
        self.merged: dict[str, PackedWeight] = {}
        self.residuals: dict[str, Residual] = {}
        self.fallbacks: dict[str, str] = {}

    @torch.no_grad()
    def run(
        self,
        method: str,
        fitting: list[Batch],
        held_out: list[Batch],
        hybrid_rank: int,
        steps: int,
        learning_rate: float,
    ) -> dict[str, NF4Linear]:
        """Return the layers to put in place, the report filled in."""
        started = time.monotonic()
        if method == "nearest":
            for layer in self.layers:
                self._solve(layer, hybrid_rank)
        else:
            self._calibrate(fitting, hybrid_rank, method)
        self._clock("calibrate" if method != "nearest" else "round", started)
        merged = {layer.name: self._replacement(layer) for layer in self.layers}
        if method == "distilled" and steps > 0:
            started = time.monotonic()
            with torch.enable_grad():
                packed = distillation.distill(
                    self.model,
                    merged,
                    fitting,
                    steps,
                    learning_rate,
                    progress=lambda done, total, kl: self.progress("distill", done, total),
                    store=self.store,
                )
            self.merged |= packed
            merged = {layer.name: self._replacement(layer) for layer in self.layers}
            self._clock("distill", started)
        started = time.monotonic()
        self._measure(merged, held_out)
        self._clock("measure", started)
        return merged

    def _clock(self, stage: str, started: float) -> None:
        self.report.seconds[stage] = round(time.monotonic() - started, 2)

    def _forward(self, batch: Batch) -> None:
        self.model(**model_inputs(batch))

    def _groups(self, batch: Batch) -> list[Moment]:
        return group_by_input(self.model, self.layers, batch, self._forward)

    def _calibrate(self, batches: list[Batch], hybrid_rank: int, method: str) -> None:
        settings = importance.METHOD_SETTINGS[method]
        groups = [group for group in self._groups(batches[0]) if not self._restore(group)]
        for group in groups:
            group.parted = True
            if settings.coupled:
                rows = {layer.name: layer.packed.shape[0] for layer in group.layers}
                group.outputs = {name: OutputMoment(count) for name, count in rows.items()}
        done = len(self.merged)
        stage = "statistics"
        portions = collect(
            self.model,
            groups,
            batches,
            self._forward,
            self.budget,
            lambda done, total: self.progress(stage, done, total),
            importance.weighing(self.model),
        )
        for portion in portions:
            held = sum(group.nbytes for group in portion)
            for group in portion:
                own = group.nbytes
                second_moment = importance.mixed(group, settings)
                anneal = solve.ANNEAL
                if settings.shrunk:
                    anneal = solve.anneal_sweeps(group.tokens, group.columns)
                curvature = None
                size = group.layers[0].packed.block_size
                if group.columns % size == 0:
                    curvature = solve.Curvature.of(second_moment, size)
                for layer in group.layers:
                    outputs = group.outputs.get(layer.name)
                    couplings = outputs.couplings() if outputs is not None else None
                    known = _Known(second_moment, curvature, anneal, couplings, settings.returned)
                    self._solve(layer, hybrid_rank, known)
                    done += 1
                    self.progress("solve", done, len(self.layers))
                    self._keep(layer.name)
                largest = max(layer.packed.shape.numel() for layer in group.layers)
                # H, its mean and what is made of it, or H, U and the order kept, and the factor in
                # float64; target, delta, lanes of the strips; F and its factor in float64.
                working = 4 * (group.columns**2 * 5) + 4 * 5 * largest
                working += 5 * max((m.nbytes for m in group.outputs.values()), default=0)
                self.report.extra_bytes = max(self.report.extra_bytes, held + working)
                group.forget()
                held -= own

    def _restore(self, group: Moment) -> bool:
        """Take all layers of a group from the store, if it has them."""
        if self.store is None:
            return False
        found = {layer.name: self.store.get(layer.name) for layer in group.layers}
        for layer in group.layers:
            entry = found[layer.name]
            if entry is None or _format(entry[0]) != _format(layer.packed):
                return False
        for layer in group.layers:
            packed, residual = found[layer.name]
            if residual is not None:
                self.residuals[layer.name] = residual
            self.nearest[layer.name] = self._round(layer)
            self.merged[layer.name] = packed
        return True

    def _keep(self, name: str) -> None:
        if self.store is not None:
            self.store.put(name, self.merged[name], self.residuals.get(name))

    def _round(self, layer: AdaptedLayer) -> PackedWeight:
        """Plain rounding of what is to be merged."""
        wanted = layer.target(layer.packed.dtype)
        if layer.name in self.residuals:
            lora_b, lora_a = self.residuals[layer.name]
            wanted = wanted - lora_b @ lora_a
        return solve.quantize_like(layer.packed, wanted)

    def _solve(
        self,
        layer: AdaptedLayer,
        hybrid_rank: int,
        known: _Known | None = None,
    ) -> None:
        wanted = layer.target()
        if not torch.isfinite(wanted).all():
            raise QloraError(f"the adapter of {layer.name} holds NaN or infinite values")
        if hybrid_rank:
            factors = layer.factors()
            if factors is None:
                raise QloraError(f"hybrid_rank cannot split the DoRA adapter of {layer.name}")
            rank = min(hybrid_rank, factors[1].shape[0])
            second_moment = None if known is None else known.second_moment
            lora_b, lora_a = solve.strongest(*factors, rank, second_moment)
            self.residuals[layer.name] = (lora_b, lora_a)
            wanted = wanted - lora_b @ lora_a
        nearest = self._round(layer)
        self.nearest[layer.name] = self.merged[layer.name] = nearest
        fallback = solve.why_nearest_only(layer.packed)
        if known is not None and fallback is not None:
            self.fallbacks[layer.name] = fallback
        elif known is not None and known.curvature is not None:
            factors = layer.factors()
            self.merged[layer.name] = calibrate_unbiased(
                wanted,
                nearest,
                known.curvature,
                known.second_moment,
                None if factors is None else factors[1],
                wanted - layer.packed.dequantize(torch.float32),
                known.returned,
                known.anneal,
                known.couplings,
            )

    def _replacement(self, layer: AdaptedLayer, packed: PackedWeight | None = None) -> NF4Linear:
        weight = self.merged[layer.name] if packed is None else packed
        return layer.merged(weight, self.residuals.get(layer.name))

    def _measure(self, merged: dict[str, NF4Linear], held_out: list[Batch]) -> None:
        report = self.report
        if not held_out:
            report.layers = [self._layer(layer, None) for layer in self.layers]
            report.notes.append(
                "no text was given to measure on: errors are those of weights, which predict those "
                "of outputs for plain rounding only"
            )
            return
        groups = self._groups(held_out[0])
        found: dict[str, LayerReport] = {}
        portions = collect(
            self.model,
            groups,
            held_out,
            self._forward,
            self.budget,
            lambda done, total: self.progress("measure layers", done, total),
        )
        for portion in portions:
            for group in portion:
                # An expert that the held-out text never chose is measured by its weights.
                moment = group.mean() if group.tokens else None
                for layer in group.layers:
                    found[layer.name] = self._layer(layer, moment)
                group.forget()
        report.layers = [found[layer.name] for layer in self.layers]
        variants: dict[str, dict[str, nn.Module]] = {"merged": dict(merged)}
        if report.method != "nearest":
            variants["nearest"] = {
                layer.name: self._replacement(layer, self.nearest[layer.name])
                for layer in self.layers
            }
        variants["base"] = {layer.name: layer.merged(layer.packed) for layer in self.layers}
        done, total = 0, len(variants) * len(held_out)

        def step() -> None:
            nonlocal done
            done += 1
            self.progress("measure model", done, total)

        report.unmerged_loss, scores, tokens = compare(self.model, variants, held_out, step)
        report.held_out_tokens = tokens
        if tokens:
            report.merged, report.base_loss = scores["merged"], scores["base"].loss
            report.nearest = scores.get("nearest", scores["merged"])

    def _layer(self, layer: AdaptedLayer, second_moment: Tensor | None) -> LayerReport:
        wanted = layer.target()
        delta = wanted - layer.packed.dequantize(torch.float32)
        if layer.name in self.residuals:
            lora_b, lora_a = self.residuals[layer.name]
            wanted = wanted - lora_b @ lora_a
        return solve.measure(
            layer.name,
            wanted,
            delta,
            self.merged[layer.name],
            self.nearest[layer.name],
            second_moment,
            self.fallbacks.get(layer.name),
        )
