"""Merged models that answer as unmerged ones: coupled rows, whole updates, distillation."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
import torch
from torch import Tensor

import qlora_rs
from qlora_rs import PackedWeight
from qlora_rs.merging import coupling, distill, solve, unbiased
from qlora_rs.merging.coupling import OutputMoment
from qlora_rs.merging.statistics import Moment, as_batches
from qlora_rs.recipes import process_memory
from qlora_rs.recipes.merge_store import LayerStore
from qlora_rs.recipes.merge_text import batched


def gradients(tokens: int, rows: int, common: float = 3.0) -> Tensor:
    """Output gradients with some directions that all rows share."""
    shared = torch.randn(tokens, 4) @ torch.randn(4, rows)
    return torch.randn(tokens, rows) + common * shared


def moment_of(values: Tensor) -> OutputMoment:
    moment = OutputMoment(values.shape[-1])
    moment.add(values)
    return moment


def layer(rows: int, columns: int = 128) -> tuple[Tensor, PackedWeight, Tensor]:
    """A target, its plain rounding, and H of correlated inputs."""
    packed = qlora_rs.quantize(torch.randn(rows, columns) * 0.05)
    target = packed.dequantize() + torch.randn(rows, 4) @ torch.randn(4, columns) * 2e-3
    inputs = torch.randn(1024, columns) @ torch.randn(columns, columns) / columns**0.5
    return target, solve.quantize_like(packed, target), inputs.t() @ inputs / 1024


def calibrate_coupled(
    target: Tensor,
    nearest: PackedWeight,
    curvature: solve.Curvature,
    h: Tensor,
    outputs: OutputMoment,
) -> PackedWeight:
    return unbiased.calibrate_unbiased(
        target, nearest, curvature, h, None, target, 0.0, couplings=outputs.couplings()
    )


def cost(target: Tensor, result: PackedWeight, h: Tensor, f: np.ndarray) -> float:
    """tr(F E H Eᵀ) in float64, from the bytes alone."""
    error = (target.double() - result.dequantize(torch.float64)).numpy()
    return float(np.trace(f @ error @ h.double().numpy() @ error.T))


def same(left: PackedWeight, right: PackedWeight) -> bool:
    return torch.equal(left.codes, right.codes) and torch.equal(left.absmax, right.absmax)


def test_f_is_the_shrunk_moment_of_mean_one() -> None:
    values = gradients(400, 96)
    f = values.double().numpy().T @ values.double().numpy()
    f /= np.trace(f) / 96
    kept = 1.0 - 2.0 * 96 / 400
    expected = f * (kept + (1.0 - kept) * np.eye(96))
    (found,) = moment_of(values).couplings()
    assert (found.first, found.rows) == (0, 96)
    np.testing.assert_allclose(found.moment.double().numpy(), expected, atol=1e-5 * expected.max())


def test_padding_is_no_token() -> None:
    values = gradients(64, 48)
    padded = torch.cat([values, torch.zeros(32, 48)]).view(2, 48, 48)
    with_padding, without = moment_of(padded), moment_of(values)
    assert with_padding.tokens == without.tokens == 64
    (left,), (right,) = with_padding.couplings(), without.couplings()
    assert torch.equal(left.moment, right.moment)


@pytest.mark.parametrize("rows", [40, 192, 300])
def test_coupled_rows_answer_with_less_error(rows: int) -> None:
    target, nearest, h = layer(rows)
    values = gradients(4000, rows)
    f = values.double().numpy().T @ values.double().numpy() / 4000
    curvature = solve.Curvature.of(h, 64)
    alone = solve.calibrate(target, nearest, curvature)
    coupled = calibrate_coupled(target, nearest, curvature, h, moment_of(values))
    one = np.eye(rows)
    if rows <= 48:  # a single strip: no row knows of another
        assert same(alone, coupled)
        return
    assert cost(target, coupled, h, f) < 0.8 * cost(target, alone, h, f)
    assert cost(target, coupled, h, one) <= cost(target, nearest, h, one)


def test_without_gradients_every_row_is_solved_for_itself() -> None:
    target, nearest, h = layer(300)
    curvature = solve.Curvature.of(h, 64)
    alone = solve.calibrate(target, nearest, curvature)
    assert same(alone, calibrate_coupled(target, nearest, curvature, h, OutputMoment(300)))


def test_a_coupling_that_does_the_layer_harm_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    target, nearest, h = layer(192)
    moment, curvature = moment_of(gradients(4000, 192)), solve.Curvature.of(h, 64)
    alone = solve.calibrate(target, nearest, curvature)
    coupled = calibrate_coupled(target, nearest, curvature, h, moment)
    one = np.eye(192)
    ratio = (cost(target, coupled, h, one) / cost(target, nearest, h, one)) ** 0.5
    monkeypatch.setattr(unbiased, "MOST_RATIO", ratio * 1.001)
    assert same(coupled, calibrate_coupled(target, nearest, curvature, h, moment))
    monkeypatch.setattr(unbiased, "MOST_RATIO", ratio * 0.999)
    assert same(alone, calibrate_coupled(target, nearest, curvature, h, moment))


def test_wide_layers_have_several_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "PIECE", 96)
    target, nearest, h = layer(250)
    values = gradients(2000, 250)
    moment = moment_of(values)
    assert [found.first for found in moment.couplings()] == [0, 96, 192]
    assert moment.nbytes == 4 * (96**2 + 96**2 + 58**2)
    coupled = calibrate_coupled(target, nearest, solve.Curvature.of(h, 64), h, moment)
    # Rows know of their own piece alone.
    others = moment_of(torch.cat([values[:, :96], gradients(2000, 154)], dim=1))
    found = calibrate_coupled(target, nearest, solve.Curvature.of(h, 64), h, others)
    assert torch.equal(coupled.dequantize()[:96], found.dequantize()[:96])
    assert not same(coupled, found)


def test_the_number_of_threads_changes_nothing() -> None:
    target, nearest, h = layer(300)
    moment, curvature = moment_of(gradients(2000, 300)), solve.Curvature.of(h, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(calibrate_coupled(target, nearest, curvature, h, moment))
    finally:
        torch.set_num_threads(before)
    assert same(*found)


# ---- what the update lacks ----------------------------------------------------------------------


def kept(update: Tensor, base: Tensor, result: PackedWeight, h: Tensor) -> float:
    """The share of the update's effect on the outputs that the result has, in float64."""
    read = update.double() @ h.double()
    moved = result.dequantize(torch.float64) - base.double()
    return float((read * moved).sum() / (read * update.double()).sum())


def with_adapter(rows: int = 96, columns: int = 256) -> tuple[PackedWeight, Tensor, Tensor, Tensor]:
    """A packed weight, A, the update and H of inputs that lie near 32 directions."""
    packed = qlora_rs.quantize(torch.randn(rows, columns) * 0.05)
    lora_a = torch.randn(4, columns)
    update = torch.randn(rows, 4) @ lora_a * 1e-3
    mix = torch.randn(columns, 32) @ torch.randn(32, columns) / 32
    inputs = torch.randn(2048, columns) @ (mix + 0.1 * torch.randn(columns, columns))
    return packed, lora_a, update, inputs.t() @ inputs / (2048 * columns)


def test_what_rounding_takes_from_an_update_is_given_back() -> None:
    packed, lora_a, update, h = with_adapter()
    base = packed.dequantize(torch.float32)
    target = base + update
    nearest = solve.quantize_like(packed, target)
    curvature = solve.Curvature.of(h, 64)
    found = [
        unbiased.calibrate_unbiased(target, nearest, curvature, h, lora_a, update, returned)
        for returned in (0.0, 0.1, 1.0)
    ]
    assert same(found[0], solve.calibrate(target, nearest, curvature))
    shares = [kept(update, base, result, h) for result in found]
    assert shares[0] < 0.9
    assert shares[0] + 0.02 < shares[1] < shares[2]
    assert abs(1.0 - shares[2]) < 0.4 * (1.0 - shares[0])
    errors = [solve.energy(target - result.dequantize(torch.float32), h) for result in found]
    assert max(errors) < solve.energy(target - nearest.dequantize(torch.float32), h)


def test_what_is_missing_is_the_projection_in_the_metric_of_the_inputs() -> None:
    _, lora_a, update, h = with_adapter()
    error = update + torch.randn_like(update) * 1e-3
    projection = unbiased.Projection(lora_a, h)
    part = projection.part(error).double().numpy()
    a, metric = lora_a.double().numpy(), h.double().numpy()
    root = np.linalg.cholesky(metric)
    coefficients = np.linalg.lstsq(root.T @ a.T, root.T @ error.double().numpy().T, rcond=None)[0]
    np.testing.assert_allclose(part, coefficients.T @ a, atol=1e-6)
    size = projection.size(projection.shares(error))
    assert size == pytest.approx(solve.energy(projection.part(error), h) ** 0.5, rel=1e-3)
    np.testing.assert_allclose(projection.part(error, size / 4), part / 4, atol=1e-6)


def test_directions_that_no_input_shows_get_nothing() -> None:
    lora_a = torch.eye(8)[:2]
    h = torch.zeros(8, 8)
    h[0, 0] = 1.0
    part = unbiased.Projection(lora_a, h).part(torch.ones(3, 8))
    expected = torch.zeros(3, 8)
    expected[:, 0] = 1.0
    assert torch.allclose(part, expected)


# ---- distillation -------------------------------------------------------------------------------


class Interrupted(Exception):
    """What happens to the process."""


def distilled(store: LayerStore | None, stop_after: int | None = None) -> dict[str, PackedWeight]:
    model = tiny_llama.with_adapter().eval()
    layers = {m.name: m for m in qlora_rs.merging.adapted.find_adapted(model)}
    merged = {
        name: m.merged(solve.quantize_like(m.packed, m.target())) for name, m in layers.items()
    }

    def progress(step: int, steps: int, kl: float) -> None:
        seen.append(step)
        if step == stop_after:
            raise Interrupted

    seen: list[int] = []
    torch.manual_seed(0)
    batches = as_batches(torch.randint(64, (6, 4, 32)))
    try:
        return distill.distill(model, merged, batches, 10, progress=progress, store=store)
    finally:
        if store is not None and stop_after is None:
            # What was stored is not done again: the steps after the last multiple are.
            assert seen == list(range(distill.KEEP_EVERY + 1, 11))


def test_an_interrupted_distillation_goes_on_with_the_same_result(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store", {"same": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = distilled(None)
        with pytest.raises(Interrupted):
            distilled(store, stop_after=distill.KEEP_EVERY + 2)
        resumed = distilled(store)
    assert whole.keys() == resumed.keys()
    assert all(same(whole[name], resumed[name]) for name in whole)


def test_what_stays_beside_a_merged_layer_is_part_of_what_is_distilled() -> None:
    packed = qlora_rs.quantize(torch.randn(64, 64) * 0.05)
    layer = qlora_rs.QLoRALinear(qlora_rs.NF4Linear(packed), 2, 2)
    torch.nn.init.normal_(layer.lora_B)
    student, x = distill.ScaledNF4Linear(layer), torch.randn(5, 64)
    torch.testing.assert_close(student(x), layer(x), rtol=1e-5, atol=1e-5)
    again = student.replacement(student.finished())
    torch.testing.assert_close(again(x), layer(x))
    assert not any(parameter.requires_grad for parameter in again.parameters())


# ---- text ---------------------------------------------------------------------------------------


def test_short_rows_share_a_batch_and_none_is_lost() -> None:
    rows = [(list(range(1, n + 1)), [-100] * (n - 1) + [n]) for n in (3, 5, 2, 9, 20, 1)]
    batches = batched(rows, tokens=12)
    assert len(batches) < len(rows)
    assert all(b["input_ids"].numel() <= max(12, b["input_ids"].shape[1]) for b in batches)
    found = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for ids, labels, kept in zip(batch["input_ids"], batch["labels"], mask, strict=True):
            found.append((ids[kept].tolist(), labels[kept].tolist()))
            assert (labels[~kept] == -100).all()
    assert found == rows


@pytest.mark.parametrize("shape", [(2, 6, 8), (12, 8)])
def test_padding_is_left_out_of_statistics_in_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 6, 8)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    moment = Moment([_Layer(8)])
    moment.add(x.view(shape), mask)
    rows = x[mask].double().numpy()
    assert moment.tokens == 10
    np.testing.assert_allclose(moment.mean().numpy(), rows.T @ rows / 10, rtol=1e-5, atol=1e-6)


class _Layer:
    """As much of a layer as its statistics look at."""

    def __init__(self, columns: int) -> None:
        self.name, self.packed = "layer", qlora_rs.quantize(torch.randn(64, columns))


def test_the_peak_of_a_process_is_that_since_it_was_forgotten() -> None:
    assert process_memory.forget_peak()
    before = process_memory.resident()
    assert before is not None
    held = torch.ones(1 << 25)  # 128 MiB, touched
    assert process_memory.peak() >= before + (100 << 20)
    del held
    process_memory.release()
    assert process_memory.forget_peak()
    assert process_memory.peak() < before + (100 << 20)
