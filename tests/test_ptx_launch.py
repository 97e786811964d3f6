"""What a launch takes and gives: outputs left unwritten, arguments and options of no use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_emulator import Module, Refusal, compile_cuda, inout, output, window

SOURCE = """extern "C" __global__ void copy(const int* x, short* y, int n, float scale) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] * scale;
}"""
X = np.arange(100, dtype=np.int32)
COPY = Module(compile_cuda(SOURCE))


def copy(x, y, n=100, scale=1.0, **options):
    return COPY.launch("copy", [x, y, n, scale], **{"grid": 1, "block": 128, **options})


def test_what_a_kernel_does_not_write_is_poison_and_reported():
    right = X.astype(np.int16)
    result = copy(X, output(right), 97)
    assert result.unwritten == {1: (6, 194)}
    assert result.arrays[0].tolist() == [*range(97), -1, -1, -1]
    assert copy(X, output(right)).unwritten == {}
    # Four blocks of 32, of which the third does not run.
    result = copy(X, output(right), grid=4, block=32, blocks=[0, 1, 3])
    assert result.unwritten == {1: (64, 128)}
    assert copy(X, inout(right), 0).unwritten == {}


def test_poison_starts_where_a_shifted_output_does():
    result = copy(X, output(np.zeros(7, np.int16), 6), 0, blocks=[0])
    assert result.unwritten == {1: (14, 0)}
    assert (result.arrays[0] == -1).all()


def test_a_result_describes_itself_in_a_line():
    result = copy(X, output(np.zeros(100, np.int16)), 99)
    assert repr(result).startswith("<Result of copy: int16[100], ")
    assert "unwritten: {1: Unwritten(bytes=2, first=198)}" in repr(result)
    assert len(repr(result)) < 150


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": [1, 2]}, r"argument 0: expected a numpy array, .*; got list \(use np.array\)"),
        ({"x": torch.zeros(3)}, r"argument 0: .* got torch.Tensor \(use .numpy\(\)\)"),
        ({"x": np.array([None])}, "argument 0: an array of dtype object holds Python objects"),
        ({"x": "x"}, "argument 0: .*; got str"),
        ({"n": 1.5}, "argument 2: parameter `copy_param_2` is an integer; got 1.5"),
        ({"block": (32, 1, 1, 1)}, "block: expected one to three sizes; got 4"),
        ({"grid": (1, 2.5)}, "grid: expected a whole number; got 2.5"),
        ({"grid": -1}, "grid: expected 0 to 4294967295; got -1"),
        ({"n": 2**31 + 2**32}, "argument 2: 6442450944 does not fit the 4 bytes of parameter"),
        ({"workers": -1}, "workers: expected 0 to 1024; got -1"),
        ({"shared": 2**70}, "shared: expected 0 to"),
        ({"blocks": [-1]}, "blocks: expected 0 to"),
        ({"schedule": "random:x"}, "no schedule `random:x`: use ascending, .* or random:SEED"),
        ({"schedule": "random:-1"}, "no schedule `random:-1`"),
        ({"schedule": "ahead:1"}, "no schedule `ahead:1`"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_named(arguments, sentence):
    with pytest.raises((TypeError, ValueError, OverflowError), match=sentence):
        copy(**{"x": X, "y": output(np.zeros(100, np.int16)), **arguments})


@pytest.mark.parametrize("lend", [output, inout, lambda array: window(array, 4)])
def test_only_arrays_can_be_lent(lend):
    with pytest.raises(TypeError, match=r"expected a numpy array; got list \(use np.array\)"):
        lend([0.0])


def test_null_and_absurd_addresses_are_called_so():
    y = output(np.zeros(100, np.int16))
    with pytest.raises(Refusal, match="read of 4 bytes at 0x0: a null pointer") as refused:
        copy(None, y)
    assert "nearest" not in str(refused.value)
    with pytest.raises(Refusal, match="outside every buffer; no buffer is near"):
        copy(np.int64(2**61), y)
    with pytest.raises(
        Refusal, match="the nearest is `argument 0` of 400 bytes, at its offset 400"
    ):
        copy(X, output(np.zeros(200, np.int16)), 101)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"arch": "80"}, "arch: expected a name such as \"sm_80\"; got '80'"),
        ({"arch": "sm_10"}, "This NVRTC has no sm_10; the emulator is for sm_80 to sm_120"),
        ({"options": "-DX=1"}, r"options: expected a list of flags, \['-DX=1'\]; got a str"),
        ({"source": "#include <cuda_fp16.h>"}, "headers are found with headers=True"),
    ],
)
def test_what_cannot_be_compiled_comes_with_advice(given, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        compile_cuda(**{"source": SOURCE, **given})


def test_a_mangled_kernel_is_recognised():
    module = Module(compile_cuda(SOURCE.removeprefix('extern "C" ')))
    with pytest.raises(
        Refusal, match=r'no kernel `copy`; it has: _Z4copy.* \(declare it extern "C"'
    ):
        module.launch("copy", [], grid=1, block=1)


def test_shared_variables_are_named_and_a_missing_barrier_is_mentioned():
    source = """template<int N> __device__ int twice(int i) {
        __shared__ int cell12[N]; cell12[i] = i; return cell12[i ^ 1];
    }
    extern "C" __global__ void kernel(int* y) {
        __shared__ int part[256]; extern __shared__ int spare[];
        const int t = threadIdx.x;
        if (MODE == 0) { part[t] = t; y[t] = part[t ^ 32]; }
        else if (MODE == 1) { spare[t] = t; y[t] = spare[t ^ 1]; }
        else if (MODE == 2) y[t] = twice<64>(t);
        else { if (t >= 32) part[t] = t; __syncthreads(); y[t] = part[t]; }
    }"""

    def said(mode: int) -> str:
        module = Module(compile_cuda(source, options=[f"-DMODE={mode}"]))
        with pytest.raises(Refusal) as refused:
            module.launch("kernel", [output(X[:64])], grid=1, block=64, shared=256)
        return str(refused.value)

    hint = "(a missing __syncthreads looks like this too)"
    first = said(0)
    assert "`part` + 128 in shared memory" in first
    assert hint in first
    assert "read of `spare` + 4 in shared memory races" in said(1)
    assert "nothing, such as __syncthreads, that orders the two" in said(1)
    assert "`cell12` + 4 in shared memory" in said(2)
    assert "`part` + 0 in shared memory" in said(3)
    assert hint in said(3)
