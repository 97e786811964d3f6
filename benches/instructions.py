"""Instructions that each operation runs, counted: `python -m benches.instructions`.

Times waver with what else a machine does; counts do not, so a loop that got longer shows on any
machine. callgrind (of valgrind) counts what `instructions.rs` runs in one operation on one thread.
It knows AVX2 but not AVX-512, so the AVX2 path is counted. A count says nothing about caches, and
instructions differ in what they cost: a smaller count is not always a shorter time.

    python -m benches.instructions             # the counts, and their change against the record
    python -m benches.instructions --compare   # the same; fails where a count grew by more than 2 %
    python -m benches.instructions --record    # write the record, wanted or explained changes in it
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benches import cargo
from benches.measure import Table, newest_record

# Beyond this a change is one of our code: another compiler's version may shift counts by less.
TOLERANCE = 0.02
# The function in which counting is on.
MEASURED = "*instructions::measured*"
# What names a case: rows are those of the activations, or of the weight that is packed.
CASE = ("operation", "dtype", "rows")


def valgrind(tool: str, *command: str) -> str:
    """What a program prints when it runs under one of valgrind's tools."""
    # An empty environment: its size moves the stack, which would show in the counts.
    done = subprocess.run(
        [shutil.which("valgrind") or "", "--quiet", f"--tool={tool}", *command],
        capture_output=True,
        text=True,
        env={},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[-2:])} fails under valgrind:\n{done.stderr}")
    return done.stdout


def count(program: Path, path: str, case: str) -> int:
    """Instructions of one case."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        switches = ("--collect-atstart=no", f"--toggle-collect={MEASURED}")
        valgrind("callgrind", *switches, f"--callgrind-out-file={out}", str(program), path, case)
        found = re.search(r"^totals: (\d+)$", out.read_text(), re.MULTILINE)
    if found is None or int(found[1]) == 0:
        raise SystemExit(f"callgrind counted nothing in {MEASURED}: was the function renamed?")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="instructions per operation, by callgrind")
    parser.add_argument("--path", choices=("avx2", "portable"), default="avx2")
    parser.add_argument("--record", action="store_true", help="write benches/record/")
    parser.add_argument("--compare", action="store_true", help="fail where a count grew by > 2 %%")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        raise SystemExit(
            "valgrind, which counts the instructions, is not installed: "
            "`apt-get install valgrind` (Debian, Ubuntu) or `dnf install valgrind` (Fedora)"
        )
    program = cargo.build("instructions")
    detected, *cases = valgrind("none", str(program)).splitlines()
    if options.path not in detected.split():
        raise SystemExit(f"under valgrind this CPU runs {detected}, not {options.path}")
    folder, name = f"callgrind-{options.path}", "instructions"
    recorded = newest_record(folder, name)
    if options.compare and recorded is None:
        raise SystemExit("there is no record to compare with: run with --record first")
    file, rows = recorded or (None, [])
    before = {tuple(row[key] for key in CASE): int(row["instructions"]) for row in rows}
    about = (
        f"path {options.path}, forced (detected under valgrind: {detected}), weight [1024, 1024], "
        f"one thread | {valgrind('none', '--version').strip()}, {cargo.compiler()}"
    )
    table = Table(name, (*CASE, "instructions", "record", "change"), about, folder)
    grown = []
    for case in cases:
        now, key = count(program, options.path, case), tuple(case.split(", "))
        change = now / before[key] - 1 if key in before else 0.0
        shown = (str(before[key]), f"{change:+.2%}") if key in before else ("-", "-")
        table.row(*key, str(now), *shown)
        if change > TOLERANCE:
            grown.append(f"{case} grew by {change:.1%}")
    table.say("")
    table.say(f"record: {file.name if file else 'none'}; a count may grow by {TOLERANCE:.0%}")
    for line in grown:
        table.say(line)
    if options.record:
        table.record()
    sys.exit(1 if options.compare and grown else 0)


if __name__ == "__main__":
    main()
