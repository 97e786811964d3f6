"""Train the block scales of a merged model towards the unmerged model's logits; codes stay.

Every scale is multiplied by 1 + g, g = 0 at first. Adam on KL(unmerged ‖ merged) of the
calibration text; at the end each scale takes the nearest value that the format can hold, which is
exact to about half a percent of a scale's spread. A layer's gradient is
Σ over the block of (dYᵀ X) * level: one layer's dYᵀ X exists at a time.

Some of the text is not trained on. It decides whether all, half or nothing of what was learned is
kept: where calibration leaves little to learn, training on little text can do harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_rs.layers import NF4Linear, QLoRALinear
from qlora_rs.merging.evaluate import CHUNK, compare, logits_of, replaced, scored
from qlora_rs.merging.statistics import Batch
from qlora_rs.quantize import PackedWeight

STEPS = 24
LEARNING_RATE = 1e-3
# One batch of so many is not trained on.
ASIDE = 24
# How much of what was learned may be kept.
SHARES = (0.0, 0.5, 1.0)
# Every so many steps what was learned is stored, where there is a store.
KEEP_EVERY = 4
_STORED = "distillation"
_STATE = ("step", "exp_avg", "exp_avg_sq")  # of Adam


class Store(Protocol):
    """Where named tensors survive an interruption (`recipes/merge_store.py`)."""

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved, if it is there and whole."""

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep these tensors; all of them or, if interrupted, what was kept before."""


class _ScaledLinear(torch.autograd.Function):
    """y = x Wᵀ + b, W = level * absmax per block; gradients for x and absmax [blocks]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, absmax: Tensor, codes: Tensor, sizes: tuple, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, absmax, codes)
        ctx.sizes = sizes
        packed = (codes, absmax, None, None, None, *sizes)
        return torch.ops.qlora_rs.linear(x, *packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, absmax, codes = ctx.saved_tensors
        rows, columns, block_size = ctx.sizes
        grad_x = None
        if ctx.needs_input_grad[0]:
            packed = (codes, absmax, None, None, None, *ctx.sizes)
            grad_x = torch.ops.qlora_rs.linear_backward(grad, *packed)
        flat = grad.reshape(-1, rows).t() @ x.reshape(-1, columns)
        levels = torch.ops.qlora_rs.dequantize(
            codes, torch.ones_like(absmax), None, None, None, *ctx.sizes, grad.dtype
        )
        grad_absmax = (flat * levels).view(-1, block_size).sum(1, dtype=torch.float32)
        return grad_x, grad_absmax, None, None, None


class ScaledNF4Linear(nn.Module):
    """A merged layer whose scales are trained."""

    def __init__(self, layer: NF4Linear) -> None:
        super().__init__()
        self.layer = layer
        self.packed = layer.packed
        self.start = single_absmax(self.packed)
        self.g = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        inputs, bias = self.layer.inputs(x)
        sizes = (*self.packed.shape, self.packed.block_size)
        absmax = self.start * (1.0 + self.g)
        y = _ScaledLinear.apply(inputs, absmax, self.packed.codes, sizes, bias)
        if isinstance(self.layer, QLoRALinear):  # what stays beside a hybrid merge
            hidden = inputs @ self.layer.lora_A.detach().to(inputs.dtype).t()
            y = y + hidden @ self.layer.lora_B.detach().to(y.dtype).t() * self.layer.scaling
        return y.to(x.dtype)

    def replacement(self, packed: PackedWeight) -> NF4Linear:
        """The layer with another weight."""
        layer = NF4Linear(packed, self.layer.bias, self.layer.compute_dtype)
        if isinstance(self.layer, QLoRALinear):
            layer = QLoRALinear(layer, self.layer.r, self.layer.alpha)
            layer.load_state_dict({**layer.state_dict(), **self._residual()})
        return layer.requires_grad_(False)

    def _residual(self) -> dict[str, Tensor]:
        return {name: getattr(self.layer, name).detach() for name in ("lora_A", "lora_B")}

    def finished(self, share: float = 1.0) -> PackedWeight:
        """The weight with a share of what was learned, each scale at its grid's nearest value."""
        if share == 0.0:
            return self.packed
        return with_scales(self.packed, self.start * (1.0 + share * self.g.detach()))


def single_absmax(packed: PackedWeight) -> Tensor:
    """The decoded scales, float32 [blocks]."""
    if packed.nested_absmax is None:
        return packed.absmax.clone()
    assert packed.nested_map is not None
    assert packed.nested_offset is not None
    groups = packed.nested_absmax.repeat_interleave(256)[: packed.absmax.numel()]
    return packed.nested_map[packed.absmax.long()] * groups + packed.nested_offset


def with_scales(packed: PackedWeight, scales: Tensor) -> PackedWeight:
    """The same codes with other scales: nested ones take the nearest code of their group's grid."""
    nested = (packed.nested_absmax, packed.nested_offset, packed.nested_map)
    if packed.nested_absmax is None:
        absmax = scales.contiguous()
    else:
        assert packed.nested_map is not None
        assert packed.nested_offset is not None
        groups = packed.nested_absmax.repeat_interleave(256)[: scales.numel()]
        wanted = torch.where(groups > 0, (scales - packed.nested_offset) / groups, 0.0)
        middles = (packed.nested_map[1:] + packed.nested_map[:-1]) / 2
        absmax = torch.bucketize(wanted, middles).to(torch.uint8)
    parts = (packed.codes, absmax, *nested)
    return PackedWeight(*parts, packed.shape, packed.dtype, packed.block_size)


def distill(
    model: nn.Module,
    merged: dict[str, NF4Linear],
    batches: list[Batch],
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    tokens_per_step: int = 512,
    progress: Callable[[int, int, float], None] | None = None,
    store: Store | None = None,
) -> dict[str, PackedWeight]:
    """Train the scales of `merged` so that the model with them answers as `model` does.

    model: the unmerged one; it is not changed. merged: the layers that take the place of its
    adapted ones. progress: called as (step, steps, KL). store: goes on, with the same result, where
    an earlier call with the same arguments was interrupted. Memory: the activations of one batch,
    two logits, and 20 bytes per block (0.3 per weight); 24 more while they are stored.
    """
    students = {name: ScaledNF4Linear(layer) for name, layer in merged.items()}
    optimizer = torch.optim.Adam([s.g for s in students.values()], betas=(0.9, 0.95))
    plan = torch.tensor([steps, learning_rate], dtype=torch.float64)
    done = 0 if store is None else _resume(store, students, optimizer, plan)
    frozen = [p for p in model.parameters() if p.requires_grad]
    aside = batches[ASIDE - 1 :: ASIDE]
    trained = [batch for i, batch in enumerate(batches) if i % ASIDE != ASIDE - 1]
    order = _order(trained, steps, tokens_per_step)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for step, chosen in enumerate(order):
            if step < done:
                continue
            optimizer.param_groups[0]["lr"] = learning_rate * _cosine(step / steps)
            total, positions = 0.0, sum(int(scored(batch)[0].sum()) for batch in chosen)
            for batch in chosen:
                total += _backward(model, students, batch, max(positions, 1))
            optimizer.step()
            optimizer.zero_grad()
            if store is not None and (step + 1) % KEEP_EVERY == 0:
                _keep(store, students, optimizer, plan, step + 1)
            if progress is not None:
                progress(step + 1, steps, total)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return _best(model, students, aside)


def _cosine(share: float) -> float:
    """The learning rate after a share of the steps, from one down to zero."""
    return 0.5 * (1 + math.cos(math.pi * share))


def _keep(
    store: Store,
    students: dict[str, ScaledNF4Linear],
    optimizer: torch.optim.Adam,
    plan: Tensor,
    done: int,
) -> None:
    tensors = {"plan": plan, "done": torch.tensor(done)}
    for name, student in students.items():
        # An expert that no token reached so far has no state.
        state = optimizer.state.get(student.g)
        if state:
            tensors[f"{name}.g"] = student.g.detach()
            tensors |= {f"{name}.{part}": state[part] for part in _STATE}
    store.save(_STORED, tensors)


def _resume(
    store: Store,
    students: dict[str, ScaledNF4Linear],
    optimizer: torch.optim.Adam,
    plan: Tensor,
) -> int:
    """Take back what `_keep` stored, if it belongs to these layers and steps; the steps done."""
    tensors = store.load(_STORED)
    if tensors is None or not torch.equal(tensors.get("plan", torch.empty(0)), plan):
        return 0
    for name, student in students.items():
        found = tensors.get(f"{name}.g", student.g)
        if found.shape != student.g.shape:
            return 0
    for name, student in students.items():
        if f"{name}.g" in tensors:
            student.g.data.copy_(tensors.pop(f"{name}.g"))
            state = {part: tensors.pop(f"{name}.{part}") for part in _STATE}
            optimizer.state[student.g] = state
    return int(tensors["done"])


def _best(
    model: nn.Module, students: dict[str, ScaledNF4Linear], aside: list[Batch]
) -> dict[str, PackedWeight]:
    """The weights with that share of what was learned that answers best on other text."""
    ends = {
        share: {name: student.finished(share) for name, student in students.items()}
        for share in SHARES
    }
    variants: dict[str, dict[str, nn.Module]] = {
        str(share): {name: students[name].replacement(packed) for name, packed in end.items()}
        for share, end in ends.items()
    }
    _, scores, _ = compare(model, variants, aside)
    if not scores:  # too little text to set any aside
        return ends[1.0]
    return ends[float(min(scores, key=lambda share: scores[share].kl))]


def _order(batches: list[Batch], steps: int, tokens_per_step: int) -> list[list[Batch]]:
    """The batches of each step: shuffled passes over all, each step of so many tokens or more."""
    generator = torch.Generator().manual_seed(0)
    queue: list[int] = []
    chosen: list[list[Batch]] = []
    for _ in range(steps):
        step: list[Batch] = []
        while sum(batch["input_ids"].numel() for batch in step) < tokens_per_step:
            if not queue:
                queue = torch.randperm(len(batches), generator=generator).tolist()
            step.append(batches[queue.pop()])
        chosen.append(step)
    return chosen


def _backward(
    model: nn.Module, students: dict[str, ScaledNF4Linear], batch: Batch, positions: int
) -> float:
    """Add this batch's gradients; return its share of the step's KL."""
    mask, _ = scored(batch)
    if not mask.any():
        return 0.0
    with torch.no_grad():
        theirs = logits_of(model, batch)[:, :-1][mask]
    with replaced(model, dict(students)), torch.enable_grad():
        ours = logits_of(model, batch)[:, :-1][mask]
    # KL(p ‖ q) over logits of q has the gradient q - p: written down, not recorded.
    gradient = torch.empty_like(ours)
    total = 0.0
    parts = zip(theirs.split(CHUNK), ours.detach().split(CHUNK), gradient.split(CHUNK), strict=True)
    for expected, found, out in parts:
        log_p, log_q = expected.float().log_softmax(-1), found.float().log_softmax(-1)
        p = log_p.exp()
        total += float(log_p.sub_(log_q).mul_(p).sum(-1).double().sum())
        out.copy_(log_q.exp_().sub_(p).div_(positions))
    ours.backward(gradient)
    return total / positions
