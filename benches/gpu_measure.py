"""Fair timing on a GPU: by its own clock, in turns, over more memory than its cache holds."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Callable, Sequence

import bitsandbytes
import peft
import torch

import qlora_rs
from qlora_rs import nvrtc

# What one turn visits, as a multiple of the L2 cache: little of a buffer is left for its next use.
CACHE_TIMES = 4
TURNS = 25
Calls = Sequence[Callable[[], object]]


def gpu_slug() -> str:
    """The folder of this GPU's records."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def gpu_machine() -> str:
    """The GPU, its driver, and the version of everything."""
    import cupy

    properties = torch.cuda.get_device_properties(0)
    driver = cupy.cuda.runtime.driverGetVersion()
    compiler = ".".join(map(str, nvrtc.version()))
    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size >> 20} MiB, "
        f"driver for CUDA {driver // 1000}.{driver % 1000 // 10} | qlora_rs "
        f"{qlora_rs.__version__}, NVRTC {compiler}, torch {torch.__version__}, CuPy "
        f"{cupy.__version__}, bitsandbytes {bitsandbytes.__version__}, peft {peft.__version__}, "
        f"Python {platform.python_version()}"
    )


def sets_beyond_cache(size: int) -> int:
    """How many buffers of `size` bytes are CACHE_TIMES the L2 cache; two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHE_TIMES * cache // size))


def capture(calls: Calls) -> Callable[[], None]:
    """All calls as one CUDA graph, without what the host does between them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kept = [call() for call in calls]  # loads kernels before the capture, as graphs need
    stream.synchronize()
    del kept
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay(graph: torch.cuda.CUDAGraph = graph, kept: list = kept) -> None:
        graph.replay()

    return replay


def one_by_one(calls: Calls) -> Callable[[], None]:
    """All calls as Python makes them. Results live until the last, so that each has its memory."""

    def run() -> None:
        kept = [call() for call in calls]
        del kept

    return run


def interleave(contenders: dict[str, Calls], graphs: bool, turns: int = TURNS) -> dict[str, float]:
    """Median microseconds per call, between CUDA events, of contenders measured in turns.

    A contender is a list of the same call on different buffers; a turn makes all of them. `graphs`:
    replayed from a CUDA graph, which leaves the device's time alone.
    """
    prepare = capture if graphs else one_by_one
    runs = {name: prepare(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 2):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first two load kernels and fill torch's cache of memory
                times[name].append(1e3 * start.elapsed_time(end) / len(contenders[name]))
    return {name: statistics.median(measured) for name, measured in times.items()}


def copy_bandwidth() -> float:
    """Bytes per microsecond of copies on the device, read and written both counted."""
    size = 1 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    micros = interleave({"copy": [lambda: target.copy_(source)]}, graphs=False)["copy"]
    return 2 * size / micros
