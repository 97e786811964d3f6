"""The formulae of the library in float64 and numpy, on one page, written from the papers.

Nothing here is imported from `qlora_rs`. QLoRA: arXiv 2305.14314; LoRA: arXiv 2106.09685; the
dynamic 8-bit data type: arXiv 1511.04561, section 2.2. Slow and plain on purpose.
"""

from __future__ import annotations

import statistics
from fractions import Fraction

import numpy as np

# QLoRA, appendix E: the values of NormalFloat4, all of them exact float32 numbers.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def nf4_from_quantiles() -> np.ndarray:
    """The same values by their construction: quantiles of N(0, 1) around an exact zero."""
    tail = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    positive = quantile(np.linspace(tail, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(tail, 0.5, 8)[:-1])
    return np.sort(np.concatenate([negative, [0.0], positive])) / positive.max()


def dynamic_map() -> np.ndarray:
    """Seven decades of 1, 2, 4, ... 64 equal intervals each, both signs; then 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles]
    return np.sort(values)


def blocks_of(values: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Consecutive runs of the flattened matrix; the last may be shorter."""
    flat = values.astype(np.float64).reshape(-1)
    return [flat[i : i + block_size] for i in range(0, flat.size, block_size)]


def absmax(weight: np.ndarray, block_size: int) -> np.ndarray:
    """The largest magnitude of each block."""
    return np.array([np.abs(block).max() for block in blocks_of(weight, block_size)])


def quantize(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Code of the level nearest to weight / absmax, and how far that is from the nearest tie.

    A block with an absmax below 1e-38 is divided by 1e-38, as bitsandbytes does.
    """
    blocks = blocks_of(weight, block_size)
    scaled = np.concatenate([b / max(np.abs(b).max(), 1e-38) for b in blocks] or [np.empty(0)])
    ties = (NF4[:-1] + NF4[1:]) / 2
    codes = (scaled[:, None] > ties).sum(axis=1)
    return codes.astype(np.uint8), np.abs(scaled[:, None] - ties).min(axis=1, initial=1.0)


def pack(codes: np.ndarray) -> np.ndarray:
    """Two codes per byte, the first in the high nibble; an odd count is padded with code 7."""
    even = np.concatenate([codes, np.full(codes.size % 2, 7, np.uint8)])
    return even[0::2] << 4 | even[1::2]


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """The other way."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]


def nearest_float32(value: Fraction) -> np.float32:
    """Rounded once, ties to an even last bit; below the largest float32."""
    guess = np.float32(float(value))
    sides = [np.nextafter(guess, np.float32(side)) for side in (-np.inf, np.inf)]
    candidates = [c for c in (guess, *sides) if np.isfinite(c)]

    def distance(c: np.float32) -> tuple[Fraction, int]:
        return abs(Fraction(float(c)) - value), int(c.view(np.uint32)) % 2

    return min(candidates, key=distance)


def exact_mean(values: np.ndarray) -> np.float32:
    """The mean in rational arithmetic, rounded once to float32."""
    return nearest_float32(sum(map(Fraction, values.tolist()), Fraction(0)) / max(values.size, 1))


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Distance from each value to the nearest entry of the table."""
    return np.abs(values[:, None] - table.astype(np.float64)).min(axis=1, initial=np.inf)


def decode_absmax(
    codes: np.ndarray, nested_absmax: np.ndarray, offset: float, table: np.ndarray
) -> np.ndarray:
    """map[code] * nested_absmax + offset, each operation rounded to float32."""
    groups = np.repeat(nested_absmax.astype(np.float64), 256)[: codes.size]
    product = (table.astype(np.float64)[codes] * groups).astype(np.float32)
    return (product.astype(np.float64) + np.float64(offset)).astype(np.float32)


def dequantize(packed: np.ndarray, absmax: np.ndarray, shape: tuple, block_size: int) -> np.ndarray:
    """level * absmax rounded to float32, as float64."""
    count = int(np.prod(shape))
    scales = np.repeat(absmax.astype(np.float64), block_size)[:count]
    values = NF4[unpack(packed.reshape(-1), count)] * scales
    return values.astype(np.float32).astype(np.float64).reshape(shape)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """x Wᵀ + b."""
    return x @ weight.T + bias


def lora(x: np.ndarray, a: np.ndarray, b: np.ndarray, scaling: float) -> np.ndarray:
    """scaling (x Aᵀ) Bᵀ."""
    return scaling * ((x @ a.T) @ b.T)
