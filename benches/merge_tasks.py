"""The adapters that `python -m benches.merge` merges: how they are trained, and on what text.

manual: Vim's help files (Debian's vim-runtime), prose and code; whole files are held out.
dates: the demonstration's task, dates of 24 languages -> YYYY-MM-DD. Whole days are held out.
Both are trained by `qlora-rs finetune`; they differ in task, rank, layers and length.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

HELP = Path("/usr/share/vim/vim90/doc")
HELD_OUT_FILES = ("usr_08", "usr_25", "fold", "quickfix", "undo", "pi_netrw")
# Tables of tags, the list of things to do, and change logs are no prose.
LEFT_OUT = ("todo", "index", "quickref", "version4", "version5", "version6", "version7", "version8")
PIECE, HEAD = 1100, 200  # characters
TRAIN_PIECES, HELD_OUT_PIECES = 420, 80


@dataclass(frozen=True)
class Task:
    """One adapter: its name, and the options that `finetune` gets."""

    name: str
    options: dict[str, str]


TASKS = (
    Task(
        "manual",
        {"--r": "16", "--alpha": "32", "--learning-rate": "5e-4", "--max-steps": "200"}
        | {"--max-length": "512", "--gradient-accumulation": "1"},
    ),
    Task(
        "dates",
        {"--r": "8", "--alpha": "16", "--learning-rate": "1e-3", "--max-steps": "150"}
        | {"--max-length": "256", "--gradient-accumulation": "1"},
    ),
)


def write_task(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held-out.jsonl` of a task; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.jsonl", folder / "held-out.jsonl"
    if name == "manual":
        _write(train, _manual(held_out=False))
        _write(held_out, _manual(held_out=True))
    else:
        from qlora_rs.recipes.calendar_dates import make_task
        from qlora_rs.recipes.data import write_examples

        task = make_task(1400, 300, seed=0)
        write_examples(train, (date.example() for date in task.train))
        write_examples(held_out, (date.example() for date in task.held_out))
    return train, held_out


def _manual(held_out: bool) -> list[dict[str, str]]:
    """Pieces of the help files: the head of a piece is the prompt, the rest is to be written."""
    lines = []
    for file in sorted(HELP.glob("*.txt")):
        if file.stem in LEFT_OUT or (file.stem in HELD_OUT_FILES) != held_out:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text) - PIECE, PIECE):
            piece = text[start : start + PIECE]
            prompt = f"Continue this page of {file.name}:\n{piece[:HEAD]}"
            lines.append({"prompt": prompt, "completion": piece[HEAD:]})
    random.Random(0).shuffle(lines)
    return lines[: HELD_OUT_PIECES if held_out else TRAIN_PIECES]


def _write(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
