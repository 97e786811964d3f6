"""The demonstration: a 4-bit model learns, on this CPU, something it could not do.

    load SmolLM2-135M-Instruct -> NF4 + LoRA -> score -> fine-tune -> score -> save
    -> reload in a fresh process -> same answers

The task and its data are in ``calendar_dates.py``; the training is ``finetune()``, exactly as
``qlora-rs finetune`` runs it on a user's own file. Everything it prints is also in demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_rs.errors import QloraError
from qlora_rs.recipes import calendar_dates, scores
from qlora_rs.recipes import output_folder as folder
from qlora_rs.recipes.base_model import check_model_path, demo_model_path
from qlora_rs.recipes.calendar_dates import DateTask, WrittenDate
from qlora_rs.recipes.data import write_examples
from qlora_rs.recipes.finetune import FinetuneResult, finetune, require_training_libraries
from qlora_rs.recipes.memory_peer import compare_memory
from qlora_rs.recipes.progress import Progress, duration, size
from qlora_rs.recipes.report import table
from qlora_rs.recipes.settings import FinetuneSettings

DEMO_FILE, TRAIN_FILE, HELD_OUT_FILE, RUN_FOLDER = (
    "demo.json", "train.jsonl", "held_out.jsonl", "run"
)  # fmt: skip
DEMO = folder.FolderKind(
    "demo",
    DEMO_FILE,
    "qlora_rs demo, version 1",
    (DEMO_FILE, TRAIN_FILE, HELD_OUT_FILE, RUN_FOLDER),
)
# A date is ten characters, one token each, and the end token; one more shows who runs on.
ANSWER_TOKENS = 12
ROW_TOKENS = 256
SHOWN = 8


@dataclass(frozen=True)
class DemoSettings:
    """How long the demonstration runs. ``quick`` shrinks it to a smoke test of about a minute."""

    output: str = "qlora-demo"
    model: str | None = None
    examples: int = 1400
    held_out: int = 300
    max_steps: int | None = None
    seed: int = 0
    measure_memory: bool = True

    @classmethod
    def quick(cls, output: str = "qlora-demo", model: str | None = None) -> DemoSettings:
        """A few steps on a few examples: it shows that everything works, not that it learns."""
        return cls(output, model, examples=60, held_out=10, max_steps=6, measure_memory=False)


def run_demo(
    settings: DemoSettings, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Run the demonstration; return what demo.json holds, or None when the user stopped it.

    Raises QloraError for a missing package, a used output folder, and when the reloaded adapter
    does not give the same answers.
    """
    started = time.monotonic()
    progress = progress or Progress()
    require_training_libraries()
    model_path = check_model_path(settings.model or demo_model_path())
    output = Path(settings.output).expanduser()
    folder.refuse_existing(output, overwrite, DEMO)
    task = calendar_dates.make_task(settings.examples, settings.held_out, settings.seed)

    output.mkdir(parents=True, exist_ok=True)
    with folder.lock(output):
        folder.clear(output, DEMO)
        folder.write_json(output / DEMO_FILE, {"format": DEMO.format})
        write_examples(output / TRAIN_FILE, (date.example() for date in task.train))
        write_examples(output / HELD_OUT_FILE, (date.example() for date in task.held_out))
        before: list[str] = []
        result = finetune(
            _finetune_settings(settings, str(model_path), output),
            progress=progress,
            on_ready=lambda model, tokenizer: before.extend(
                _answers(model, tokenizer, task, progress, "before training")
            ),
        )
        if not result.finished:
            return None
        after = _answers(result.model, result.tokenizer, task, progress, "after training")
        progress.stage("Reloading the adapter in a fresh process")
        reloaded = _reload(model_path, output)
        if reloaded != after:
            changed = sum(a != b for a, b in zip(reloaded, after, strict=False))
            raise QloraError(
                f"the reloaded adapter gives {changed} other answers of {len(after)}; this is a "
                "defect of qlora_rs, please report it"
            )
        memory = None
        if settings.measure_memory:
            progress.stage("Measuring memory against the float model, in fresh processes")
            memory = compare_memory(result.model, ROW_TOKENS, result.settings.dtype)
        report = _report(settings, task, result, (before, after, reloaded), memory)
        report["seconds"] = round(time.monotonic() - started, 1)
        folder.write_json(output / DEMO_FILE, report)
    return report


def _finetune_settings(settings: DemoSettings, model: str, output: Path) -> FinetuneSettings:
    """The recipe's defaults, with rows as short as the task's examples."""
    return FinetuneSettings(
        model=model,
        data=str(output / TRAIN_FILE),
        output=str(output / RUN_FOLDER),
        # Small steps: with one row each, a few minutes still hold some hundred optimizer steps.
        gradient_accumulation=1,
        max_length=ROW_TOKENS,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )


def _answers(
    model: Any, tokenizer: Any, task: DateTask, progress: Progress, when: str
) -> list[str]:
    from qlora_rs.recipes.generate import generate_answers

    def show(done: int, total: int) -> None:
        progress.line(f"Scoring {when}  {done}/{total} held-out dates", last=done == total)

    prompts = [date.prompt for date in task.held_out]
    return generate_answers(model, tokenizer, prompts, ANSWER_TOKENS, progress=show)


def _reload(model_path: Path, output: Path) -> list[str]:
    """Answer the held-out dates by ``qlora-rs generate`` in a process of its own."""
    adapter = output / RUN_FOLDER / folder.ADAPTER_FOLDER
    command = [sys.executable, "-m", "qlora_rs", "generate", "--quiet", "--json"]
    command += ["--model", str(model_path), "--adapter", str(adapter)]
    command += ["--data", str(output / HELD_OUT_FILE), "--max-new-tokens", str(ANSWER_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().split("\n")[-1]
        raise QloraError(f"the adapter could not be reloaded in a fresh process: {reason}")
    return [json.loads(line)["answer"] for line in done.stdout.splitlines()]


def _score(answers: list[str], task: DateTask) -> dict[str, Any]:
    right = scores.exact_match(answers, [date.answer for date in task.held_out])
    low, high = scores.wilson_interval(right, len(answers))
    return {
        "right": right,
        "total": len(answers),
        "share": round(right / len(answers), 4),
        "interval_95": [round(low, 4), round(high, 4)],
    }


def _by_language(answers: list[str], held_out: tuple[WrittenDate, ...]) -> dict[str, str]:
    counts: dict[str, list[bool]] = {}
    for answer, date in zip(answers, held_out, strict=True):
        counts.setdefault(date.language, []).append(answer == date.answer)
    return {name: f"{sum(hits)}/{len(hits)}" for name, hits in sorted(counts.items())}


def _report(
    settings: DemoSettings,
    task: DateTask,
    result: FinetuneResult,
    answers: tuple[list[str], list[str], list[str]],
    memory: dict[str, Any] | None,
) -> dict[str, Any]:
    before, after, reloaded = answers
    shown = list(zip(task.held_out, before, after, strict=True))[:SHOWN]
    return {
        "format": DEMO.format,
        "task": f"a date written in one of {len(calendar_dates.LANGUAGES)} languages -> YYYY-MM-DD",
        "data": calendar_dates.NOTICE,
        "score_before": _score(before, task),
        "score_after": _score(after, task),
        "score_reloaded_in_fresh_process": _score(reloaded, task),
        "base_rate_copy_numbers_commonest_month": round(calendar_dates.copy_numbers_score(task), 4),
        "answer_of_nearest_training_text": round(calendar_dates.nearest_text_score(task), 4),
        "held_out_months_seen_in_training": round(calendar_dates.months_seen(task), 4),
        "by_language_after": _by_language(after, task.held_out),
        "samples": [
            {"text": d.text, "expected": d.answer, "before": b, "after": a} for d, b, a in shown
        ],
        "memory": memory,
        "finetune": result.summary,
        "loss_curve": str(Path(settings.output) / RUN_FOLDER / folder.LOSS_FILE),
    }


def demo_text(report: dict[str, Any]) -> str:
    """Lay the report out for a person."""
    run = report["finetune"]
    rows = [
        ("task", report["task"]),
        ("score before", _share(report["score_before"])),
        ("score after", _share(report["score_after"])),
        (
            "reloaded",
            f"{report['score_reloaded_in_fresh_process']['share']:.1%}  "
            "(adapter from disk in a fresh process: the same answers, every one)",
        ),
        ("base rate", f"{report['base_rate_copy_numbers_commonest_month']:.1%}  "
                      "(copy the numbers, say the commonest month)"),
        ("nearest training text", f"{report['answer_of_nearest_training_text']:.1%}  "
                                  "(repeat its answer)"),
        ("trained on", f"{run['examples']:,} examples, {run['tokens']:,} tokens, "
                       f"{run['steps']:,} steps, {duration(run['train_seconds'])}, "
                       f"{run['tokens_per_second']:.0f} tokens/s"),
        ("loss", f"{run['first_loss']:.3f} -> {run['last_loss']:.3f}; curve in "
                 f"{report['loss_curve']}"),
        *_memory_rows(report),
        ("adapter (peft layout)", run["adapter"]),
        ("whole demonstration", duration(report["seconds"])),
    ]  # fmt: skip
    return "\n\n".join([_samples_text(report["samples"]), table(rows, "Result"), report["data"]])


def _share(score: dict[str, Any]) -> str:
    low, high = score["interval_95"]
    return (
        f"{score['share']:.1%}  ({score['right']} of {score['total']} held-out dates exactly "
        f"right; 95 % interval {low:.1%} to {high:.1%})"
    )


def _memory_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    run, memory = report["finetune"], report["memory"]
    rows = [("peak memory", f"{size(run['peak_rss_bytes'])} resident, the whole process")]
    if memory is not None:
        ours, peer = memory["nf4"], memory["float"]
        rows.append(
            (
                "base weights",
                f"{size(ours['weight_bytes'])} in NF4, {size(peer['weight_bytes'])} in "
                f"{run['dtype']}",
            )
        )
        rows.append(
            (
                f"a {ROW_TOKENS}-token LoRA step",
                f"{size(ours['step_bytes'])} peak in NF4, {size(peer['step_bytes'])} with the "
                f"{run['dtype']} model (peft), each in a fresh process",
            )
        )
    return rows


def _samples_text(samples: list[dict[str, str]]) -> str:
    columns = [
        ("written", [s["text"] for s in samples]),
        ("before", [" ".join(s["before"].split()) for s in samples]),
        ("after", [s["after"] for s in samples]),
        ("expected", [s["expected"] for s in samples]),
    ]
    widths = [min(34, max(len(head), *(len(cell) for cell in cells))) for head, cells in columns]
    lines = ["  ".join(f"{h:<{w}}" for (h, _), w in zip(columns, widths, strict=True)).rstrip()]
    for place in range(len(samples)):
        cells = (c[place] if len(c[place]) <= w else c[place][: w - 1] + "…"
                 for (_, c), w in zip(columns, widths, strict=True))  # fmt: skip
        padded = (f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
