"""Fair timing of contenders side by side, and the record of what was measured where."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import bitsandbytes
import peft
import torch

import qlora_rs
from qlora_rs import _rust

RECORD = Path(__file__).parent / "record"

# Variables that keep the libraries below torch from instructions that the CPU has.
PEER_LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


def interleave(
    contenders: dict[str, Callable[[], object]], seconds: float = 2.0, sample: float = 0.005
) -> dict[str, float]:
    """Median seconds per call of each contender, measured in turns.

    Each turn times every contender once, so that whatever else the machine does falls on all of
    them. Calls shorter than `sample` are repeated within a turn until they fill it. `seconds` is
    the time for all turns together; there are at least five.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(sample / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(measured) for name, measured in times.items()}


def cpu_model() -> str:
    """As the system names it."""
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def busy_share(seconds: float = 0.5) -> float:
    """Which part of the CPU time others use, measured while this process sleeps."""

    def times() -> tuple[int, int]:
        """All ticks since the start, and the idle ones (fields of proc(5), `/proc/stat`)."""
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return sum(ticks[:8]), ticks[3] + ticks[4]

    if not Path("/proc/stat").exists():
        return float("nan")
    before = times()
    time.sleep(seconds)
    total, idle = (now - then for now, then in zip(times(), before, strict=True))
    return 1 - idle / max(total, 1)


def peer_limits() -> list[str]:
    """What this process forbids torch: NAME=VALUE of each variable that is set."""
    return [f"{name}={os.environ[name]}" for name in PEER_LIMITS if os.environ.get(name)]


def cpu_slug() -> str:
    """The folder of this machine's records: its CPU, our path, and what torch was kept from."""
    features = [cpu_model(), _rust.cpu_path(), f"{os.cpu_count()} cores", *peer_limits()]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(features).lower()).strip("-")


def machine() -> str:
    """What ran, on what, what was forced, and how busy the machine was."""
    forced = "forced" if os.environ.get("QLORA_RS_CPU") else "chosen"
    limits = " ".join(peer_limits()) or "any instruction of this CPU"
    versions = (
        f"qlora_rs {qlora_rs.__version__}, torch {torch.__version__}, bitsandbytes "
        f"{bitsandbytes.__version__}, peft {peft.__version__}, Python {platform.python_version()}"
    )
    return (
        f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{busy_share():.0%} busy before | path {_rust.cpu_path()} ({forced}), "
        f"torch may use: {limits} | {versions}"
    )


class Table:
    """Rows of figures, printed as they come and written down with --record.

    about: the line that says what ran; this machine's by default. folder: where records go below
    record/; this machine's by default.
    """

    def __init__(
        self,
        name: str,
        columns: Iterable[str],
        about: str | None = None,
        folder: str | None = None,
    ) -> None:
        self.name, self.columns = name, list(columns)
        # Where its record goes, without the endings.
        self.stem = RECORD / (folder or cpu_slug()) / f"{datetime.date.today()}-{name}"
        self.rows: list[list[str]] = []
        self.lines = [f"benches.{name}  {datetime.date.today()}", about or machine(), ""]
        print("\n".join(self.lines))
        self._print(self.columns)

    def _print(self, cells: list[str]) -> None:
        line = "  ".join(
            cell.ljust(max(len(column), 12)) if i == 0 else cell.rjust(max(len(column), 9))
            for i, (cell, column) in enumerate(zip(cells, self.columns, strict=True))
        )
        self.lines.append(line)
        print(line, flush=True)

    def row(self, *cells: str | float) -> None:
        """Add a row; floats are shown with three significant digits."""
        self.rows.append([cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells])
        self._print(self.rows[-1])

    def say(self, text: str) -> None:
        """Add a line below the table."""
        self.lines.append(text)
        print(text, flush=True)

    def record(self) -> None:
        """Write the table to record/<folder>/<date>-<name>.{csv,txt}."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem.with_suffix(".txt").write_text("\n".join(self.lines) + "\n")
        with self.stem.with_suffix(".csv").open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *self.rows])
        print(f"recorded in {self.shown_stem}.txt and .csv")

    @property
    def shown_stem(self) -> str:
        """The record's name from the repository's root, without its ending."""
        return str(self.stem.relative_to(RECORD.parent.parent))


def newest_record(folder: str, name: str) -> tuple[Path, list[dict[str, str]]] | None:
    """The latest table recorded under this name: its file and its rows."""
    files = sorted((RECORD / folder).glob(f"????-??-??-{name}.csv"))
    if not files:
        return None
    with files[-1].open(newline="") as file:
        return files[-1], list(csv.DictReader(file))


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benches share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--record", action="store_true", help="write benches/record/")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser
