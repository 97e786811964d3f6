"""What a profiler would count in one launch of a CUDA kernel, on a machine without a GPU.

    python -m benches.cuda_profile dequantize_nf4
    python -m benches.cuda_profile quantize_nf4 --dtype float32 --rows 4096 --columns 4096
    python -m benches.cuda_profile tensor_cores_nf4 --tokens 8

The PTX that NVRTC emits is executed by tests/ptx_emulator, which also refuses races, accesses out
of bounds and the like. It counts by class, by buffer and by line of the CUDA source; nothing of it
is a time. Bytes are compared with those of each weight, code and statistic moved once.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

import qlora_rs
from qlora_rs import cpu, gpu, kernels, nvrtc

TESTS = Path(__file__).parent.parent / "tests"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SECTOR = 32
LINES = 20
KERNELS = (
    "quantize_nf4", "double_quantize", "dequantize_nf4", "few_rows_nf4", "tensor_cores_nf4"
)  # fmt: skip
# Rows of x that products are profiled with, if none are asked for.
TOKENS = {"few_rows_nf4": 1, "tensor_cores_nf4": 32}


def needed_bytes(
    kernel: str, weight: torch.Tensor, block_size: int = 64, tokens: int = 0
) -> dict[str, int]:
    """Bytes that a kernel must read and write, by parameter, with double quantization.

    weight: [out, in]; tokens: rows of x, for products; 0: those of TOKENS.
    """
    tokens = tokens or TOKENS.get(kernel, 0)
    (features, columns), dtype, count = weight.shape, weight.dtype, weight.numel()
    blocks = -(-count // block_size)
    nested = {"nested_absmax": -(-blocks // 256) * 4, "nested_offset": 4}
    dense, codes = count * dtype.itemsize, (count + 1) // 2
    packed = {"codes": codes, "absmax": blocks, **nested, "nested_map": 1024}
    vectors = {"x": tokens * columns * dtype.itemsize, "y": tokens * features * dtype.itemsize}
    return {
        "quantize_nf4": {"weights": dense, "codes": codes, "absmax": blocks * 4},
        "double_quantize": {"absmax": blocks * 4, "codes": blocks, **nested},
        "dequantize_nf4": {**packed, "out": dense},
        "few_rows_nf4": {**packed, **vectors},
        "tensor_cores_nf4": {**packed, **vectors},
    }[kernel]


def emulate(
    kernel: str,
    weight: torch.Tensor,
    block_size: int = 64,
    tokens: int = 0,
    schedule: str = "ascending",
    architecture: int = 80,
) -> dict[str, Any]:
    """What the emulator counts in the kernel's launch for this weight; sizes as above."""
    sys.path.insert(0, str(TESTS))
    from emulated_gpu import EmulatedGPU

    device = EmulatedGPU(schedule, architecture)
    if kernel in ("quantize_nf4", "double_quantize"):
        gpu.quantize(weight, block_size, True, device)
        return device.results[kernel == "double_quantize"].counters
    packed = cpu.Packed(*qlora_rs.quantize(weight, block_size).arguments())
    if kernel == "dequantize_nf4":
        gpu.dequantize(packed, weight.dtype, device)
    else:
        tokens = tokens or TOKENS[kernel]
        x = torch.randn(max(tokens, 0), weight.shape[1]).to(weight.dtype)
        launch = gpu._in_registers(x, packed)
        if launch is None or launch.kernel != kernel:
            raise SystemExit(
                f"a product of {tokens} tokens of {weight.dtype} with rows of {weight.shape[1]} "
                f"weights in blocks of {block_size} is not one of {kernel}; few_rows_nf4 takes 1 "
                f"to {gpu.FEW_ROWS} tokens, tensor_cores_nf4 3 to {gpu.TENSOR_CORES_ROWS[1]} of 16 "
                "bits with blocks of 64 or more, before the other, both rows of whole blocks"
            )
        gpu.linear(x, packed, None, device)
    return device.results[0].counters


def parameters(kernel: str) -> list[str]:
    """The names of a kernel's parameters, as its source has them.

    >>> parameters("quantize_nf4")[:3]
    ['weights', 'count', 'codes']
    """
    text, _ = kernels._source(kernel)
    found = re.search(rf"\b{kernel}\((.*?)\n\) \{{", text, re.DOTALL)
    assert found is not None
    return re.findall(r"^ .*?(\w+),? *(?://.*)?$", found[1], re.MULTILINE)


def source_text(kernel: str, place: str) -> str:
    """The line of CUDA that `file.cu:12` names."""
    file, _, number = place.rpartition(":")
    if number == "0":
        return "(code that the compiler assigns to no line)"
    text, headers = kernels._source(kernel)
    lines = {f"{kernel}.cu": text, **headers}.get(file, "").splitlines()
    return lines[int(number) - 1].strip() if 0 < int(number) <= len(lines) else ""


def report(kernel: str, counters: dict[str, Any], needed: dict[str, int], weights: int) -> str:
    """The counts for people."""
    total = counters["warp_instructions"]
    moved = counters["global_bytes_read"] + counters["global_bytes_written"]
    ratio = moved / sum(needed.values())
    text = [
        f"bytes moved {moved:,}, needed {sum(needed.values()):,}: {ratio:.4f} times",
        f"thread instructions per weight {counters['thread_instructions'] / weights:.2f}",
        f"shared wavefronts {counters['shared_wavefronts']:,}, without bank conflicts "
        f"{counters['shared_wavefronts_ideal']:,}",
        f"global sectors {counters['global_sectors']:,}, if every access were coalesced "
        f"{counters['global_sectors_ideal']:,}",
        f"divergent branches {counters['divergent_branches']:,}",
        "",
        f"{'memory':<18}{'bytes needed':>14}{'bytes read':>14}{'written':>14}   (each sector once)",
    ]
    names = parameters(kernel)
    for buffer, count in counters["buffers"].items():
        read, written = count["unique_sectors_read"], count["unique_sectors_written"]
        if read or written:
            index = buffer.removeprefix("argument ")
            name = names[int(index)] if index.isdigit() else buffer
            text.append(
                f"{name:<18}{needed.get(name, 0):>14,}{read * SECTOR:>14,}{written * SECTOR:>14,}"
            )
    text += [
        "Moved beyond the needed bytes: tables and counters, which every CTA reads again.",
        "",
        f"{'class':<18}{'warp instructions':>18}",
    ]
    classes = sorted(counters["classes"].items(), key=lambda item: -item[1])
    text += [f"{name:<18}{count:>18,}{count / total:>8.1%}" for name, count in classes]
    text += [
        "",
        f"{'warp instructions':>17} {'share':>7} {'bytes moved':>12} {'of ideal':>9}  line",
    ]
    sources = sorted(counters["sources"].items(), key=lambda item: -item[1]["warp_instructions"])
    for place, count in sources[:LINES]:
        shared = count["shared_wavefronts"], count["shared_wavefronts_ideal"]
        sectors = count["global_sectors"], count["global_sectors_ideal"]
        have, ideal = (a + b for a, b in zip(shared, sectors, strict=True))
        of_ideal = f"{have / ideal:.2f}" if ideal else ""
        moved = count["global_bytes_read"] + count["global_bytes_written"]
        instructions = count["warp_instructions"]
        text.append(
            f"{instructions:>17,} {instructions / total:>7.1%} {moved or '':>12} {of_ideal:>9}  "
            f"{place.removesuffix(':0')}  {source_text(kernel, place)}"[:160]
        )
    text.append("of ideal: wavefronts and sectors, as a multiple of what no conflict would need")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="counts of one launch, by executing its PTX")
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=0, help="rows of x, for products")
    parser.add_argument("--schedule", default="ascending", help="descending, ahead, random:SEED")
    parser.add_argument("--architecture", type=int, default=80)
    options = parser.parse_args()
    weight = torch.randn(options.rows, options.columns).to(DTYPES[options.dtype])
    sizes = (weight, options.block_size, options.tokens)
    counters = emulate(options.kernel, *sizes, options.schedule, options.architecture)
    print(
        f"{options.kernel}, {options.dtype}, {options.rows} x {options.columns}, blocks of "
        f"{options.block_size}, sm_{options.architecture}, NVRTC "
        f"{'.'.join(map(str, nvrtc.version()))}, {options.schedule}"
    )
    print(report(options.kernel, counters, needed_bytes(options.kernel, *sizes), weight.numel()))


if __name__ == "__main__":
    main()
