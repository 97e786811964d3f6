"""Products on an emulated GPU beside those of float64: what every kernel of products must meet."""

from __future__ import annotations

import torch
from emulated_gpu import EmulatedGPU
from torch import Tensor

import qlora_rs
from qlora_rs import cpu, gpu
from qlora_rs.cpu import LowRank, Packed

# What rounding a result once may move it by, of its size.
ROUNDED = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def packed_of(features: int, columns: int, block_size: int = 64, double: bool = True) -> Packed:
    weight = torch.randn(features, columns)
    return Packed(*qlora_rs.quantize(weight, block_size, double).arguments())


def random_factors(packed: Packed, rank: int) -> LowRank | None:
    if not rank:
        return None
    features, columns = packed.out_features, packed.in_features
    return LowRank(torch.randn(rank, columns), torch.randn(features, rank), 0.25)


def assert_product(
    device: EmulatedGPU,
    x: Tensor,
    packed: Packed,
    low_rank: LowRank | None,
    bias: Tensor | None,
    of_terms: float,
) -> None:
    """y = x W^T + hidden B^T + bias, as float64 has it.

    Each result may be off by its own rounding and by `of_terms` of the root of its terms' squares:
    where terms cancel, a result is small but no more exact, and roundings are some up, some down.
    """
    weight = cpu.dequantize(packed, torch.float64).t()
    terms = [(x.double(), weight)]
    if low_rank is None:
        y = gpu.linear(x, packed, bias, device)
    else:
        y, hidden = gpu.lora_linear(x, packed, low_rank, bias, device)
        terms.append((hidden.double(), low_rank.lora_b.to(x.dtype).double().t()))
    assert (y.shape, y.dtype) == ((x.shape[0], packed.out_features), x.dtype)
    if bias is not None:
        terms.append((torch.ones(x.shape[0], 1).double(), bias.double().unsqueeze(0)))
    exact = sum(left @ right for left, right in terms)
    squares = sum(left.square() @ right.square() for left, right in terms)
    allowed = ROUNDED[x.dtype] * exact.abs() + of_terms * squares.sqrt()
    worst = float(((y.double() - exact).abs() / allowed).max())
    assert worst <= 1, f"a result is off by {worst:.3g} times what is allowed"
