"""Every CPU path gives the same codes, statistics and decoded values, each in its own process."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

import qlora_rs
from qlora_rs import _rust

PATHS = _rust.cpu_paths()

# A fixed hostile input: all kinds of blocks, tails of every length, all sizes, all dtypes.
DIGESTS = """
    import hashlib, json, numpy, torch, qlora_rs
    from qlora_rs import _rust

    random = numpy.random.default_rng(2305_14314)
    digests = {"path": _rust.cpu_path()}

    def matrices(dtype):
        bits = torch.from_numpy(random.integers(0, 2**32, (40, 515), dtype=numpy.uint32).view("i4"))
        if dtype == torch.float32:
            any_bits = bits.view(dtype)
        else:
            any_bits = bits.to(torch.int16).view(dtype)
        yield torch.where(any_bits.isfinite(), any_bits, torch.ones_like(any_bits))
        for scale in (1e-44, 1e-38, 1e-20, 1.0, 1e4):
            yield torch.from_numpy(random.standard_normal((33, 515)) * scale).to(dtype)
        ties = torch.tensor(_rust.levels())
        ties = (ties[1:] + ties[:-1]) / 2
        near = torch.cat([ties, ties * (1 + 2**-23), ties * (1 - 2**-23), torch.ones(1)])
        yield near.repeat(30, 3).to(dtype)
        yield torch.zeros(5, 65, dtype=dtype)
        for tail in range(70):
            yield torch.from_numpy(random.standard_normal((1, 64 + tail))).to(dtype)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for block_size in (32, 64, 256, 4096):
            digest = hashlib.sha256()
            for weight in matrices(dtype):
                packed = qlora_rs.quantize(weight, block_size)
                single = qlora_rs.quantize(weight, block_size, double_quant=False)
                parts = [packed.codes, packed.absmax, packed.nested_absmax, single.absmax]
                parts.append(packed.nested_offset.reshape(1))
                for out in (torch.float32, torch.float16, torch.bfloat16):
                    parts += [packed.dequantize(out), single.dequantize(out)]
                for part in parts:
                    digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
            digests[f"{dtype} {block_size}"] = digest.hexdigest()
    print(json.dumps(digests))
"""

PRODUCTS = """
    import json, torch, qlora_rs

    torch.manual_seed(0)
    results = {}
    for shape in ((70, 256), (33, 100), (5, 4096)):
        weight = torch.randn(shape)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            packed = qlora_rs.quantize(weight)
            dense = packed.dequantize(torch.float64)
            for rows in (1, 3, 8, 50):
                x = torch.randn(rows, shape[1]).to(dtype).requires_grad_()
                y = qlora_rs.linear(x, packed)
                seed = torch.randn(rows, shape[0]).to(dtype)
                (grad,) = torch.autograd.grad(y, x, seed)
                cases = {
                    "forward": (y, x.double() @ dense.t(), x.double().abs() @ dense.abs().t()),
                    "backward": (grad, seed.double() @ dense, seed.double().abs() @ dense.abs()),
                }
                for name, (ours, exact, summed) in cases.items():
                    error = ((ours.double() - exact).abs() / summed).max().item()
                    results[f"{shape} {dtype} {rows} {name}"] = error / torch.finfo(dtype).eps
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def portable_digests() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_packs_and_decodes_the_bytes_of_the_portable_one(
    path: str, cpu_path: Callable, portable_digests: dict
) -> None:
    if not portable_digests:
        portable_digests.update(json.loads(cpu_path("portable", DIGESTS)))
    digests = json.loads(cpu_path(path, DIGESTS))
    assert digests.pop("path") == path
    assert digests == {key: portable_digests[key] for key in digests}
    assert len(digests) == 12


@pytest.mark.parametrize("path", PATHS)
def test_a_path_gives_products_within_a_few_roundings_of_what_was_summed(
    path: str, cpu_path: Callable
) -> None:
    errors = json.loads(cpu_path(path, PRODUCTS))
    assert len(errors) == 72
    assert max(errors.values()) < 4, max(errors, key=errors.get)


def test_the_fastest_path_is_taken_unless_one_is_named(
    run_python: Callable, cpu_path: Callable
) -> None:
    code = "from qlora_rs import _rust; print(_rust.cpu_path())"
    assert cpu_path("", code) == PATHS[0]
    assert cpu_path("portable", code) == "portable"
    assert PATHS[-1] == "portable"


X86_PATHS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2")
MISSING = [path for path in X86_PATHS if path not in PATHS]


@pytest.mark.parametrize("path", ["sse9", "AVX2", *MISSING])
def test_a_path_that_is_unknown_or_missing_is_a_sentence_and_not_a_crash(
    path: str, run_python: Callable
) -> None:
    code = """
        import torch, qlora_rs
        try:
            qlora_rs.quantize(torch.ones(2, 64))
        except qlora_rs.QloraError as error:
            print(error)
    """
    done = run_python(code, QLORA_RS_CPU=path)
    assert done.returncode == 0, done.stderr
    assert f"QLORA_RS_CPU={path}" in done.stdout
    assert "portable" in done.stdout


def test_products_repeat_bit_for_bit() -> None:
    packed = qlora_rs.quantize(torch.randn(96, 256))
    for rows in (1, 8, 60):
        x = torch.randn(rows, 256, dtype=torch.bfloat16)
        expected = qlora_rs.linear(x, packed)
        assert all(torch.equal(qlora_rs.linear(x, packed), expected) for _ in range(250))
