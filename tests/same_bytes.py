"""Byte for byte comparison that says which values differ, and by how much."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.dtype.itemsize])


def _ordered(bits: int, width: int) -> int:
    """A float's bits as an integer that grows with the value, so that neighbours differ by 1."""
    magnitude = bits & ((1 << (width - 1)) - 1)
    return -magnitude if bits >> (width - 1) else magnitude


def assert_same_bytes(
    ours: Tensor, theirs: Tensor, what: str = "values", any_nan: bool = False
) -> None:
    """Equal shape, dtype and bytes; with `any_nan`, any NaN is as good as another.

    >>> assert_same_bytes(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.5, 1.0000001]]), "weights")
    Traceback (most recent call last):
        ...
    AssertionError: 1 of 2 weights differ; first at [0, 1]: ours 0x3f800000 (1.0), theirs \
0x3f800001 (1.0000001192092896), 1 ulp apart
    """
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), (
        f"{what}: ours are {list(ours.shape)} of {ours.dtype}, theirs {list(theirs.shape)} of "
        f"{theirs.dtype}"
    )
    differ = _bits(ours) != _bits(theirs)
    if any_nan:
        differ &= ~(ours.detach().cpu().isnan() & theirs.detach().cpu().isnan())
    if not differ.any():
        return
    at = tuple(differ.nonzero()[0].tolist())
    width = 8 * ours.dtype.itemsize
    values = [tensor.detach().cpu()[at] for tensor in (ours, theirs)]
    words = [int(_bits(value.reshape(1))[0]) % (1 << width) for value in values]
    mine, other = (
        f"0x{word:0{width // 4}x} ({value.item()})"
        for word, value in zip(words, values, strict=True)
    )
    apart = ""
    if ours.is_floating_point() and all(value.isfinite() for value in values):
        distance = abs(_ordered(words[0], width) - _ordered(words[1], width))
        apart = f", {distance} ulp apart"
    raise AssertionError(
        f"{int(differ.sum())} of {differ.numel()} {what} differ; first at {list(at)}: ours {mine}, "
        f"theirs {other}{apart}"
    )
