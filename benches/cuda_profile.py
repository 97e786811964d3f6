"""What a profiler would count in one launch of a CUDA kernel, on a machine without a GPU.

    python -m benches.cuda_profile dequantize_nf4
    python -m benches.cuda_profile quantize_nf4 --dtype float32 --rows 4096 --columns 4096

The PTX that NVRTC emits is executed by tests/ptx_emulator, which also refuses races, accesses out
of bounds and the like. It counts by class, by buffer and by line of the CUDA source; nothing of it
is a time. Bytes are compared with those of each weight, code and statistic moved once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import qlora_rs
from qlora_rs import cpu, gpu, nvrtc

TESTS = Path(__file__).parent.parent / "tests"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def needed_bytes(kernel: str, count: int, dtype: torch.dtype, block_size: int) -> int:
    """Bytes that a kernel must read and write, with double quantization."""
    blocks = -(-count // block_size)
    nested = blocks + -(-blocks // 256) * 4 + 4
    dense = count * dtype.itemsize
    return {
        "quantize_nf4": dense + count // 2 + blocks * 4,
        "double_quantize": blocks * 4 + nested,
        "dequantize_nf4": count // 2 + nested + 1024 + dense,
    }[kernel]


def main() -> None:
    parser = argparse.ArgumentParser(description="counts of one launch, by executing its PTX")
    parser.add_argument("kernel", choices=("quantize_nf4", "double_quantize", "dequantize_nf4"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--schedule", default="ascending", help="descending, ahead, random:SEED")
    parser.add_argument("--architecture", type=int, default=80)
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from emulated_gpu import EmulatedGPU

    dtype = DTYPES[options.dtype]
    weight = torch.randn(options.rows, options.columns).to(dtype)
    device = EmulatedGPU(options.schedule, options.architecture)
    if options.kernel == "dequantize_nf4":
        packed = qlora_rs.quantize(weight, options.block_size)
        gpu.dequantize(cpu.Packed(*packed.arguments()), dtype, device)
    else:
        gpu.quantize(weight, options.block_size, True, device)
    result = device.results[options.kernel == "double_quantize"]
    needed = needed_bytes(options.kernel, weight.numel(), dtype, options.block_size)
    counters = result.counters
    moved = counters["global_bytes_read"] + counters["global_bytes_written"]
    print(
        f"{options.dtype}, {options.rows} x {options.columns}, blocks of {options.block_size}, "
        f"sm_{options.architecture}, NVRTC {'.'.join(map(str, nvrtc.version()))}, "
        f"{options.schedule}\n"
        f"bytes moved {moved:,}, needed {needed:,}: {moved / needed:.4f} times\n"
        f"thread instructions per weight {counters['thread_instructions'] / weight.numel():.2f}\n"
    )
    print(result.table)


if __name__ == "__main__":
    main()
