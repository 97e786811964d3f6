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

# What forward and backward need beyond their inputs and outputs, counted from before the first
# large product, so that scratch which a thread keeps between calls counts in every case.
PEAKS = r"""
    import ctypes, gc, itertools, json, re, sys
    import torch, qlora_rs
    from qlora_rs.quantize import dynamic_map

    SIZES = ((11008, 4096), (2048, 28672), (28672, 2048))
    ROWS = (1, 8, 32, 512, 2048)
    RANK = 16

    def status(name):
        text = open("/proc/self/status").read()
        return int(re.search(name + r":\s+(\d+) kB", text)[1]) * 1024

    def settle():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def packed(rows, columns):  # random codes: never dense
        blocks = rows * columns // 64
        codes = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8)
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        nested = torch.ones(-(-blocks // 256))
        return qlora_rs.PackedWeight(
            codes, absmax, nested, torch.tensor(1.0), dynamic_map(),
            torch.Size((rows, columns)), torch.float32, 64)

    def peak_of(step, held):
        settle()
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts over
        results = step()
        extra = status("VmHWM") - start - sum(t.nbytes for t in (*held, *results))
        return results, extra

    def measure(weight, rows, dtype, lora):
        outputs, inputs = weight.shape
        x = torch.ones(rows, inputs, dtype=dtype, requires_grad=True)
        grad = torch.ones(rows, outputs, dtype=dtype)
        held = [x, grad]
        if lora:  # float32, as adapters are kept
            a = torch.ones(RANK, inputs, requires_grad=True)
            b = torch.ones(outputs, RANK, requires_grad=True)
            held += [a, b]
            forward = lambda: qlora_rs.lora_linear(x, weight, a, b, 1.0)
        else:
            forward = lambda: qlora_rs.linear(x, weight)
        (y,), first = peak_of(lambda: (forward(),), held)
        wanted = [tensor for tensor in held if tensor.requires_grad]
        _, second = peak_of(lambda: torch.autograd.grad(y, wanted, grad), [*held, y])
        return first, second

    def compile_low_rank(outputs, inputs, rows, dtype):
        # torch keeps code that it compiles for the shapes of its own products, x Aᵀ and the like:
        # not memory of ours.
        shapes = (rows, inputs), (rows, outputs), (RANK, inputs), (outputs, RANK)
        x, grad, a, b = (torch.ones(shape, dtype=dtype) for shape in shapes)
        hidden, grad_hidden = x @ a.t(), grad @ b
        grad_hidden.t() @ x, grad.t() @ hidden

    dtype, threads = getattr(torch, sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    small, weights, start = packed(256, 256), [packed(*size) for size in SIZES], 0
    # Many rows take seconds: with LoRA only, which needs more, and the most on one size only.
    cases = [
        (weight, rows, lora)
        for weight, rows, lora in itertools.product(weights, ROWS, (False, True))
        if (rows < 512 or lora) and (rows < 2048 or weight is weights[0])
    ]
    for rows, lora in itertools.product((1, 128), (False, True)):
        measure(small, rows, dtype, lora)  # libraries load, threads start
    for weight, rows, lora in cases:
        if lora:
            compile_low_rank(*weight.shape, rows, dtype)
    settle()
    start = status("VmRSS")
    print(json.dumps({
        f"{list(weight.shape)}, {rows} rows, lora {lora}": measure(weight, rows, dtype, lora)
        for weight, rows, lora in cases
    }))
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_product_needs_at_most_8_mib_per_thread_beside_its_tensors(
    run_python: Callable, dtype: str, threads: int
) -> None:
    code = PEAKS.replace("sys.argv[1]", repr(dtype)).replace("sys.argv[2]", str(threads))
    # Freed tensors go back to the system at once, so that resident memory is what is in use.
    done = run_python(code, timeout=280, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    beyond = [
        f"{case}, {step}: {extra / MIB:.1f} MiB"
        for case, pair in json.loads(done.stdout).items()
        for step, extra in zip(("forward", "backward"), pair, strict=True)
        if extra > 8 * MIB * threads
    ]
    assert not beyond, "\n".join(beyond)


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
