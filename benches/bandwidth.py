"""Bytes per second of one-row products on weights no cache holds: `python -m benches.bandwidth`.

Decoding one token reads every weight once, so memory sets the pace. This measures how fast this
machine's memory can be read, by the fastest of several plain reductions over a buffer four times
as large as the last-level cache, and how fast one-row products read packed layers, as a share of
that. The layers are distinct and larger together than the cache, and each turn visits all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import mmap
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import qlora_rs
from benches import peers
from benches.measure import Table, arguments, interleave
from qlora_rs import PackedWeight

GIB = 1 << 30
DTYPES = (torch.float32, torch.bfloat16)
# Sizes relative to the last-level cache, so that what is left of one turn in the cache is little.
BUFFER_TIMES, LAYERS_TIMES = 4, 2.5
# Of the memory that is free.
LARGEST_SHARE = 0.5


def last_level_cache() -> int:
    """Bytes of the largest cache that the system reports, 32 MiB if it reports none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()) for file in files]
    return max((int(s[1]) * units[s[2]] for s in sizes if s), default=32 << 20)


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 4 * GIB


def capped(wanted: float, table: Table, what: str) -> int:
    """`wanted` bytes, or as much as the machine has room for, which is then said."""
    allowed = LARGEST_SHARE * free_memory()
    if wanted > allowed:
        table.say(f"{what}: {allowed / GIB:.1f} GiB instead of {wanted / GIB:.1f}: memory is short")
    return int(min(wanted, allowed))


def buffer_of(size: int) -> Tensor:
    """A float32 tensor on huge pages (Linux): the memory's own pace is wanted, not the pages'."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)


def readers(buffer: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read every byte of a float32 buffer once and write next to nothing."""
    square = buffer.view(-1, 4096)
    ones = torch.ones(4096)
    return {
        "sum": buffer.sum,
        "max": buffer.max,
        "dot": lambda: torch.dot(buffer[: len(buffer) // 2], buffer[len(buffer) // 2 :]),
        "mv": lambda: torch.mv(square, ones),
    }


def layers(size: tuple[int, int], total: int) -> list[PackedWeight]:
    """Distinct packed weights of `total` bytes together: one is quantized, the rest are copies."""
    packed = peers.packed_weight(*size)
    kept = [packed]
    while sum(layer.nbytes for layer in kept) < total:
        own = {name: getattr(packed, name).clone() for name in ("codes", "absmax", "nested_absmax")}
        kept.append(dataclasses.replace(packed, **own))
    return kept


def passes(weights: list[PackedWeight], dtype: torch.dtype) -> Callable[[], object]:
    """One row times every weight, checked on the first and the last."""
    x = torch.randn(1, weights[0].shape[1]).to(dtype)
    exact = peers.exact_product(x, weights[0])
    for packed in (weights[0], weights[-1]):
        peers.check("ours", qlora_rs.linear(x, packed), exact, dtype)

    def every_layer() -> None:
        for packed in weights:
            qlora_rs.linear(x, packed)

    return every_layer


def measure(options: argparse.Namespace, table: Table) -> None:
    """Fill the table."""
    cache = last_level_cache()
    buffer = buffer_of(capped(BUFFER_TIMES * cache, table, "buffer") >> 21 << 21)
    weights = layers(options.size, capped(LAYERS_TIMES * cache, table, "layers"))
    total = sum(packed.nbytes for packed in weights)
    calls = {f"read: {name}": (call, buffer.nbytes) for name, call in readers(buffer).items()}
    for dtype in DTYPES:
        name = f"ours: {str(dtype).removeprefix('torch.')}"
        calls[name] = (passes(weights, dtype), total)
    times = interleave({name: call for name, (call, _) in calls.items()}, options.seconds)
    rates = {name: size / times[name] / 1e9 for name, (_, size) in calls.items()}
    bandwidth = max(rate for name, rate in rates.items() if name.startswith("read"))
    for name, rate in rates.items():
        table.row(name, f"{calls[name][1] / GIB:.2f}", rate, f"{rate / bandwidth:.0%}")
    table.say("")
    table.say(
        f"last-level cache {cache / (1 << 20):.0f} MiB; {len(weights)} layers of "
        f"{list(options.size)}, NF4 with double quantization; medians of turns"
    )
    table.say("share: of the fastest reader")


def main() -> None:
    parser = arguments("one-row products as a share of the memory's bandwidth")
    parser.set_defaults(seconds=10.0)
    parser.add_argument("--size", type=int, nargs=2, default=(11008, 4096), metavar=("OUT", "IN"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("bandwidth", ("what", "GiB", "GB/s", "share"))
    measure(options, table)
    if options.record:
        table.record()


if __name__ == "__main__":
    main()
