"""DeferredLogits: what logits do on the way to their cross-entropy, and the refusal of all else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_rs import QloraError
from qlora_rs.deferred_logits import DeferredLogits

HIDDEN, WEIGHT, BIAS = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randn(30)
TARGETS = torch.randint(30, (10,))
OPERATIONS = {
    "float view": lambda z: z.float().view(-1, z.size(-1)),
    "shift": lambda z: z[..., :-1, :].contiguous().view(8, 30),
    "shift without dots": lambda z: z[:, 1:].reshape((-1, 30)),
    "selection": lambda z: z[torch.tensor([[True, False, True, True, False]] * 2)],
    "scale": lambda z: (3 * z / 2.0)[0],
    "move": lambda z: z.to(z.device).to(torch.float32)[1, :, :],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_deferred_logits_do_what_logits_do(name: str) -> None:
    expected = OPERATIONS[name](nn.functional.linear(HIDDEN, WEIGHT, BIAS))
    found = OPERATIONS[name](DeferredLogits(HIDDEN, WEIGHT, BIAS))
    assert (found.shape, found.dim(), found.dtype) == (expected.shape, 2, expected.dtype)
    targets = TARGETS[: len(expected)]
    losses = [nn.functional.cross_entropy(logits, targets) for logits in (found, expected)]
    assert torch.allclose(*losses)


def cross_entropy(logits: DeferredLogits, targets: Tensor = TARGETS[:5], **options: Any) -> Any:
    return nn.functional.cross_entropy(logits, targets, **options)


REFUSED = {
    "tanh": torch.tanh,
    "softmax": lambda z: z.softmax(-1),
    "logsumexp": lambda z: z.logsumexp(-1),
    "add": lambda z: z + 1,
    "pow": lambda z: z**2,
    "setitem": lambda z: z.__setitem__(0, 1),
    "multiplication by a tensor": lambda z: z * torch.ones(30),
    "indexing in the vocabulary": lambda z: z[..., :20],
    r"view\(-1, 15\)": lambda z: z.view(-1, 15),
    r"to\(torch.float64": lambda z: z.to(torch.float64),
    "label smoothing": lambda z: cross_entropy(z[0], label_smoothing=0.1),
    "class weights": lambda z: cross_entropy(z[0], weight=torch.ones(30)),
    "dimension 1": lambda z: cross_entropy(z, TARGETS.view(2, 5)),
    "linear": lambda z: nn.functional.linear(z, WEIGHT.t()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_logits_is_refused_by_name(name: str) -> None:
    with pytest.raises(QloraError, match=f"the model applies .*{name}"):
        REFUSED[name](DeferredLogits(HIDDEN, WEIGHT, BIAS))


def test_probing_for_other_attributes_gets_the_usual_answer() -> None:
    logits = DeferredLogits(HIDDEN, WEIGHT, BIAS)
    assert not hasattr(logits, "keys")
    assert not hasattr(logits, "__array__")
