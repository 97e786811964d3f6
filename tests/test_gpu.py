"""On a real GPU, by `pytest -m gpu`: what no emulator shows. Streams, graphs, devices, the launch.

The kernels' arithmetic is tested without one, in `test_cuda_quantize.py` and
`test_cuda_dequantize.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import strategies
import torch
from hypothesis import given, settings
from same_bytes import assert_same_bytes
from strategies import BLOCK_SIZES, FLOATS
from torch import Tensor, nn

import qlora_rs
from qlora_rs import QloraError

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    """Asked to test a GPU where there is none: that is one failure, never a pass."""
    if not torch.cuda.is_available():
        pytest.exit(
            "pytest -m gpu needs an NVIDIA GPU that torch can use, and finds none; "
            "`qlora-rs doctor` says what is missing",
            returncode=1,
        )


def assert_same(ours: qlora_rs.PackedWeight, theirs: qlora_rs.PackedWeight) -> None:
    names = ("codes", "absmax", "nested_absmax", "nested_offset", "nested_map")
    for name, mine, other in zip(names, ours.arguments()[:5], theirs.arguments()[:5], strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert_same_bytes(mine, other, name)


@given(strategies.weights(), strategies.block_sizes)
@settings(max_examples=300)
def test_both_devices_pack_and_decode_the_same_bytes(weight: Tensor, block_size: int) -> None:
    on_cpu = qlora_rs.quantize(weight, block_size)
    on_gpu = qlora_rs.quantize(weight.to(GPU), block_size)
    assert_same(on_gpu, on_cpu)
    for dtype in FLOATS:
        assert_same_bytes(on_gpu.dequantize(dtype), on_cpu.dequantize(dtype), "weights")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_large_matrix(dtype: torch.dtype, block_size: int) -> None:
    weight = torch.randn(4096, 4097).to(dtype)
    on_gpu = qlora_rs.quantize(weight.to(GPU), block_size)
    assert_same(on_gpu, qlora_rs.quantize(weight, block_size))


def test_the_same_bytes_two_hundred_times() -> None:
    weight = torch.randn(1024, 1031, device=GPU)
    first = qlora_rs.quantize(weight)
    for _ in range(200):
        assert_same(qlora_rs.quantize(weight), first)


def test_a_bad_weight_is_refused_with_the_cpus_sentence() -> None:
    weight = torch.randn(64, 64)
    weight[3, 7] = float("nan")
    with pytest.raises(QloraError) as expected:
        qlora_rs.quantize(weight)
    with pytest.raises(QloraError) as found:
        qlora_rs.quantize(weight.to(GPU))
    assert str(found.value) == str(expected.value)


def test_work_is_queued_on_the_current_stream() -> None:
    weight = torch.randn(2048, 2048, device=GPU)
    expected = qlora_rs.quantize(weight).dequantize()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The copy is not over when the kernels are queued behind it.
        copy = torch.empty_like(weight).copy_(weight)
        found = qlora_rs.quantize(copy).dequantize()
    stream.synchronize()
    assert torch.equal(found, expected)


def test_a_graph_captures_quantizing_and_replays_it() -> None:
    weight = torch.randn(256, 512, device=GPU)
    qlora_rs.quantize(weight)  # loads the kernels and the map
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = qlora_rs.quantize(weight)
    weight.copy_(torch.randn(256, 512))
    graph.replay()
    assert_same(packed, qlora_rs.quantize(weight))
    # Nobody can be told of a NaN here: it must not decode to a number.
    weight[3, 7] = float("nan")
    graph.replay()
    assert bool(packed.dequantize()[3, :64].isnan().any())


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 17, 33, 128, 129])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_of_few_and_of_more_rows_are_those_of_float64(
    dtype: torch.dtype, rows: int
) -> None:
    # Whole passes of the kernels that decode in registers, and a rest.
    packed = qlora_rs.quantize(torch.randn(1000, 3136, device=GPU))
    x, bias, lora_a, lora_b = (
        torch.randn(shape, device=GPU).to(dtype)
        for shape in ((rows, 3136), (1000,), (40, 3136), (1000, 40))
    )
    y = qlora_rs.lora_linear(x, packed, lora_a, lora_b, 0.5, bias).double()
    exact = x.double() @ packed.dequantize(torch.float64).t() + bias.double()
    exact += 0.5 * x.double() @ lora_a.double().t() @ lora_b.double().t()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert float((y - exact).abs().max() / exact.abs().max()) < tolerance


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(8, torch.float32), (33, torch.bfloat16), (33, torch.float32)],
    ids=["few rows", "tensor cores", "chunks"],
)
def test_a_graph_captures_decoding_and_products_and_replays_them(
    rows: int, dtype: torch.dtype
) -> None:
    packed = qlora_rs.quantize(torch.randn(256, 512, device=GPU))
    x = torch.randn(rows, 512, device=GPU).to(dtype)
    qlora_rs.linear(x, packed)  # loads the kernels, as torch's notes on graphs advise
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = qlora_rs.linear(x, packed)
    x.copy_(torch.randn(rows, 512))
    graph.replay()
    assert torch.equal(y, qlora_rs.linear(x, packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_on_tensor_cores_has_the_same_bytes_whatever_rows_are_beside_it(
    dtype: torch.dtype,
) -> None:
    packed = qlora_rs.quantize(torch.randn(4096, 4096, device=GPU))
    x = torch.randn(128, 4096, device=GPU).to(dtype)
    together = qlora_rs.linear(x, packed)
    for count in (3, 9, 17, 33, 65):
        for _ in range(20):
            assert torch.equal(qlora_rs.linear(x[:count], packed), together[:count])


def test_threads_of_their_own_compute_the_same() -> None:
    packed = qlora_rs.quantize(torch.randn(1024, 1024, device=GPU))
    expected = packed.dequantize()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: packed.dequantize(), range(64)):
            assert torch.equal(found, expected)


def test_the_first_work_of_a_process_may_come_from_new_threads(run_python: Callable) -> None:
    done = run_python("""
        import threading, torch, qlora_rs
        weight = torch.ones(64, 64, device="cuda")
        results = []
        work = lambda: results.append(qlora_rs.quantize(weight).dequantize())
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(results) == 8
        assert all(bool((found == 1).all()) for found in results)
    """)
    assert done.returncode == 0, done.stderr


def test_a_device_that_is_not_the_current_one() -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.device(0):
        packed = qlora_rs.quantize(torch.ones(64, 64, device=last))
        assert packed.device == last
        assert bool((packed.dequantize() == 1).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_lora_layer_learns_as_on_the_cpu(dtype: torch.dtype) -> None:
    base = qlora_rs.NF4Linear.from_linear(nn.Linear(512, 256).to(dtype))
    layer = qlora_rs.QLoRALinear(base, r=8, alpha=16)
    nn.init.normal_(layer.lora_B)
    x, upstream = torch.randn(33, 512).to(dtype), torch.randn(33, 256).to(dtype)
    results = []
    for device in ("cpu", GPU):
        layer = layer.to(device)
        leaf = x.to(device).requires_grad_()
        y = layer(leaf)
        gradients = torch.autograd.grad(y, (leaf, layer.lora_A, layer.lora_B), upstream.to(device))
        results.append([t.detach().cpu().double() for t in (y, *gradients)])
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert float((on_cpu - on_gpu).abs().max()) <= tolerance * float(on_cpu.abs().max())
