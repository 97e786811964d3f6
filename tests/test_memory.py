"""Forward and backward never hold a dequantized matrix, and calls do not leak.

The bound that the library states: 8 MiB per thread in the extension, a tile of 4 MiB in torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import qlora_rs

MIB = 1 << 20

# 8192 x 8192 packed without ever being dense: 256 MiB in float32, 128 MiB in bfloat16.
PEAKS = """
    import json, re, torch, qlora_rs
    from qlora_rs.quantize import dynamic_map

    def status(name):
        text = open("/proc/self/status").read()
        return int(re.search(name + r":\\s+(\\d+) kB", text)[1]) * 1024

    def packed(size):
        codes = torch.randint(0, 256, (size * size // 2, 1), dtype=torch.uint8)
        absmax = torch.randint(0, 256, (size * size // 64,), dtype=torch.uint8)
        nested = torch.ones(-(-size * size // 64 // 256))
        shape = torch.Size((size, size))
        return qlora_rs.PackedWeight(
            codes, absmax, nested, torch.tensor(1.0), dynamic_map(), shape, torch.float32, 64)

    def step(weight, rows, dtype):
        x = torch.ones(rows, weight.shape[1], dtype=dtype, requires_grad=True)
        a = torch.ones(16, weight.shape[1], requires_grad=True)
        b = torch.ones(weight.shape[0], 16, requires_grad=True)
        qlora_rs.lora_linear(x, weight, a, b, 1.0).sum().backward()

    torch.set_num_threads(2)
    weight, growth = packed(8192), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 128):
            step(packed(256), rows, dtype)   # libraries load, threads start
            open("/proc/self/clear_refs", "w").write("5")
            before = status("VmRSS")
            step(weight, rows, dtype)
            growth[f"{dtype} {rows}"] = status("VmHWM") - before
    print(json.dumps(growth))
"""


def test_the_peak_of_a_step_is_far_below_the_dense_matrix(run_python: Callable) -> None:
    done = run_python(PEAKS)
    assert done.returncode == 0, done.stderr
    for case, growth in json.loads(done.stdout).items():
        rows, width = int(case.split()[1]), 2 if "16" in case else 4
        # x, y, dX, dY and a sum's expansion; A, B and their gradients, twice where converted.
        tensors = 5 * rows * 8192 * width + 8 * 16 * 8192 * 4
        allowed = tensors + 2 * 8 * MIB + 8 * MIB
        assert growth < allowed, f"{case}: {growth / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"
        assert allowed < 8192 * 8192 * width / 2


def largest_allocation(step: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 64])
def test_no_tensor_of_a_step_is_as_large_as_the_matrix(rows: int, dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.randn(2048, 4096))
    x = torch.randn(rows, 4096).to(dtype).requires_grad_()
    a, b = torch.randn(8, 4096, requires_grad=True), torch.randn(2048, 8, requires_grad=True)

    def step() -> None:
        qlora_rs.lora_linear(x, packed, a, b, 1.0).sum().backward()

    # Small beside the matrix: 2048 * 4096 elements. A float64 tile has a million.
    assert largest_allocation(step) <= 8 * MIB < 2048 * 4096 * dtype.itemsize


def test_dequantizing_allocates_only_its_output() -> None:
    packed = qlora_rs.quantize(torch.randn(1024, 1024))
    assert largest_allocation(lambda: packed.dequantize(torch.bfloat16)) == 2 * MIB


def test_quantizing_allocates_only_its_output_and_four_bytes_per_block() -> None:
    weight = torch.randn(2048, 2048)
    assert largest_allocation(lambda: qlora_rs.quantize(weight)) == 2048 * 2048 // 2


LEAKS = """
    import gc, re, torch, qlora_rs

    def resident():
        return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

    torch.set_num_threads(1)
    weight = torch.randn(64, 128)
    packed = qlora_rs.quantize(weight)
    x = torch.randn(40, 128, requires_grad=True)
    a, b = torch.randn(4, 128, requires_grad=True), torch.randn(64, 4, requires_grad=True)

    def call():
        qlora_rs.quantize(weight).dequantize()
        qlora_rs.linear(x[:1], packed)
        qlora_rs.lora_linear(x, packed, a, b, 1.0).sum().backward()
        try:
            qlora_rs.quantize(weight * float("nan"))
        except qlora_rs.QloraError:
            pass

    for _ in range(300):
        call()
    gc.collect()
    before = resident()
    for _ in range(2000):
        call()
    gc.collect()
    print(resident() - before)
"""


def test_thousands_of_calls_keep_the_memory_level(run_python: Callable) -> None:
    done = run_python(LEAKS)
    assert done.returncode == 0, done.stderr
    # One leaked tensor of any of these calls would show as at least 2000 * 2 KiB.
    assert int(done.stdout) < 2000, f"{done.stdout} KiB more"
