"""Statistics of some tokens → what is to be expected of the text to come.

The solver may choose every code, so it would fit its errors to whatever noise H has. Both functions
take some of that away; which one serves what is in `importance.py` and `coupling.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE, MOST_SHRINKAGE = 2.0, 0.5
# Of eigenvalues far above BEND, how much is kept; what is added to all, as a share of inputs per
# token. Chosen by the layers' errors on text that was set aside (`benches/merge_tasks.py`, manual).
KEPT, BEND, RAISED = 0.6, 10.0, 0.6


def shrink(second_moment: Tensor, tokens: int) -> Tensor:
    """H estimated from `tokens` rows, drawn towards its diagonal, in place.

    Of n rows, sample correlations of K inputs carry K / n of noise. Drawing the off-diagonal
    towards zero by twice that share (at most by half) is a shrinkage estimator in the manner of
    Ledoit and Wolf (2004): more error on the calibration text, less on other text. For statistics
    of few tokens.

    >>> shrink(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), tokens=40)
    tensor([[2.0000, 0.9000],
            [0.9000, 2.0000]])
    """
    columns = second_moment.shape[0]
    share = min(MOST_SHRINKAGE, SHRINKAGE * columns / max(tokens, 1))
    diagonal = second_moment.diagonal().clone()
    second_moment.mul_(1.0 - share).diagonal().copy_(diagonal)
    return second_moment


def draw_in(second_moment: Tensor, tokens: int) -> Tensor:
    """H estimated from `tokens` rows, its correlations' eigenvalues c drawn towards each other.

    Eigenvalues of a sample spread further than those of the text that it is taken from, and
    nonlinear shrinkage (Ledoit and Wolf, 2020) moves each by its own share. Here

        c → KEPT c + (1 - KEPT) BEND c / (c + BEND) + RAISED in / tokens,

    which is near c^0.9 and needs one inverse instead of a decomposition: the largest give way, the
    smallest, along which a solver would hide its errors, count for more. Columns that are always
    zero stay so. Memory: two more matrices of H's size meanwhile.

    >>> draw_in(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), tokens=40)
    tensor([[1.9722, 0.9313],
            [0.9313, 1.9722]])
    """
    scale = second_moment.diagonal().sqrt()
    unit = torch.where(scale > 0.0, scale, 1.0)
    drawn = second_moment / unit / unit.unsqueeze(1)
    bent = drawn.clone()
    bent.diagonal().add_(BEND)
    torch.linalg.cholesky(bent, out=bent)
    inverse = torch.cholesky_inverse(bent)
    del bent
    # (1 - KEPT) BEND C (C + BEND)⁻¹ = (1 - KEPT) BEND (1 - BEND (C + BEND)⁻¹)
    drawn.mul_(KEPT).sub_(inverse, alpha=(1.0 - KEPT) * BEND**2)
    raised = RAISED * second_moment.shape[0] / max(tokens, 1)
    drawn.diagonal().add_((1.0 - KEPT) * BEND + raised)
    return drawn.mul_(scale).mul_(scale.unsqueeze(1))
