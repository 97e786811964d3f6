"""Where decoding in registers stops being the faster way: `python -m benches.tune`.

A product of few rows decodes weights in registers, one of many rows in blocks (README, "Reading
the code"). `tune.rs` times both on every CPU path, for 1 to 192 rows, on layers of a large and of a
small model. From that follows one crossover per path and dtype: the number of rows up to which
decoding in registers wins most in sum, counted in logarithms of the ratio, so that both layers and
all numbers of rows have the same say and a near tie has little.

    python -m benches.tune             # the times and the crossovers they ask for
    python -m benches.tune --record    # the same, written down
    python -m benches.tune --write     # and put into rust/simd/crossover.rs; build again after it

The machine must be otherwise idle: a thread that waits for a core stalls its whole team.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from benches import cargo
from benches.measure import Table, arguments, busy_share
from qlora_rs import _rust

CROSSOVERS = cargo.ROOT / "rust" / "simd" / "crossover.rs"
DTYPES = ("float32", "bfloat16")
# Crossovers are not written from times that others disturbed.
MOST_BUSY = 0.1

# Ratios by number of rows (time in blocks / time in registers), one per layer.
Ratios = dict[int, list[float]]


def team_of_torch() -> dict[str, str]:
    """An environment in which a program's threads are OpenMP's, as the extension's beside torch."""
    maps = Path("/proc/self/maps")
    libraries = re.findall(r"/\S*libgomp\S*", maps.read_text()) if maps.exists() else []
    return {**os.environ, **({"LD_PRELOAD": libraries[0]} if libraries else {})}


def measured(program: Path, threads: int, seconds: float, paths: list[str]) -> Iterator[list[str]]:
    """The lines of `tune.rs` as they come: path, dtype, size, rows, two times in milliseconds."""
    command = [str(program), str(threads), str(seconds), *paths]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=team_of_torch()
    ) as running:
        assert running.stdout is not None
        next(running.stdout)  # the header
        for line in running.stdout:
            yield line.strip().split(",")
    if running.returncode:
        raise SystemExit("tune.rs stopped; what it says stands above")


def crossover(ratios: Ratios) -> int:
    """Up to how many rows decoding in registers should be used, 0 for never."""
    best, gain, most = 0, 0.0, 0.0
    for rows, by_layer in sorted(ratios.items()):
        gain += sum(map(math.log, by_layer))
        if gain > most:
            best, most = rows, gain
    return best


def rewrite(text: str, path: str, found: list[int], record: str) -> str:
    """The text of crossover.rs with one path's constant replaced."""
    pattern = rf"///[^\n]*\n(pub\(super\) const {path.upper()}: \[usize; 2\] = )\[[^\]]*\];"
    changed, count = re.subn(pattern, rf"/// {record}\n\g<1>{found};", text)
    if count != 1:
        raise SystemExit(f"{CROSSOVERS.name} has no constant for {path}")
    return changed


def main() -> None:
    parser = arguments("crossovers between the two ways to compute a product")
    parser.set_defaults(seconds=0.5)
    parser.add_argument("--write", action="store_true", help=f"record, and write {CROSSOVERS.name}")
    parser.add_argument("--paths", nargs="+", choices=_rust.cpu_paths(), default=_rust.cpu_paths())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = cargo.build("tune")
    busy = busy_share()
    if options.write and busy > MOST_BUSY:
        raise SystemExit(f"other processes use {busy:.0%} of this machine: tune when it is idle")
    columns = ("path", "dtype", "size", "rows", "registers ms", "blocks ms", "blocks/registers")
    table = Table("tune", columns)
    ratios: dict[tuple[str, str], Ratios] = defaultdict(lambda: defaultdict(list))
    for line in measured(program, options.threads, options.seconds, options.paths):
        path, dtype, size, rows, registers, blocks = line
        ratio = float(blocks) / float(registers)
        ratios[path, dtype][int(rows)].append(ratio)
        table.row(path, dtype, size, rows, float(registers), float(blocks), f"{ratio:.2f}x")
    table.say("")
    text = CROSSOVERS.read_text()
    for path in options.paths:
        found = [crossover(ratios[path, dtype]) for dtype in DTYPES]
        limits = ", ".join(f"{rows} rows of {d}" for rows, d in zip(found, DTYPES, strict=True))
        table.say(f"{path}: decode in registers up to {limits}")
        text = rewrite(text, path, found, f"{table.shown_stem}.txt")
    if options.record or options.write:
        table.record()
    if options.write:
        CROSSOVERS.write_text(text)
        print(f"written to {CROSSOVERS.relative_to(cargo.ROOT)}: build the extension again")


if __name__ == "__main__":
    main()
