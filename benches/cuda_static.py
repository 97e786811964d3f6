"""What the assembler says about the CUDA kernels, for each architecture; no GPU is needed.

    python -m benches.cuda_static            # the table, and what changed against the record
    python -m benches.cuda_static --record   # write benches/record/cuda-static/

Registers, spills and shared memory are ptxas'; the main loop is read from NVRTC's machine code by
nvdisasm. Nothing here is a time. `tests/test_cuda_static.py` compares the record with a fresh
compile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benches.measure import Table, newest_record
from qlora_rs import kernels, nvrtc
from qlora_rs.kernels import Launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FOLDER, NAME = "cuda-static", "cuda_static"
LAYER = 4096 * 4096
# Warps and shared memory (KiB) that fit on a multiprocessor, by architecture; each has 65,536
# registers, and the system keeps 1 KiB of shared memory per CTA (CUDA C++ Programming Guide,
# technical specifications per compute capability).
LIMITS = {
    80: (64, 164),
    86: (48, 100),
    89: (48, 100),
    90: (64, 228),
    100: (64, 228),
    120: (48, 100),
}
REGISTERS = 65536
# The main loop's instructions: opcodes as nvdisasm writes them, without their suffixes.
CLASSES = {
    "ldg": ("LDG",),
    "stg": ("STG",),
    "lds": ("LDS", "LDSM"),
    "sts": ("STS",),
    "shfl": ("SHFL",),
    "float": ("FMUL", "FFMA", "FADD", "FSETP", "FSEL", "FMNMX", "MUFU"),
    "convert": ("F2FP", "F2F", "HADD2", "I2F", "F2I"),
    "hmma": ("HMMA",),
}
COLUMNS = (
    "kernel", "sm", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "warps_of",
    "loop", *CLASSES, "other", "local",
)  # fmt: skip


class Variant(NamedTuple):
    """A kernel as it is launched for a layer of 4096 x 4096, and its name in the table."""

    name: str
    launch: Launch


def variants() -> list[Variant]:
    """The kernels for blocks of 64 with double quantization, and that of the largest block."""
    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    return [
        *(
            Variant(f"{make.__name__} {name}", make(LAYER, dtype, 64, True))
            for make in (kernels.quantize_nf4, kernels.dequantize_nf4)
            for name, dtype in dtypes.items()
        ),
        *(
            Variant(
                f"few_rows_nf4 bf16 {rows}",
                kernels.few_rows_nf4(rows, 4096, torch.bfloat16, 64, True),
            )
            for rows in kernels.FEW_ROWS_TILES
        ),
        *(
            Variant(
                f"tensor_cores_nf4 bf16 {rows}",
                kernels.tensor_cores_nf4(rows, 4096, torch.bfloat16, 64, True),
            )
            for rows in kernels.TENSOR_CORES_TILES
        ),
        # The block that a thread holds most of: 128 weights.
        Variant("quantize_nf4 f32 4096", kernels.quantize_nf4(LAYER, torch.float32, 4096, True)),
        Variant("double_quantize", kernels.double_quantize(LAYER // 64)),
    ]


def tool(name: str) -> str:
    """The path of a program that the wheels nvidia-cuda-nvcc and nvidia-cuda-nvdisasm install."""
    for entry in sys.path:
        for path in sorted(Path(entry).glob(f"nvidia/*/bin/{name}")):
            return str(path)
    raise SystemExit(f"{name} is not installed: pip install -r requirements-dev.txt brings it")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} fails:\n{done.stderr}")
    return done.stdout + done.stderr


def resources(compiled: nvrtc.Compiled, architecture: int) -> dict[str, int]:
    """What `ptxas --verbose` says about a kernel's PTX."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.ptx)
        switches = ("--verbose", f"--gpu-name=sm_{architecture}", "--output-file=/dev/null")
        said = _run(tool("ptxas"), *switches, str(ptx))

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "shared_bytes": number(r"(\d+) bytes smem"),
    }


def warps(architecture: int, registers: int, shared_bytes: int, threads: int) -> int:
    """Warps on a full multiprocessor; registers are handed out to a warp 256 at a time."""
    most, shared = LIMITS[architecture]
    per_cta = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // per_cta
    by_shared = shared * 1024 // (shared_bytes + 1024)
    return per_cta * min(most // per_cta, by_registers, by_shared)


def instructions(cubin: bytes) -> list[str]:
    """Labels and instructions of machine code, one a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = _run(tool("nvdisasm"), "--print-code", str(path))
    lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in listing.splitlines())
    return [line for line in lines if line.startswith(".L_") or line.endswith(";")]


def opcode(line: str) -> str:
    """LDG.E.128 of `@P0 LDG.E.128 R4, [R2.64] ;`; empty for a label."""
    found = re.match(r"(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.sub(r"\s+", " ", line))
    return found[1] if found else ""


def main_loop(lines: list[str]) -> list[str]:
    """The loop with the most 128-bit accesses to global memory, or all lines if there is none.

    A loop is what lies between a label and a branch back to it, both sides of every branch in it.
    Loops around others with such accesses do not count: code that the assembler moved to the end
    also branches back.
    """
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    wide = re.compile(r"(LDG|STG)\S*\.128")
    loops = []
    for end, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if found and labels.get(found[1], end) < end:
            start = labels[found[1]]
            accesses = sum(bool(wide.search(line)) for line in lines[start : end + 1])
            loops.append((accesses, start, end + 1))
    loops = [loop for loop in loops if loop[0]]
    innermost = [
        (accesses, start, end)
        for accesses, start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for _, s, e in loops)
    ]
    _, start, end = max(innermost, default=(0, 0, len(lines)))
    return lines[start:end]


def facts(variant: Variant, architecture: int) -> dict[str, str]:
    """One row of the table."""
    launch = variant.launch
    compiled = kernels.compile_kernel(launch.kernel, launch.constants, architecture)
    found = resources(compiled, architecture)
    lines = instructions(compiled.cubin)
    full = warps(architecture, found["registers"], found["shared_bytes"], launch.block)
    names = [name.split(".")[0] for name in map(opcode, main_loop(lines)) if name]
    counts = {key: sum(n in opcodes for n in names) for key, opcodes in CLASSES.items()}
    every = [opcode(line).split(".")[0] for line in lines]
    return {
        "kernel": variant.name,
        "sm": str(architecture),
        **{key: str(value) for key, value in found.items()},
        "warps_of": f"{full}/{LIMITS[architecture][0]}",
        "loop": str(len(names)),
        **{key: str(value) for key, value in counts.items()},
        "other": str(len(names) - sum(counts.values())),
        "local": str(sum(name in ("LDL", "STL") for name in every)),
    }


def rows() -> list[dict[str, str]]:
    """The whole table."""
    return [facts(variant, a) for variant in variants() for a in ARCHITECTURES]


def about() -> str:
    """The compilers, which decide everything here."""
    assembler = re.search(r"V[\d.]+", _run(tool("ptxas"), "--version"))
    major, minor = nvrtc.version()
    return f"NVRTC {major}.{minor}, ptxas {assembler[0] if assembler else 'unknown'}"


def main() -> None:
    parser = argparse.ArgumentParser(description="registers, spills and main loops of cuda/")
    parser.add_argument("--record", action="store_true", help="write benches/record/")
    options = parser.parse_args()
    recorded = newest_record(FOLDER, NAME)
    table = Table(NAME, COLUMNS, about(), FOLDER)
    fresh = rows()
    for row in fresh:
        table.row(*(row[column] for column in COLUMNS))
    before = recorded[1] if recorded else []
    table.say("")
    table.say(
        "warps_of: warps that fit on a multiprocessor at once / the most it holds. loop and the "
        "columns after it: instructions of the main loop, by class; local: spilled accesses"
    )
    table.say(
        f"{sum(row not in before for row in fresh)} of {len(fresh)} rows differ from the record"
    )
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
