"""What happens beside the training loop at each step: progress line, log file, stopping.

Called by transformers' Trainer; the loop itself is not ours. Read next: ``finetune.py``.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback

from qlora_rs.errors import QloraError
from qlora_rs.recipes.output_folder import write_text
from qlora_rs.recipes.progress import Progress, StopRequest, duration

_LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm")


class RunCallback(TrainerCallback):
    """Draws the progress line, writes log.jsonl, stops on request and on a broken loss.

    session_seconds, session_tokens: what this process has trained, for the speed it reports.
    """

    def __init__(self, log_file: Path, progress: Progress, stop: StopRequest) -> None:
        self.log_file = log_file
        self.progress = progress
        self.stop = stop
        self.session_seconds = 0.0
        self.session_tokens = 0
        self.earlier_seconds = 0.0
        self._log: TextIO | None = None
        self._started: float | None = None
        self._first_step = self._first_tokens = 0
        self._loss = math.nan
        self._substeps = 0

    def open_log(self, step: int) -> None:
        """Open the log, cut back to the step the run resumes from (-1: a new run)."""
        self.earlier_seconds = _cut_log(self.log_file, step)
        self._log = self.log_file.open("a", encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock that speed and time left are measured by."""
        self._started = time.monotonic()
        self._first_step, self._first_tokens = state.global_step, state.num_input_tokens_seen

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the line also between optimizer steps, which may be minutes apart."""
        self._substeps += 1
        self._draw(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training when the user wants to stop."""
        self._substeps = 0
        self._stop_if_asked(state, control)

    def _stop_if_asked(self, state: Any, control: Any) -> None:
        if self.stop and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append to log.jsonl, show the step; refuse to go on with a loss that is not a number.

        Runs after each step, before its checkpoint is written, so a broken state is never saved.
        """
        logs = logs or {}
        entry: dict[str, Any] = {"step": state.global_step}
        entry.update({name: float(logs[name]) for name in _LOGGED if name in logs})
        if "loss" not in entry and "eval_loss" not in entry:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(entry.get(name, 0.0)):
                raise QloraError(
                    f"the {name.replace('_', ' ')} became {entry[name]} at step "
                    f"{state.global_step}; lower --learning-rate (it is {args.learning_rate:g}) or "
                    "use --dtype float32, and start again or --resume from the last checkpoint"
                )
        if "loss" in entry:
            self._loss = entry["loss"]
            entry["tokens"] = int(state.num_input_tokens_seen)
        entry["seconds"] = round(self.earlier_seconds + self._measure(state), 3)
        if self._log is not None:
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()
        if "loss" in entry:
            self._draw(args, state, last=state.global_step >= state.max_steps)
            # The checkpoint is still to come: a signal since the end of the step stops here, too.
            self._stop_if_asked(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._measure(state)
        self._started = None

    def close(self) -> None:
        """Close the log file; safe to call twice."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _measure(self, state: Any) -> float:
        if self._started is None:
            return self.session_seconds
        self.session_seconds = time.monotonic() - self._started
        self.session_tokens = int(state.num_input_tokens_seen) - self._first_tokens
        return self.session_seconds

    def _draw(self, args: Any, state: Any, last: bool = False) -> None:
        seconds = self._measure(state)
        done = state.global_step - self._first_step
        done_exactly = done + self._substeps / max(1, args.gradient_accumulation_steps)
        left = state.max_steps - self._first_step - done_exactly
        remaining = seconds / done_exactly * left if done_exactly else math.nan
        loss = "" if math.isnan(self._loss) else f"  loss {self._loss:.3f}"
        # A step that is still accumulating has tokens the state does not count yet.
        speed = f"  {self.session_tokens / seconds:.0f} tokens/s" if done and seconds else ""
        time_left = "" if math.isnan(remaining) else f"  {duration(remaining)} left"
        share = 100 * state.global_step / max(1, state.max_steps)
        self.progress.line(
            f"step {state.global_step}/{state.max_steps}  {share:.0f}%{loss}{speed}"
            f"  {duration(seconds)} elapsed{time_left}",
            last=last,
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read log.jsonl up to its first torn line (a killed process leaves at most one, the last)."""
    entries: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                break
            entries.append(entry)
    return entries


def _cut_log(path: Path, step: int) -> float:
    """Drop the entries after ``step``, which will be written again; return the seconds so far."""
    kept = [entry for entry in read_log(path) if entry["step"] <= step]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return float(kept[-1].get("seconds", 0.0)) if kept else 0.0
