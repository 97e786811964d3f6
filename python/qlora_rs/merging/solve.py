"""One layer: the weights wanted, and what is known of its inputs → NF4 codes and scales.

The solver is Rust (`rust/merge.rs`); here are its arguments, the choice of method and the measure
of what came out. Read next: `statistics.py`, which collects H for whole models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qlora_rs import _rust
from qlora_rs.cpu import Packed
from qlora_rs.errors import QloraError
from qlora_rs.merging.report import LayerReport
from qlora_rs.ops import check_lora
from qlora_rs.quantize import PackedWeight, quantize

METHODS = ("nearest", "calibrated", "distilled")
# Of the solver's settings: layers that another revision finished are not mixed with new ones.
REVISION = 7
DAMPING = 3e-4  # of the mean diagonal of H
SWEEPS = 8
TOLERANCE = 1e-3
ANNEAL = 20
FEWEST_SWEEPS, MOST_SWEEPS = 10, 28  # of annealing, where the number of tokens is known
OUTPUT_DAMPING = 0.01  # of the mean diagonal of F


@dataclass(frozen=True)
class MergeResult:
    """packed: the merged weight. report: what it cost. residual: with `hybrid_rank`, (A, B) of the
    small adapter, scaling 1, that belongs beside it."""

    packed: PackedWeight
    report: LayerReport
    residual: tuple[Tensor, Tensor] | None = None


def merge(
    packed: PackedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    method: str = "calibrated",
    inputs: Tensor | None = None,
    hybrid_rank: int = 0,
) -> MergeResult:
    """Merge an adapter into a 4-bit weight, which stays 4-bit.

    lora_a: [r, in]; lora_b: [out, r]; scaling: alpha / r. inputs: activations [..., in] that reach
    the layer, some hundred rows at least; needed by "calibrated". method: "nearest" rounds
    W + scaling B A as peft does and returns its bytes; "calibrated" keeps the outputs for `inputs`
    (GPTQ, arXiv 2210.17323, coordinate descent, annealing; `rust/merge.rs`), with the least error
    of this layer by itself (`merge_model` gives some of that up for the whole model). hybrid_rank:
    keep so many directions of the update, the strongest ones, as an adapter and merge the rest.
    Nothing given is modified. The report measures on `inputs` themselves; `merge_model` does so on
    text that was set aside. Memory: about 5 in x in and 3 out x in floats.
    Raises QloraError when shapes do not fit, values are not finite or inputs are missing.

    >>> packed = quantize(torch.randn(64, 64))
    >>> a, b = torch.randn(4, 64), torch.randn(64, 4) * 0.01
    >>> inputs = torch.randn(512, 64) * torch.rand(64)
    >>> result = merge(packed, a, b, 1.0, inputs=inputs)
    >>> result.report.ratio_to_nearest < 1.0
    True
    """
    if method not in ("nearest", "calibrated"):
        raise QloraError(
            f'method must be "nearest" or "calibrated" for one layer, got {method!r} '
            '("distilled" needs the whole model: merge_model)'
        )
    check_lora(lora_a, lora_b, Packed(*packed.arguments()))
    for name, matrix in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not torch.isfinite(matrix).all():
            raise QloraError(f"{name} holds NaN or infinite values; the adapter is damaged")
    second_moment = None if inputs is None else input_moment(inputs, packed.shape[1])
    if method == "calibrated" and second_moment is None:
        raise QloraError(
            'method "calibrated" needs inputs, activations [tokens, in] that reach this layer; '
            'without any, only "nearest" is possible, and it loses most of a small update'
        )
    a, b = lora_a.detach().float(), lora_b.detach().float() * scaling
    residual = None
    if hybrid_rank:
        residual = strongest(b, a, hybrid_rank, second_moment)
    delta = (lora_b.detach().float() @ a) * scaling
    if residual is not None:
        delta = delta - residual[0] @ residual[1]
    nearest = round_to_nearest(packed, delta)
    result, target = nearest, packed.dequantize(torch.float32) + delta
    fallback = None
    if method == "calibrated":
        assert second_moment is not None
        fallback = why_nearest_only(packed)
        if fallback is None:
            curvature = Curvature.of(second_moment, packed.block_size)
            result = calibrate(target, nearest, curvature)
    report = measure("", target, delta, result, nearest, second_moment, fallback)
    return MergeResult(result, report, None if residual is None else (residual[1], residual[0]))


def input_moment(inputs: Tensor, columns: int) -> Tensor:
    """XᵀX / rows of activations [..., in], float32."""
    if inputs.shape[-1] != columns:
        raise QloraError(f"inputs must be [..., {columns}], got {list(inputs.shape)}")
    rows = inputs.detach().reshape(-1, columns)
    if rows.shape[0] == 0:
        raise QloraError("inputs hold no rows; give activations [tokens, in]")
    if not torch.isfinite(rows).all():
        raise QloraError("inputs hold NaN or infinite values; calibrate on a model that computes")
    total = torch.zeros(columns, columns)
    add_moment(total, rows)
    return full_moment(total) / rows.shape[0]


def add_moment(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of rowsᵀ rows, summed in float32, to total [in, in]."""
    rows = rows.float() if rows.dtype == torch.float64 else rows
    _rust.merge_moment(
        to_dlpack(rows.contiguous()), total.shape[0], to_dlpack(total), torch.get_num_threads()
    )


def full_moment(total: Tensor) -> Tensor:
    """The symmetric matrix of which `total` holds the lower triangle."""
    return total.tril() + total.tril(-1).t()


def round_to_nearest(packed: PackedWeight, delta: Tensor) -> PackedWeight:
    """peft's merge: W in the base's dtype, plus the update, quantized anew."""
    wanted = packed.dequantize() + delta
    return quantize_like(packed, wanted)


def quantize_like(packed: PackedWeight, wanted: Tensor) -> PackedWeight:
    """Quantize as `packed` is: block size, double quantization, and the dtype it decodes to."""
    new = quantize(wanted, packed.block_size, packed.double_quant)
    parts = (new.codes, new.absmax, new.nested_absmax, new.nested_offset, new.nested_map)
    return PackedWeight(*parts, packed.shape, packed.dtype, packed.block_size)


def why_nearest_only(packed: PackedWeight) -> str | None:
    """Why a weight cannot be calibrated; None when it can."""
    if packed.shape[1] % packed.block_size == 0:
        return None
    return (
        f"{packed.shape[1]} inputs are no multiple of the block size {packed.block_size}: blocks "
        "span rows, so this layer was rounded to nearest"
    )


@dataclass(frozen=True)
class Curvature:
    """H of a layer's inputs, damped, ordered, factorized: what layers with these inputs share."""

    order: Tensor
    hessian: Tensor
    factor: Tensor
    columns: int
    block_size: int
    damping: float

    @staticmethod
    def of(second_moment: Tensor, block_size: int, damping: float = DAMPING) -> Curvature:
        """Prepare H [in, in]. Memory: 2 in² floats kept, 2 in² more (as float64) meanwhile.

        Raises QloraError when H is not finite or, whatever is added to its diagonal, not positive.
        """
        columns = second_moment.shape[0]
        order = torch.empty(columns, dtype=torch.int64)
        hessian = torch.empty(columns * columns)
        factor = torch.empty(_rust.merge_factor_length(columns, block_size))
        added = _rust.merge_curvature(
            to_dlpack(second_moment.contiguous()),
            columns,
            block_size,
            damping,
            to_dlpack(order),
            to_dlpack(hessian),
            to_dlpack(factor),
            torch.get_num_threads(),
        )
        return Curvature(order, hessian, factor, columns, block_size, added)

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return self.order.nbytes + self.hessian.nbytes + self.factor.nbytes


@dataclass(frozen=True)
class Coupling:
    """How the errors of rows `first`, `first + 1`, ... add up: F [rows, rows] (`coupling.py`)."""

    first: int
    moment: Tensor

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.moment.shape[0]


def anneal_sweeps(tokens: int, columns: int) -> int:
    """As many sweeps as there are tokens per input: what is known of H pays for no more.

    >>> anneal_sweeps(tokens=12_000, columns=576)
    20
    """
    return min(max(tokens // columns, FEWEST_SWEEPS), MOST_SWEEPS)


def calibrate(
    target: Tensor,
    nearest: PackedWeight,
    curvature: Curvature,
    given: int = SWEEPS,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    anneal: int = ANNEAL,
    couplings: list[Coupling] | None = None,
    feedback: bool = True,
) -> PackedWeight:
    """Codes and scales for `target` [out, in], never worse than `nearest` in any row of
    tr(E H Eᵀ), E = target - result and H the damped one.

    given, sweeps: passes of descent, at most, from `nearest`, which may be any solution on the
    grid, and from later ones. feedback: start from error feedback (GPTQ) too. couplings: F of all
    rows, piece by piece; then rows make up for each other's errors, which is better in
    tr(F E H Eᵀ) and may be worse in some row.
    """
    codes, absmax = torch.empty_like(nearest.codes), torch.empty_like(nearest.absmax)
    pieces: list[Coupling | None] = [*couplings] if couplings else [None]
    for piece in pieces:
        coupling = None
        if piece is not None:
            coupling = (piece.first, piece.rows, to_dlpack(piece.moment), OUTPUT_DAMPING)
        _rust.merge_calibrate(
            to_dlpack(target.contiguous()),
            Packed(*nearest.arguments()).capsules(),
            (nearest.shape[0], nearest.shape[1]),
            nearest.block_size,
            (to_dlpack(curvature.order), to_dlpack(curvature.hessian), to_dlpack(curvature.factor)),
            given,
            sweeps,
            tolerance,
            feedback,
            anneal,
            to_dlpack(codes),
            to_dlpack(absmax),
            coupling,
            torch.get_num_threads(),
        )
    nested = (nearest.nested_absmax, nearest.nested_offset, nearest.nested_map)
    return PackedWeight(codes, absmax, *nested, nearest.shape, nearest.dtype, nearest.block_size)


def strongest(
    lora_b: Tensor, lora_a: Tensor, rank: int, second_moment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of rank `rank`, as (B', A'), for inputs of second moment H.

    With A H Aᵀ = C Cᵀ, B C has the singular values of B A H^½; projecting B A on its first left
    singular vectors is the truncation with the least error of the outputs.
    """
    if not 0 < rank <= lora_a.shape[0]:
        raise QloraError(f"hybrid_rank must be between 1 and r={lora_a.shape[0]}, got {rank}")
    wide = lora_a.double()
    gram = wide @ (wide.t() if second_moment is None else second_moment.double() @ wide.t())
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()
    left = torch.linalg.svd(lora_b.double() @ root, full_matrices=False).U[:, :rank]
    return left.float(), ((left.t() @ lora_b.double()) @ wide).float()


def energy(error: Tensor, second_moment: Tensor | None) -> float:
    """tr(E H Eᵀ) = ||X Eᵀ||² per token; without H, ||E||²."""
    if second_moment is None:
        return float(error.double().square().sum())
    return float(((error @ second_moment) * error).sum(dtype=torch.float64))


def measure(
    name: str,
    target: Tensor,
    delta: Tensor,
    result: PackedWeight,
    nearest: PackedWeight,
    second_moment: Tensor | None,
    fallback: str | None = None,
) -> LayerReport:
    """Compare a result with the target, with plain rounding and with dropping the update."""
    wanted = energy(target, second_moment)
    own = energy(delta, second_moment)
    error = energy(target - result.dequantize(torch.float32), second_moment)
    plain = energy(target - nearest.dequantize(torch.float32), second_moment)

    def root_ratio(a: float, b: float) -> float:
        return (max(a, 0.0) / b) ** 0.5 if b > 0.0 else 0.0

    return LayerReport(
        name=name,
        shape=(target.shape[0], target.shape[1]),
        error_to_output=root_ratio(error, wanted),
        error_to_update=root_ratio(error, own),
        nearest_to_update=root_ratio(plain, own),
        ratio_to_nearest=root_ratio(error, plain) if plain > 0.0 else 1.0,
        fallback=fallback,
    )
