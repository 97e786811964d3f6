"""Statistics drawn in: the formula by eigenvalues, their order, and inputs never used."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_rs.merging.shrinkage import BEND, KEPT, RAISED, draw_in, shrink
from qlora_rs.merging.statistics import beyond, squared_lengths


def sample(population: Tensor, tokens: int, seed: int = 0) -> Tensor:
    """H of so many rows with the second moment `population`."""
    noise = torch.randn(tokens, population.shape[0], generator=torch.Generator().manual_seed(seed))
    rows = noise @ torch.linalg.cholesky(population).t()
    return rows.t() @ rows / tokens


def population(columns: int) -> Tensor:
    """Inputs of very different sizes with some strong common directions and a long tail."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spectrum = torch.logspace(1.5, -2, columns)
    scale = torch.rand(columns, generator=generator) * 3 + 0.1
    return (basis * spectrum) @ basis.t() * scale * scale.unsqueeze(1)


def test_eigenvalues_go_where_the_formula_says() -> None:
    h = sample(population(48), 400).double()
    scale = h.diagonal().sqrt().numpy()
    values, vectors = np.linalg.eigh(h.numpy() / scale / scale[:, None])
    moved = KEPT * values + (1 - KEPT) * BEND * values / (values + BEND) + RAISED * 48 / 400
    expected = (vectors * moved) @ vectors.T * scale * scale[:, None]
    np.testing.assert_allclose(draw_in(h, 400).numpy(), expected, rtol=1e-9, atol=1e-12)
    found = draw_in(h.float(), 400).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * float(h.diagonal().max()))


@given(st.integers(2, 40), st.integers(1, 400))
def test_eigenvalues_come_closer_to_each_other_and_keep_their_order(
    columns: int, tokens: int
) -> None:
    h = sample(population(columns), 10 * columns).double()
    correlation = h / h.diagonal().sqrt() / h.diagonal().sqrt().unsqueeze(1)
    values, vectors = torch.linalg.eigh(correlation)
    drawn = ((vectors.t() @ draw_in(correlation, tokens)) * vectors.t()).sum(1)
    ratios = drawn / values
    assert bool((drawn.diff() >= -1e-9).all())
    assert bool((ratios.diff() <= 1e-9).all())


def test_dead_inputs_and_no_tokens_leave_a_usable_matrix() -> None:
    h = sample(population(16), 200)
    h[3] = h[:, 3] = 0.0
    for tokens in (0, 200):
        drawn = draw_in(h, tokens)
        assert torch.isfinite(drawn).all()
        assert not drawn[3].any()
        assert not drawn[:, 3].any()
        torch.testing.assert_close(drawn, drawn.t())
        assert float(torch.linalg.eigvalsh(drawn.double())[0]) > -1e-6
    assert not draw_in(torch.zeros(4, 4), 8).any()


def test_neither_changes_what_it_is_given_but_where_it_says_so() -> None:
    h = sample(population(16), 200)
    before = h.clone()
    draw_in(h, 200)
    assert torch.equal(h, before)
    assert shrink(h, 200) is h


def test_lengths_and_what_is_beyond_for_every_dtype() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 50.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert squared_lengths(rows.to(dtype)).tolist() == [1.0, 4.0, 2500.0]
        cut, rest = beyond(rows.to(dtype))
        assert cut.dtype == dtype
        second_moment = cut.float().t() @ cut.float() + rest.t() @ rest
        torch.testing.assert_close(second_moment, rows.t() @ rows, rtol=1e-2, atol=1e-2)
