"""One pass of text through the unmerged model → H = XᵀX / tokens of each layer's inputs.

Layers that are given the same tensor (q, k and v; gate and up) share one H. Where the H of all
layers exceed the budget, the pass is repeated for as many layers at a time as fit: memory is
bounded by the budget plus the largest single H. Read next: `solve.py`, which uses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_rs.errors import QloraError
from qlora_rs.merging.adapted import AdaptedLayer
from qlora_rs.merging.solve import add_moment, full_moment

if TYPE_CHECKING:
    from qlora_rs.merging.coupling import OutputMoment

Batch = dict[str, Tensor]
# Rows of each input that wait to be summed.
WAITING = 256
# Some layers see a few tokens (often the first) whose square is 10⁵ times the others'. What is
# longer than so many of its batch's median tokens is summed apart: it is no noise.
LARGEST = 100.0


class _Enough(Exception):
    """Unwinds a forward pass whose rest nobody needs."""


class Gram:
    """Σ xᵀx over rows, float32 [in, in]; rows wait until a product is worth a pass over it."""

    def __init__(self, columns: int) -> None:
        self.total = torch.zeros(columns, columns)
        self.waiting: list[Tensor] = []
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Count rows [n, columns]; they are kept, not copied."""
        self.waiting.append(rows)
        self.count += rows.shape[0]
        if self.count >= WAITING:
            self.settle()

    def settle(self) -> None:
        """Sum what waits."""
        if self.waiting:
            add_moment(self.total, torch.cat(self.waiting))
        self.waiting, self.count = [], 0

    def sum(self) -> Tensor:
        """The whole symmetric sum."""
        self.settle()
        return full_moment(self.total)


@dataclass
class Moment:
    """H of one input and the layers that have it.

    total: Σ xᵀx so far. reached: whether the first batch came here. seen: the
    tensor that the pass in progress brought. weighted: see `importance.py`; it comes from
    weighted_tokens. parted: whether what a few tokens have `beyond` the rest is summed apart, in
    excess (to calibrate), or not. outputs: by layer, how the errors of its outputs add up
    (`coupling.py`), where it is wanted.
    """

    layers: list[AdaptedLayer]
    total: Gram | None = None
    tokens: int = 0
    reached: bool = True
    seen: Tensor | None = field(default=None, repr=False)
    weighted: Gram | None = field(default=None, repr=False)
    weighted_tokens: int = 0
    parted: bool = False
    excess: Gram | None = field(default=None, repr=False)
    outputs: dict[str, OutputMoment] = field(default_factory=dict, repr=False)

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self.layers[0].packed.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of what is summed."""
        sums = (self.total, self.weighted, self.excess)
        own = sum(gram.total.nbytes for gram in sums if gram is not None)
        return own + sum(moment.nbytes for moment in self.outputs.values())

    @property
    def most_bytes(self) -> int:
        """Bytes that it may come to: H, a weighted one and an excess, and what outputs take."""
        return 12 * self.columns**2 + sum(moment.nbytes for moment in self.outputs.values())

    def forget(self) -> None:
        """Drop everything that was summed."""
        self.total = self.weighted = self.excess = None
        self.outputs = {}

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Count the rows of x [..., in], but for those that mask [batch, length] leaves out."""
        rows = x.detach().reshape(-1, x.shape[-1])
        # A routed expert is given rows of its own choice, which no mask tells apart.
        if mask is not None and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1)]
        if self.total is None:
            self.total = Gram(self.columns)
        self.tokens += rows.shape[0]
        if self.parted and rows.shape[0]:
            rows, rest = beyond(rows)
            if rest.shape[0]:
                self.excess = self.excess or Gram(self.columns)
                self.excess.add(rest)
        self.total.add(rows)

    def mean(self) -> Tensor:
        """H. Raises QloraError when it is not finite or no row was counted."""
        names = self.layers[0].name
        if self.total is None or self.tokens == 0:
            raise QloraError(
                f"no calibration token reached {names}; give text that uses this layer (an expert "
                "that is never chosen cannot be calibrated)"
            )
        mean = self.total.sum().div_(self.tokens)
        if not torch.isfinite(mean).all():
            raise QloraError(
                f"the inputs of {names} are not finite on the calibration text; the model itself "
                "overflows there (try float32 or bfloat16 activations)"
            )
        return mean


def squared_lengths(rows: Tensor) -> Tensor:
    """‖row‖² of [..., n] in float32, without a float32 copy of 16-bit rows."""
    if rows.dtype == torch.float64:  # which the norm will not narrow by itself
        rows = rows.float()
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square()


def beyond(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [n, in] cut down to √`LARGEST` times the median length, what was cut off).

    For each row the two sum to it in the second moment: xᵀx = aᵀa + bᵀb. Rows of which nothing is
    cut off are absent from the second.

    >>> beyond(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 50.0]]))
    (tensor([[ 1.,  0.],
            [ 0.,  2.],
            [ 0., 20.]]), tensor([[ 0.0000, 45.8258]]))
    """
    squares = squared_lengths(rows)
    limit = LARGEST * squares.median()
    over = squares > limit
    if not (limit > 0.0 and over.any()):
        return rows, rows[:0]
    long, kept = rows[over].float(), (limit / squares[over])[:, None]
    cut = rows.clone()
    cut[over] = (long * kept.sqrt()).to(rows.dtype)
    return cut, long * (1.0 - kept).sqrt()


def as_batches(calibration: Iterable[Any], device: torch.device | None = None) -> list[Batch]:
    """Token-id tensors [batch, length], or dicts of model inputs → dicts of model inputs."""
    batches = []
    for place, item in enumerate(calibration):
        if isinstance(item, Tensor):
            item = {"input_ids": item}
        if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), Tensor):
            raise QloraError(
                f"calibration item {place} must be a tensor of token ids [batch, length] or a dict "
                f'with "input_ids", got {type(item).__name__}'
            )
        ids = item["input_ids"]
        if ids.dim() == 1:
            item = {**item, "input_ids": ids[None]}
        elif ids.dim() != 2:
            raise QloraError(
                f"calibration item {place} has token ids of shape {list(ids.shape)}, expected "
                "[batch, length]"
            )
        batches.append(dict(item))
    return batches


def count_tokens(batches: Iterable[Batch]) -> int:
    """Tokens that are not padding."""
    return sum(
        int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel()
        for b in batches
    )


def group_by_input(
    model: nn.Module, layers: list[AdaptedLayer], batch: Batch, run: Callable[[Batch], Any]
) -> list[Moment]:
    """Run one batch to see which layers are given the same tensor; in the order of the pass."""
    groups: list[Moment] = []

    def hook(layer: AdaptedLayer) -> Callable[..., None]:
        def look(module: nn.Module, arguments: tuple) -> None:
            # Held until the end of the pass, so that no other tensor can be taken for it.
            for group in reversed(groups):
                if group.seen is arguments[0]:
                    group.layers.append(layer)
                    return
            groups.append(Moment([layer], seen=arguments[0]))

        return look

    with hooks_on({layer.module: hook(layer) for layer in layers}):
        run(batch)
    for group in groups:
        group.seen = None
    reached = {layer.name for group in groups for layer in group.layers}
    # Experts that this batch did not choose have inputs of their own.
    groups.extend(Moment([m], reached=False) for m in layers if m.name not in reached)
    return groups


def collect(
    model: nn.Module,
    groups: list[Moment],
    batches: list[Batch],
    run: Callable[[Batch], Any],
    budget: int,
    progress: Callable[[int, int], None] | None = None,
    weigh: Callable[[list[Moment], int, Batch], bool] | None = None,
) -> Iterator[list[Moment]]:
    """Yield groups with their H, as many at a time as `budget` bytes hold (at least one).

    The consumer may drop each group's `total` when it is done with it. run: computes the model on
    a batch. progress: called as (done, total) in batches over all passes.
    weigh: called as (groups, place, batch); where it returns True it has counted the batch itself.
    """
    if not groups:
        return
    portions: list[list[Moment]] = [[]]
    for group in groups:
        used = sum(other.most_bytes for other in portions[-1])
        if portions[-1] and used + group.most_bytes > budget:
            portions.append([])
        portions[-1].append(group)
    done, total = 0, len(portions) * len(batches)
    for portion in portions:
        for place, batch in enumerate(batches):
            if weigh is None or not weigh(portion, place, batch):
                _pass(portion, batch, run)
            done += 1
            if progress is not None:
                progress(done, total)
        yield portion


def _pass(portion: list[Moment], batch: Batch, run: Callable[[Batch], Any]) -> None:
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
    # Where some layer is reached by some batches only, no layer is known to be the last.
    last = portion[-1] if all(group.reached for group in portion) else None

    def first(group: Moment) -> Callable[..., None]:
        def count(module: nn.Module, arguments: tuple) -> None:
            group.seen = arguments[0]
            group.add(arguments[0], mask)
            if group is last:
                raise _Enough

        return count

    def other(group: Moment, layer: AdaptedLayer) -> Callable[..., None]:
        def check(module: nn.Module, arguments: tuple) -> None:
            if group.seen is not arguments[0]:
                raise QloraError(
                    f"{layer.name} and {group.layers[0].name} have the same input on some batches "
                    "and not on others; this model cannot be calibrated"
                )

        return check

    hooks = {group.layers[0].module: first(group) for group in portion}
    hooks |= {layer.module: other(group, layer) for group in portion for layer in group.layers[1:]}
    with hooks_on(hooks), contextlib.suppress(_Enough):
        run(batch)
    for group in portion:
        group.seen = None


class hooks_on:
    """Forward pre-hooks, or hooks `after` the layers, for the length of a block."""

    def __init__(self, hooks: Mapping[nn.Module, Callable[..., None]], after: bool = False) -> None:
        self.hooks, self.after = hooks, after
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for module, hook in self.hooks.items():
            register: Any = module.register_forward_pre_hook
            if self.after:
                register = module.register_forward_hook
            self.handles.append(register(hook))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
