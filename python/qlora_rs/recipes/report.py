"""What a run leaves for people: the loss curve and the summary table.

Read next: ``finetune.py``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_rs.files import write_atomically
from qlora_rs.recipes.progress import duration, size


def draw_loss_curve(path: Path, log: list[dict[str, Any]], title: str) -> bool:
    """Draw loss over optimizer steps as PNG; return False when matplotlib is not installed.

    log: entries of log.jsonl. The thin line is each step, the thick one their running mean.
    """
    try:
        # The object interface needs no display and leaves pyplot's global state alone.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [entry["step"] for entry in log if "loss" in entry]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    figure = Figure(figsize=(7.0, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, linewidth=0.8, alpha=0.4, color="tab:blue", label="each step")
    axes.plot(steps, running_mean(losses), linewidth=2.0, color="tab:blue", label="running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomically(path, picture.getvalue())
    return True


def running_mean(values: Sequence[float], window: int = 15) -> list[float]:
    """Mean of the last ``window`` values at each place.

    >>> running_mean([4.0, 2.0, 0.0], window=2)
    [4.0, 3.0, 1.0]
    """
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def table(rows: Sequence[tuple[str, str]], title: str | None = None) -> str:
    """Lay out label and value pairs for a person to read.

    >>> print(table([("steps", "12"), ("tokens/s", "431")]))
      steps     12
      tokens/s  431
    """
    width = max((len(label) for label, _ in rows), default=0)
    lines = [f"  {label:<{width}}  {value}".rstrip() for label, value in rows]
    return "\n".join([title, *lines] if title else lines)


def finetune_table(summary: dict[str, Any]) -> str:
    """Lay out summary.json of a run."""
    loss = f"{summary['first_loss']:.3f} -> {summary['last_loss']:.3f} per answer token"
    window = summary.get("loss_window", 1)  # summaries of earlier versions do not say
    if window > 1:
        loss += f" (means of the first and the last {window} steps)"
    rows = [
        ("base model", f"{summary['model']} ({summary['parameters']:,} parameters)"),
        (
            "weights",
            f"{size(summary['float_bytes'])} {summary['dtype']} -> "
            f"{size(summary['quantized_bytes'])} with NF4 linear layers",
        ),
        ("adapter", f"{summary['trainable_parameters']:,} trainable parameters"),
        (
            "data",
            f"{summary['examples']:,} examples, {summary['data_tokens']:,} tokens, "
            f"{summary['answer_tokens']:,} of them answers",
        ),
        ("trained", f"{summary['steps']:,} steps, {summary['tokens']:,} tokens"),
        ("speed-ups", ", ".join(summary["speed_ups"]) or "none fits this model"),
        ("loss", loss),
    ]
    if summary.get("held_out_loss") is not None:
        before = summary.get("held_out_loss_before")
        start = "" if before is None else f"{before:.3f} -> "
        rows.append(("held-out loss", f"{start}{summary['held_out_loss']:.3f}"))
    rows.append(
        (
            "time",
            f"{duration(summary['train_seconds'])} training, "
            f"{summary['tokens_per_second']:.0f} tokens/s",
        )
    )
    rows.append(("peak memory", f"{size(summary['peak_rss_bytes'])} (whole process)"))
    rows.append(("adapter in", summary["adapter"]))
    return table(rows, "Fine-tuning finished")


def model_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, as the operating system counts it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
