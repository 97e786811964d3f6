"""Generators: weights that hurt, views that are not contiguous, shapes at the edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import reference
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
EDGE_SIZES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 251)

dtypes = st.sampled_from(FLOATS)
block_sizes = st.sampled_from(BLOCK_SIZES)
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.sampled_from((0, 1, 2, 3, 5, 17, 64)), st.sampled_from((0, *EDGE_SIZES)))

_BITS = {
    torch.float32: (np.uint32, torch.int32),
    torch.float16: (np.uint16, torch.int16),
    torch.bfloat16: (np.uint16, torch.int16),
}


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Floats by their bit patterns."""
    _, integer = _BITS[dtype]
    return torch.from_numpy(bits.copy()).view(integer).view(dtype)


def every_16_bit_pattern(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit float type, in the order of their bits."""
    values = from_bits(np.arange(1 << 16, dtype=np.uint16), dtype)
    return values[values.isfinite()]


def finite(values: Tensor) -> Tensor:
    """NaN and infinity replaced by 1."""
    return torch.where(values.isfinite(), values, torch.ones_like(values))


@st.composite
def bit_patterns(draw: Callable, dtype: torch.dtype, count: int) -> Tensor:
    """Finite values by arbitrary bits: subnormals and the largest numbers are as likely as ones."""
    unsigned, _ = _BITS[dtype]
    bits = draw(numpy_strategies.arrays(unsigned, count))
    return finite(from_bits(bits, dtype))


def near_ties(random: np.random.Generator, count: int) -> np.ndarray:
    """Float32 values within one ulp of absmax times a decision boundary, absmax among them."""
    ties = ((reference.NF4[:-1] + reference.NF4[1:]) / 2).astype(np.float32)
    absmax = np.float32(2.0 ** random.integers(-20, 20) * random.uniform(1, 2))
    values = random.choice(ties, count).astype(np.float32) * absmax
    neighbours = [np.nextafter(values, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.choose(random.integers(0, 3, count), [values, *neighbours])
    values[:: max(count // 3, 1)] = absmax
    return values.astype(np.float32)


def _content(kind: str, random: np.random.Generator, count: int) -> np.ndarray:
    normal = random.standard_normal(count)
    return {
        "normal": lambda: normal,
        "heavy tailed": lambda: random.standard_t(1.5, count).clip(-6e4, 6e4),
        "tiny": lambda: normal * 10.0 ** -random.integers(30, 46),
        "huge": lambda: normal.clip(-3, 3) * 10.0**38,
        "mixed scales": lambda: normal * 2.0 ** random.integers(-30, 15, count),
        "equal": lambda: np.full(count, normal[:1].sum()),
        "signed zeros": lambda: np.where(normal > 0, 0.0, -0.0),
        "one hot": lambda: normal[:1].sum() * (np.arange(count) == count // 2),
        "near ties": lambda: near_ties(random, count),
    }[kind]()


KINDS = (
    "normal", "heavy tailed", "tiny", "huge", "mixed scales",
    "equal", "signed zeros", "one hot", "near ties",
)  # fmt: skip


@st.composite
def weights(draw: Callable, dtype: torch.dtype | None = None) -> Tensor:
    """A finite matrix: arbitrary bits, or one of `KINDS`."""
    dtype = dtype or draw(dtypes)
    rows, columns = draw(shapes)
    kind = draw(st.sampled_from(("bits", *KINDS)))
    if kind == "bits":
        return draw(bit_patterns(dtype, rows * columns)).reshape(rows, columns)
    values = _content(kind, np.random.default_rng(draw(seeds)), rows * columns)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return finite(torch.from_numpy(values).to(dtype)).reshape(rows, columns)


# Ways to hold a matrix in memory; each returns equal values.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda m: m.contiguous(),
    "transposed": lambda m: m.t().contiguous().t(),
    "every other column": lambda m: m.repeat_interleave(2, dim=1)[:, ::2],
    "every other row": lambda m: m.repeat_interleave(2, dim=0)[::2],
    "inside a larger matrix": lambda m: torch.nn.functional.pad(m, (3, 2, 1, 1))[
        1 : 1 + m.shape[0], 3 : 3 + m.shape[1]
    ],
    "at an odd offset": lambda m: torch.cat([m.new_zeros(1), m.reshape(-1)])[1:].view(m.shape),
    "negated lazily": lambda m: torch._neg_view(-m),
    "requires grad": lambda m: m.clone().requires_grad_(),
}
views = st.sampled_from(sorted(VIEWS))


@dataclass
class Product:
    """Operands of a product, finite and of moderate size."""

    x: Tensor
    weight: Tensor
    block_size: int
    double_quant: bool
    bias: Tensor | None


@st.composite
def products(draw: Callable, dtype: torch.dtype | None = None) -> Product:
    """x with any leading shape, a weight that may not divide into blocks, bias or none."""
    dtype = dtype or draw(dtypes)
    # Few rows and many are computed in different ways; panels hold 32 rows.
    leading = draw(
        st.sampled_from(((), (0,), (1,), (3,), (8,), (9,), (2, 0), (2, 5), (31,), (33,), (3, 40)))
    )
    out_features, in_features = draw(st.sampled_from(EDGE_SIZES)), draw(st.sampled_from(EDGE_SIZES))
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(*leading, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if draw(st.booleans()) else None
    return Product(x, weight, draw(block_sizes), draw(st.booleans()), bias)
