"""How the errors of a layer's outputs add up: rows that are chosen with regard to each other.

To second order, an error E of a layer's weights changes the model's answer by tr(F E H Eᵀ) / 2,
with H = E[x xᵀ] of its inputs and F = E[g gᵀ] of the gradients of log p(y) at its outputs, y drawn
from the model's prediction (the Kronecker factors of the Fisher information: Martens and Grosse,
2015, arXiv 1503.05671; for rounding: Tseng et al., 2025, arXiv 2505.22988). By itself the solver
takes F = 1, each row for itself. With F, rows make up for each other (`rust/merge/coupling.rs`).

That lowers the error of the model's answers and raises each layer's own, which is for `distilled`;
`calibrated` answers for its layers one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_rs.merging.shrinkage import shrink
from qlora_rs.merging.solve import Coupling
from qlora_rs.merging.statistics import Gram

# Rows of one F, at most, a multiple of the solver's 48: wider layers have several, which bounds the
# memory by 8 KB per row.
PIECE = 2016


class OutputMoment:
    """Σ g gᵀ over tokens of a layer's output gradients, float32, in pieces of `PIECE` rows.

    >>> moment = OutputMoment(64)
    >>> moment.add(torch.randn(2, 100, 64))
    >>> moment.tokens
    200
    """

    def __init__(self, rows: int) -> None:
        self.starts = range(0, rows, PIECE)
        self.rows = rows
        self.pieces: list[Gram] = []
        self.tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the sums, once there are some (and some 1 KB per row of what waits)."""
        return sum(4 * min(PIECE, self.rows - start) ** 2 for start in self.starts)

    def add(self, gradients: Tensor) -> None:
        """Count gradients [..., rows]; tokens without any (padding) are left out."""
        gradients = gradients.detach().reshape(-1, self.rows)
        gradients = gradients[gradients.any(-1)].float()
        self.tokens += gradients.shape[0]
        self.pieces = self.pieces or [Gram(min(PIECE, self.rows - s)) for s in self.starts]
        for start, piece in zip(self.starts, self.pieces, strict=True):
            piece.add(gradients[:, start : start + PIECE])

    def couplings(self) -> list[Coupling]:
        """F of each piece, of mean diagonal one, drawn towards it (`shrinkage.shrink`); none where
        no gradient came or one was not finite."""
        found: list[Coupling] = []
        if not self.pieces:
            return found
        for start, piece in zip(self.starts, self.pieces, strict=True):
            moment = piece.sum()
            scale = float(moment.diagonal().mean())
            if not (scale > 0.0 and torch.isfinite(moment).all()):
                return []
            found.append(Coupling(start, shrink(moment.div_(scale), self.tokens)))
        return found
