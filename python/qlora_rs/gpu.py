"""GPU compute of the operators: the counterpart of `cpu.py`, with the same bytes.

Every function takes tensors of one device and the `launcher` that starts kernels there. Tests pass
one that executes the kernels' PTX without a GPU, so all of this file runs in them.

Products of few rows of activations run in one kernel, which decodes in registers and adds an
adapter's share: on tensor cores from 3 rows of 16 bits on (`cuda/tensor_cores_nf4.cu`), else in
float32 (`cuda/few_rows_nf4.cu`). Others decode some rows of the weight at a time, `CHUNK_BYTES` at
most (but at least `CHUNK_ROWS`, and the rows between two that begin a block), and multiply those
with torch's matmul. Sums are float32 within a chunk. Forward, a chunk holds whole sums; backward,
dX is rounded to its dtype once per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qlora_rs import _rust, kernels
from qlora_rs.cpu import LowRank, Packed, plain
from qlora_rs.errors import QloraError
from qlora_rs.kernels import Launch, Launcher

NESTED_BLOCK = 256
# Decoded weights that a product holds at any one time: at most CHUNK_BYTES, and of a matrix larger
# than WHOLE_BYTES about half. Each chunk is two launches from Python.
CHUNK_BYTES = 48 << 20
WHOLE_BYTES = 16 << 20
# A chunk has a multiple of so many rows: cuBLAS wants results that begin at a multiple of 16 bytes,
# and its tiles have 128 rows.
CHUNK_ROWS = 128
# Products of so many rows of activations at most decode in registers, where every row of W begins a
# block: on tensor cores those of 16 bits, in float32 those of all types.
TENSOR_CORES_ROWS = (3, max(kernels.TENSOR_CORES_TILES))
FEW_ROWS = max(kernels.FEW_ROWS_TILES)
# The kernels count in 32 bits: features, and columns of so many rows; all elements of a matrix.
MOST_FEATURES, MOST_COLUMNS = 1 << 31, (1 << 31) // FEW_ROWS
MOST_ELEMENTS = 1 << 32
# Ranks are counted so many at a time, perhaps beyond the last.
TENSOR_CORES_RANKS = 16
# Sums of mantissas for each exponent of float32, then what was refused: 64 bits each.
_EXPONENTS = 254


def _aligned(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor contiguous, at an address where a kernel's vectors may start; else a copy."""
    if tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % alignment == 0:
        return tensor
    tensor = tensor.detach().resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % alignment else tensor


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def quantize(
    weight: Tensor, block_size: int, double_quant: bool, launcher: Launcher = kernels.launch
) -> tuple[Tensor, ...]:
    """codes, absmax, nested_absmax, nested_offset; the last two are empty without double_quant.

    Raises QloraError for NaN and infinite weights, for which it waits for the device. While a CUDA
    graph is captured nothing can be waited for: there, such weights decode to NaN.
    """
    count, blocks = weight.numel(), -(-weight.numel() // block_size)
    if blocks >= 1 << 32:
        raise QloraError(
            f"a weight of {count} elements has {blocks} blocks of {block_size}; a GPU quantizes at "
            "most 2^32 - 1 at a time, so split it by rows"
        )
    weight = _aligned(weight, 16)
    codes = weight.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.float32)
    workspace = weight.new_zeros(_EXPONENTS + 2, dtype=torch.int64)
    sums, refused = workspace.split((_EXPONENTS, 2))
    if count:
        launch = kernels.quantize_nf4(count, weight.dtype, block_size, double_quant)
        launcher(launch, weight, count, codes, absmax, refused, sums)
    nested = (absmax.new_empty(0), absmax.new_empty(0))
    if double_quant:
        single, absmax = absmax, absmax.new_empty(blocks, dtype=torch.uint8)
        nested = (single.new_empty(-(-blocks // NESTED_BLOCK)), single.new_zeros(()))
        if count:
            launcher(
                kernels.double_quantize(blocks), single, blocks, refused, sums, absmax, *nested
            )
    if count and not _is_capturing(weight):
        bad, distance_of_first = refused.tolist()
        if bad:
            rows, columns = weight.shape
            _rust.refuse_non_finite(bad, rows, columns, count - distance_of_first)
    return codes, absmax, *nested


def _ready(packed: Packed) -> Packed:
    """The parts as kernels take them, once for all launches of a product.

    Parts that do not fit together are refused: kernels trust the sizes.
    """
    check(packed)
    parts = [None if part is None else _aligned(part, 4) for part in packed[:5]]
    return Packed._make([*parts, *packed[5:]])


def check(packed: Packed) -> None:
    """Refuse parts that do not fit together."""
    count = packed.out_features * packed.in_features
    blocks = -(-count // packed.block_size)
    nested = packed.nested_absmax is not None
    parts: list[tuple[str, Tensor | None, torch.dtype, int]] = [
        ("codes", packed.codes, torch.uint8, (count + 1) // 2),
        ("absmax", packed.absmax, torch.uint8 if nested else torch.float32, blocks),
    ]
    if nested:
        groups = -(-blocks // NESTED_BLOCK)
        parts += [
            ("nested_absmax", packed.nested_absmax, torch.float32, groups),
            ("nested_offset", packed.nested_offset, torch.float32, 1),
            ("nested_map", packed.nested_map, torch.float32, 256),
        ]
    for name, part, dtype, length in parts:
        if part is None or (part.dtype, part.numel()) != (dtype, length):
            found = "None" if part is None else f"{part.numel()} of {part.dtype}"
            raise QloraError(
                f"{name} of a {packed.out_features} x {packed.in_features} weight in blocks of "
                f"{packed.block_size} must hold {length} elements of {dtype}, got {found}"
            )
        if part.device != packed.codes.device:
            raise QloraError(
                f"{name} is on {part.device} but codes are on {packed.codes.device}; move one of "
                "them"
            )


def dequantize_rows(
    packed: Packed, start: int, end: int, dtype: torch.dtype, launcher: Launcher = kernels.launch
) -> Tensor:
    """W[start:end] as a dense tensor, from parts that are `_ready`.

    Row `start` must begin at a block's start (`row_step`).
    """
    columns = packed.in_features
    # float64 serves gradient checks: the weight's value is the float32 one, exactly.
    stored = torch.float32 if dtype == torch.float64 else dtype
    out = packed.codes.new_empty((end - start, columns), dtype=stored)
    if out.numel():
        nested = packed.nested_absmax is not None
        launcher(
            kernels.dequantize_nf4(out.numel(), stored, packed.block_size, nested),
            *packed[:5],
            start * columns,
            out.numel(),
            out,
        )
    return out.to(dtype)


def row_step(packed: Packed) -> int:
    """Every so many rows, a row begins at a block's start."""
    return packed.block_size // math.gcd(packed.block_size, packed.in_features)


def chunk_rows(packed: Packed, dtype: torch.dtype) -> int:
    """How many rows of W a product decodes at a time; all chunks but the last have them."""
    # A float64 chunk stands beside the float32 one that it is made of.
    row_bytes = max(packed.in_features, 1) * (12 if dtype == torch.float64 else dtype.itemsize)
    total = packed.out_features * row_bytes
    chunks = max(-(-total // CHUNK_BYTES), 2 if total > WHOLE_BYTES else 1)
    step = math.lcm(row_step(packed), CHUNK_ROWS)
    even = -(-packed.out_features // (chunks * step)) * step
    most = CHUNK_BYTES // row_bytes // step * step
    return max(min(even, most), step)


def dequantize(packed: Packed, dtype: torch.dtype, launcher: Launcher = kernels.launch) -> Tensor:
    """The dense matrix [out, in]."""
    packed = _ready(packed)
    return dequantize_rows(packed, 0, packed.out_features, dtype, launcher)


def _chunks(
    packed: Packed, dtype: torch.dtype, launcher: Launcher
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of output features and their rows of W, decoded; let go of one before the next."""
    rows = chunk_rows(packed, dtype)
    for start in range(0, packed.out_features, rows):
        end = min(start + rows, packed.out_features)
        yield slice(start, end), dequantize_rows(packed, start, end, dtype, launcher)


def _in_registers(x: Tensor, packed: Packed, rank: int = 0) -> Launch | None:
    """The launch of the whole product x Wᵀ with an adapter of this rank, if a kernel suits it."""
    (rows, columns), features = x.shape, packed.out_features
    if min(rows, columns, features) == 0 or columns % packed.block_size:
        return None
    nested = packed.nested_absmax is not None
    sizes = (rows, features, x.dtype, packed.block_size, nested)
    fewest, most = TENSOR_CORES_ROWS
    if (
        fewest <= rows <= most
        and x.dtype.itemsize == 2
        and packed.block_size % kernels.TENSOR_CORES_COLUMNS == 0
        and max(rows, features) * max(columns, rank + TENSOR_CORES_RANKS) < MOST_ELEMENTS
    ):
        return kernels.tensor_cores_nf4(*sizes)
    if (
        rows <= FEW_ROWS
        and x.dtype != torch.float64
        and features < MOST_FEATURES
        and columns < MOST_COLUMNS
    ):
        return kernels.few_rows_nf4(*sizes)
    return None


def _one_launch(
    launch: Launch,
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    launcher: Launcher,
    hidden: Tensor | None = None,
    lora_b: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + hidden lora_bᵀ + bias by a kernel that decodes in registers; `_ready` parts."""
    (rows, columns), features = x.shape, packed.out_features
    y = x.new_empty((rows, features))
    on_tensor_cores = launch.kernel == "tensor_cores_nf4"
    launcher(
        launch,
        _aligned(packed.codes, 8) if on_tensor_cores else packed.codes,
        *packed[1:5],
        _aligned(x, 16),
        rows,
        features,
        columns,
        bias,
        hidden,
        lora_b,
        0 if hidden is None else hidden.shape[1],
        y,
    )
    return y


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None, launcher: Launcher = kernels.launch
) -> Tensor:
    """y [rows, out] = x [rows, in] Wᵀ + bias."""
    packed = _ready(packed)
    launch = _in_registers(x, packed)
    if launch is not None:
        return _one_launch(launch, x, packed, bias, launcher)
    y = x.new_empty((x.shape[0], packed.out_features))
    for features, weight in _chunks(packed, x.dtype, launcher):
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, features])
        else:
            torch.addmm(bias[features], x, weight.t(), out=y[:, features])
        del weight  # before the next chunk is decoded
    return y


def linear_backward(grad: Tensor, packed: Packed, launcher: Launcher = kernels.launch) -> Tensor:
    """dX [rows, in] = dY [rows, out] W."""
    packed = _ready(packed)
    make = grad.new_empty if packed.out_features else grad.new_zeros
    grad_x = make((grad.shape[0], packed.in_features))
    for features, weight in _chunks(packed, grad.dtype, launcher):
        if features.start:
            grad_x.addmm_(grad[:, features], weight)
        else:
            torch.mm(grad[:, features], weight, out=grad_x)
        del weight
    return grad_x


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right in their own dtype: autocast would choose another one than the caller did."""
    out = left.new_empty((left.shape[0], right.shape[1]))
    return torch.mm(left, right, out=out)


def lora_linear(
    x: Tensor,
    packed: Packed,
    low_rank: LowRank,
    bias: Tensor | None,
    launcher: Launcher = kernels.launch,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + hidden Bᵀ + bias and hidden = scaling x Aᵀ."""
    lora_a, lora_b = (matrix.to(x.dtype) for matrix in low_rank[:2])
    launch = _in_registers(x, packed, lora_a.shape[0])
    if launch is not None:
        hidden = _product(x, lora_a.t()).mul_(low_rank.scaling)
        factors = (hidden, plain(lora_b))
        return _one_launch(launch, x, _ready(packed), bias, launcher, *factors), hidden
    y = linear(x, packed, bias, launcher)
    hidden = _product(x, lora_a.t()).mul_(low_rank.scaling)
    return y.addmm_(hidden, lora_b.t()), hidden


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    packed: Packed,
    low_rank: LowRank,
    needs_x: bool,
    launcher: Launcher = kernels.launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = dY W + g A with g = scaling dY B; dA = gᵀ x; dB = dYᵀ hidden.

    Without `needs_x`, dX is empty. dA and dB come in the factors' own dtypes.
    """
    lora_a, lora_b, scaling = low_rank
    # First what this file launches: torch warns where its autograd thread begins with cuBLAS.
    grad_x = linear_backward(grad, packed, launcher) if needs_x else grad.new_empty(0)
    grad_hidden = _product(grad, lora_b.to(grad.dtype)).mul_(scaling)
    if needs_x:
        grad_x.addmm_(grad_hidden, lora_a.to(grad.dtype))
    grad_a = _product(grad_hidden.t(), x).to(lora_a.dtype)
    return grad_x, grad_a, _product(grad.t(), hidden).to(lora_b.dtype)
