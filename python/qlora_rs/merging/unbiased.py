"""What rounding takes from an update, given back before the weights are rounded.

The codes that err least in each layer's outputs keep part of an update and drop the rest, as a
ridge regression shrinks. Beside that, the errors of different layers are noise and mostly cancel;
what is missing of the update is missing in all layers in the same direction, and adds up. So the
weights are solved once, quickly; what is missing where the update acts,

    (T - Q) H Aᵀ (A H Aᵀ)⁻¹ A,        A [r, in] the adapter's, H = E[x xᵀ],

the projection of the error on A's rows in the metric H, is added to the target; and the weights are
solved again. (The residual that is added back is that of Osher et al., 2005, "An iterative
regularization method for total variation-based image restoration".) The layer's own error is a
little larger after that, the model's KL to the unmerged one much smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_rs.merging import solve
from qlora_rs.merging.solve import Coupling, Curvature, calibrate, energy
from qlora_rs.quantize import PackedWeight

# What `calibrated` gives back, at most, of the update's own effect: the model's answers want all
# that is missing, each layer's outputs none of it, and a layer that lacks much pays most.
RETURNED = 0.12
# Of the quick solution: it has lost what the final one would lose, nearly.
FIRST_SWEEPS = 4
# Passes of descent from it, before annealing leaves it anyway.
SECOND_SWEEPS = 2
# A layer whose error comes nearer to plain rounding's than this share is solved without.
MOST_RATIO = 0.85


class Projection:
    """On what an adapter reads: the rows of lora_a [r, in], in the metric H [in, in].

    >>> a, error = torch.randn(2, 8), torch.randn(4, 2)
    >>> torch.allclose(Projection(a, torch.eye(8)).part(error @ a), error @ a, atol=1e-4)
    True
    """

    def __init__(self, lora_a: Tensor, second_moment: Tensor) -> None:
        self.rows = lora_a.double()
        self.read = self.rows @ second_moment.double()
        self.gram = self.read @ self.rows.t()
        # Directions that no input shows have nothing to give back.
        self.inverse = torch.linalg.pinv(self.gram, rtol=1e-7, hermitian=True)

    def shares(self, matrix: Tensor) -> Tensor:
        """Of matrix [out, in], as shares [out, r] of the rows."""
        return (matrix.double() @ self.read.t()) @ self.inverse

    def size(self, shares: Tensor) -> float:
        """Its effect on the outputs, root mean square."""
        return max(float(((shares @ self.gram) * shares).sum()), 0.0) ** 0.5

    def part(self, matrix: Tensor, most: float = float("inf")) -> Tensor:
        """The projected matrix [out, in] itself, cut down to the size `most`."""
        shares = self.shares(matrix)
        size = self.size(shares)
        return ((shares if size <= most else shares * (most / size)) @ self.rows).float()


def calibrate_unbiased(
    target: Tensor,
    nearest: PackedWeight,
    curvature: Curvature,
    second_moment: Tensor,
    lora_a: Tensor | None,
    update: Tensor,
    returned: float,
    anneal: int = solve.ANNEAL,
    couplings: list[Coupling] | None = None,
) -> PackedWeight:
    """As `solve.calibrate`, with what the update lacks given back.

    lora_a: [r, in], all adapters' together; None (DoRA has no such factor) gives nothing back.
    update: [out, in], the part of target that is new. returned: how much is given back, at most, as
    a share of the update's own effect on the outputs (root mean square).
    Where the layer as a whole would come near the output error of `nearest`, or above it, it is
    solved without, and without regard for other rows.
    """
    wanted, start = target, nearest
    if lora_a is not None and returned > 0.0:
        first = calibrate(
            target,
            nearest,
            curvature,
            given=0,
            sweeps=FIRST_SWEEPS,
            anneal=0,
            couplings=couplings,
        )
        projection = Projection(lora_a, second_moment)
        own = projection.size(projection.shares(update))
        lost = projection.part(target - first.dequantize(torch.float32), returned * own)
        if torch.isfinite(lost).all() and lost.any():
            wanted, start = target + lost, first
    result = calibrate(
        wanted,
        start,
        curvature,
        given=solve.SWEEPS if start is nearest else SECOND_SWEEPS,
        anneal=anneal,
        couplings=couplings,
        feedback=start is nearest,
    )
    if wanted is target and not couplings:
        return result
    limit = MOST_RATIO**2 * energy(target - nearest.dequantize(torch.float32), second_moment)
    if energy(target - result.dequantize(torch.float32), second_moment) > limit:
        return calibrate(target, nearest, curvature, anneal=anneal)
    return result
