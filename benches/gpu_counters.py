"""What the hardware's counters say of our kernels, beside what the emulator counts.

    python -m benches.gpu_counters --record

Nsight Compute (`ncu`, with the rights to read counters) profiles one launch of each kernel; the
emulator runs the same launch from the same PTX. Sectors should agree, but for atomics, which count
among the emulator's alone. Its instructions are those of PTX, the hardware's those that ptxas made
of them; its wavefronts leave out what the hardware needs beyond bank conflicts.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys

import torch

import qlora_rs
from benches.cuda_profile import DTYPES, KERNELS, TOKENS, emulate, needed_bytes
from benches.gpu_measure import gpu_machine, gpu_slug
from benches.measure import Table
from qlora_rs import NF4Linear, kernels

SECTORS = tuple(f"l1tex__t_sectors_pipe_lsu_mem_global_op_{op}.sum" for op in ("ld", "st"))
WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"
INSTRUCTIONS = "smsp__inst_executed.sum"
DRAM = ("dram__bytes_read.sum", "dram__bytes_write.sum")
TIME = "gpu__time_duration.sum"
# Which shared accesses take more wavefronts than they need.
CONFLICTS = tuple(
    f"l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_{op}.sum" for op in ("ld", "st", "atom")
)
METRICS = (*SECTORS, WAVEFRONTS, *CONFLICTS, INSTRUCTIONS, *DRAM, TIME)


def kernels_of(dtype: str) -> list[str]:
    """Those that take weights or activations of this type."""
    return [name for name in KERNELS if dtype != "float32" or name != "tensor_cores_nf4"]


def run(size: int, dtype: torch.dtype) -> None:
    """What ncu watches."""
    packed = qlora_rs.quantize(torch.randn(size, size, device="cuda").to(dtype))
    packed.dequantize(dtype)
    for tokens in TOKENS.values():
        NF4Linear(packed)(torch.randn(tokens, size, device="cuda").to(dtype))
    torch.cuda.synchronize()


def measured(size: int, dtype: str) -> dict[str, dict[str, float]]:
    """Metrics of the first launch of each kernel."""
    command = [
        "ncu", "--csv", "--clock-control", "none", "--print-units", "base",
        "--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--metrics", ",".join(METRICS),
        sys.executable, "-m", "benches.gpu_counters", "--run", "--size", str(size),
        "--dtype", dtype,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name = re.match(r"\w+", row["Kernel Name"])[0]
        number = float(row["Metric Value"].replace(",", ""))
        found.setdefault(name, {}).setdefault(row["Metric Name"], number)
    if set(found) != set(kernels_of(dtype)):
        raise SystemExit(f"ncu profiled {sorted(found)} only:\n{done.stdout}{done.stderr}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="hardware counters beside the emulator's")
    parser.add_argument("--record", action="store_true", help="write benches/record/")
    parser.add_argument("--run", action="store_true", help="only run the kernels, for ncu")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    if options.run:
        run(options.size, dtype)
        return
    if not shutil.which("ncu"):
        parser.error("ncu is not on the PATH; it comes with NVIDIA's Nsight Compute")
    hardware = measured(options.size, options.dtype)
    architecture, _ = kernels.target(torch.cuda.get_device_capability(), (80, 90, 100, 120))
    weight = torch.randn(options.size, options.size).to(dtype)
    table = Table(
        "gpu-counters",
        (
            "kernel", "sectors", "emulated sectors", "wavefronts", "emulated wavefronts",
            "conflicts ld/st/atom", "warp instr.", "of PTX",
            "DRAM MB", "needed MB", "us", "GB/s needed",
        ),
        about=gpu_machine(),
        folder=gpu_slug(),
    )  # fmt: skip
    for kernel in kernels_of(options.dtype):
        real, count = hardware[kernel], emulate(kernel, weight, architecture=architecture)
        needed = sum(needed_bytes(kernel, weight).values())
        table.row(
            kernel, f"{sum(real[name] for name in SECTORS):.0f}", str(count["global_sectors"]),
            f"{real[WAVEFRONTS]:.0f}", str(count["shared_wavefronts"]),
            "/".join(f"{real.get(name, float('nan')):.0f}" for name in CONFLICTS),
            f"{real[INSTRUCTIONS]:.0f}", str(count["warp_instructions"]),
            sum(real[name] for name in DRAM) / 1e6, needed / 1e6, real[TIME] / 1e3,
            f"{needed / real[TIME]:.0f}",
        )  # fmt: skip
    table.say("")
    table.say(
        f"{options.size} x {options.size} of {options.dtype}, caches cleared before each launch, "
        "few_rows_nf4 with 1 row of x, tensor_cores_nf4 (of 16 bits alone) with 32; sectors of 32 "
        "bytes between L1 and L2; "
        "what stays in L2 at the end is not in DRAM MB"
    )
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
