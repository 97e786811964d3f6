"""The comparison that other tests rely on: it must see every difference, and say where."""

from __future__ import annotations

import pytest
import torch
from same_bytes import assert_same_bytes

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def said(ours: torch.Tensor, theirs: torch.Tensor, **options: bool) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_same_bytes(ours, theirs, **options)
    return str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_neighbours_are_one_ulp_apart_also_across_zero(dtype: torch.dtype) -> None:
    theirs = torch.zeros(3, 4, dtype=dtype)
    ours = theirs.clone()
    ours[1, 2] = torch.finfo(dtype).smallest_normal
    ours[2, 0] = 1
    theirs[2, 0] = 1
    assert "1 of 12 values differ; first at [1, 2]: ours 0x0" in said(ours, theirs)
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    ours.view(word)[1, 2] = 1
    assert said(ours, theirs).endswith(", 1 ulp apart")


def test_the_sign_of_zero_the_dtype_and_the_shape_are_differences() -> None:
    zeros = torch.zeros(2)
    assert "ours 0x80000000 (-0.0), theirs 0x00000000 (0.0), 0 ulp apart" in said(-zeros, zeros)
    assert "ours are [2] of torch.float32, theirs [2] of torch.float16" in said(zeros, zeros.half())
    assert "theirs [1, 2]" in said(zeros, zeros[None])
    codes = torch.arange(4, dtype=torch.uint8)
    assert said(codes, codes.flip(0)).startswith(
        "4 of 4 values differ; first at [0]: ours 0x00 (0)"
    )


def test_only_a_nan_stands_for_a_nan() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    other = nan.clone()
    other.view(torch.int32)[0] ^= 1
    assert_same_bytes(nan, nan)
    assert_same_bytes(nan, other, any_nan=True)
    assert "first at [0]" in said(nan, other)
    assert "first at [0]" in said(nan, torch.ones(2), any_nan=True)
