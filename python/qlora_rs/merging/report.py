"""What a merge cost: each layer, the whole model, and what to do about it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_rs.errors import QloraError
from qlora_rs.files import write_json

# Above this share of its own update, a layer's error means that the update is lost.
ERASED = 0.9


@dataclass(frozen=True)
class LayerReport:
    """Errors of one layer's outputs, as norms over text; E = wanted - merged weights.

    error_to_output: ‖X Eᵀ‖ / ‖X Wᵀ‖. error_to_update: ‖X Eᵀ‖ / ‖X Δᵀ‖; 1 means that the update
    might as well have been dropped. nearest_to_update: the same for plain rounding.
    ratio_to_nearest: ours / plain rounding's. fallback: why it was rounded to nearest, if it was.
    """

    name: str
    shape: tuple[int, int]
    error_to_output: float
    error_to_update: float
    nearest_to_update: float
    ratio_to_nearest: float
    fallback: str | None = None


@dataclass(frozen=True)
class ModelScores:
    """One model on the held-out tokens: mean KL(unmerged ‖ it) in nats per token, the share of
    tokens whose likeliest successor is the same, and its loss in nats per token."""

    kl: float
    top1_agreement: float
    loss: float


@dataclass
class MergeReport:
    """What `merge_model` returns.

    layers: one entry per merged layer, measured on the held-out text. unmerged_loss, base_loss:
    loss with the adapter, and with it dropped. nearest, merged: scores of plain rounding (peft's
    merge) and of this merge; None where no text was given. tokens: how many calibrated, and how
    many were held out. seconds: per stage. extra_bytes: the most that statistics and their
    factors took at any time.
    """

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    merged: ModelScores | None = None
    nearest: ModelScores | None = None
    unmerged_loss: float | None = None
    base_loss: float | None = None
    calibration_tokens: int = 0
    held_out_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    extra_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def mean_ratio_to_nearest(self) -> float:
        """Mean over layers of ours / plain rounding's output error."""
        return _mean([layer.ratio_to_nearest for layer in self.layers])

    @property
    def mean_error_to_update(self) -> float:
        """Mean over layers of the output error relative to the update's own contribution."""
        return _mean([layer.error_to_update for layer in self.layers])

    @property
    def kl_removed(self) -> float | None:
        """Share of plain rounding's KL that this merge does not have."""
        if self.merged is None or self.nearest is None or self.nearest.kl <= 0.0:
            return None
        return 1.0 - self.merged.kl / self.nearest.kl

    def gain_kept(self, scores: ModelScores | None) -> float | None:
        """Share of what training gained in loss that a merged model keeps."""
        if scores is None or self.base_loss is None or self.unmerged_loss is None:
            return None
        gain = self.base_loss - self.unmerged_loss
        return (self.base_loss - scores.loss) / gain if gain > 0.0 else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        derived = {
            "mean_ratio_to_nearest": self.mean_ratio_to_nearest,
            "mean_error_to_update": self.mean_error_to_update,
            "layers_worse_than_nearest": sum(m.ratio_to_nearest > 1.0 for m in self.layers),
            "kl_removed": self.kl_removed,
            "gain_kept": self.gain_kept(self.merged),
            "gain_kept_by_nearest": self.gain_kept(self.nearest),
        }
        return _finite({"summary": derived, **dataclasses.asdict(self)})

    def write(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    def advice(self) -> list[str]:
        """What a user should know, one sentence each."""
        found = list(self.notes)
        fallen = [layer for layer in self.layers if layer.fallback]
        if fallen:
            found.append(f"{len(fallen)} layer(s) were rounded to nearest: {fallen[0].fallback}")
        erased = [layer for layer in self.layers if layer.error_to_update > ERASED]
        # Distilled scales make up for each other across layers: there the model's KL says it.
        if erased and not (self.method == "distilled" and self.merged is not None):
            worst = max(erased, key=lambda layer: layer.error_to_update)
            remedy = (
                'use the method "calibrated" with text like your training data'
                if self.method == "nearest"
                else "train longer, give more calibration text, keep some directions apart "
                "(hybrid_rank) or keep the adapter separate"
            )
            found.append(
                f"in {len(erased)} of {len(self.layers)} layers the error is above "
                f"{ERASED:.0%} of the update itself (worst: {worst.name}, "
                f"{worst.error_to_update:.0%}), so the update is as good as lost there; {remedy}"
            )
        return found

    def guard(self, limit_kl: float | None) -> None:
        """Warn of what was lost; refuse what is above the limit.

        Raises QloraError when the merged model's KL is above `limit_kl`, or unknown.
        """
        for sentence in self.advice():
            warnings.warn(sentence, stacklevel=3)
        if limit_kl is None:
            return
        if self.merged is None:
            raise QloraError(
                "limit_kl needs text to measure on; give calibration or evaluation batches"
            )
        if self.merged.kl > limit_kl:
            better = {
                "nearest": 'use the method "calibrated" or "distilled"',
                "calibrated": 'use the method "distilled", or hybrid_rank to keep some directions',
                "distilled": "give more calibration text, or keep the adapter separate",
            }[self.method]
            raise QloraError(
                f"the merged model's KL to the unmerged one is {self.merged.kl:.4g} nats per "
                f"token, above the limit {limit_kl:g}; {better}. The model is as it was"
            )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_table(report: MergeReport) -> str:
    """The report as a person reads it.

    >>> print(report_table(MergeReport("nearest")).splitlines()[0])
    Merged (nearest)
    """
    lines = [f"Merged ({report.method})"]

    def row(label: str, text: str) -> None:
        lines.append(f"  {label:<24} {text}")

    if report.layers:
        worst = max(report.layers, key=lambda layer: layer.error_to_update)
        row("layers", f"{len(report.layers)}")
        row(
            "output error",
            f"{report.mean_error_to_update:.3f} of the update (mean); worst "
            f"{worst.error_to_update:.3f} in {worst.name}",
        )
        row("against plain rounding", f"{report.mean_ratio_to_nearest:.3f} of its error (mean)")
    if report.merged is not None:
        row("held-out tokens scored", f"{report.held_out_tokens:,}")
        row("KL to the unmerged model", _against(report, "kl", "{:.4g} nats per token"))
        row("same likeliest token", _against(report, "top1_agreement", "{:.1%}"))
        row("loss", _against(report, "loss", "{:.4f}"))
        row("  unmerged", f"{report.unmerged_loss:.4f}")
        row("  base, adapter dropped", f"{report.base_loss:.4f}")
        kept, plain = report.gain_kept(report.merged), report.gain_kept(report.nearest)
        if kept is not None and plain is not None:
            row("gain of training kept", f"{kept:.1%} (plain rounding {plain:.1%})")
    if report.calibration_tokens:
        label = "layers measured on" if report.method == "nearest" else "calibrated on"
        row(label, f"{report.calibration_tokens:,} tokens")
    row("peak extra memory", f"{report.extra_bytes / 1e6:.1f} MB")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    row("time", stages or "-")
    lines += [f"  note: {sentence}" for sentence in report.advice()]
    return "\n".join(lines)


def _against(report: MergeReport, name: str, form: str) -> str:
    text = form.format(getattr(report.merged, name))
    if report.nearest is None:
        return text
    return f"{text} (plain rounding {form.format(getattr(report.nearest, name))})"


def plot_layers(report: MergeReport, path: str | Path) -> None:
    """Draw every layer's output error relative to its update, ours beside plain rounding's.

    path: .png or .svg. Raises QloraError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QloraError(f"a plot needs matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(report.layers))
    for label, name, colour in (
        ("plain rounding", "nearest_to_update", "#b0413e"),
        (report.method, "error_to_update", "#2a6f97"),
    ):
        values = [getattr(layer, name) for layer in report.layers]
        axes.plot(places, values, ".", color=colour, label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(
        xlabel="layer, from the model's input to its output",
        ylabel="error / the update's own effect",
        ylim=(0, None),
        title="1 = the update might as well have been dropped",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
