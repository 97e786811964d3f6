"""Merging whole models: in place, undone to the byte, through our layers and peft's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import tiny_llama
import torch
from torch import Tensor, nn

import qlora_rs
from qlora_rs import NF4Linear, QloraError, QLoRALinear
from qlora_rs.merging import distill, evaluate, importance, shrinkage, statistics
from qlora_rs.merging.adapted import find_adapted
from qlora_rs.merging.report import MergeReport, plot_layers, report_table

IDS = tiny_llama.IDS


def text(batches: int = 6) -> list[Tensor]:
    return list(torch.randint(64, (batches, 4, 32)))


@pytest.fixture(autouse=True)
def _no_noise() -> object:
    """The tiny model's down_proj has 160 inputs, which is said every time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rounded to nearest.*")
        warnings.filterwarnings("ignore", message=".*no text was given.*")
        yield


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("method", ["nearest", "calibrated", "distilled"])
def test_merge_removes_the_adapters_and_unmerge_restores_every_byte(method: str) -> None:
    model = tiny_llama.with_adapter()
    before, logits = bytes_of(model), tiny_llama.logits(model)
    report = qlora_rs.merge_model(model, method, text(), steps=4)
    assert not any(isinstance(m, QLoRALinear) for m in model.modules())
    assert not equal(before, bytes_of(model))
    assert len(report.layers) == 14
    assert report.merged.kl < 0.2 * report_of_base(model)
    qlora_rs.unmerge(model)
    assert equal(before, bytes_of(model))
    assert torch.equal(tiny_llama.logits(model), logits)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def report_of_base(merged: nn.Module) -> float:
    """KL(unmerged ‖ base), by a way of its own."""
    unmerged = tiny_llama.with_adapter()
    base = tiny_llama.quantized()
    p, q = (tiny_llama.logits(m).double().log_softmax(-1) for m in (unmerged, base))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_calibrated_is_closer_to_the_unmerged_model_than_plain_rounding() -> None:
    model = tiny_llama.with_adapter()
    report = qlora_rs.merge_model(model, "calibrated", text(12))
    assert report.merged.kl < 0.6 * report.nearest.kl
    assert all(layer.ratio_to_nearest <= 1.0 for layer in report.layers)
    assert 0.0 < report.kl_removed <= 1.0


def test_distilled_lowers_the_kl_of_the_text_it_was_given() -> None:
    fitting = text(4)
    model = tiny_llama.with_adapter()
    calibrated = qlora_rs.merge_model(model, "calibrated", fitting, fitting)
    qlora_rs.unmerge(model)
    distilled = qlora_rs.merge_model(model, "distilled", fitting, fitting, steps=16)
    assert distilled.merged.kl < calibrated.merged.kl
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            # Only scales moved, and only onto codes: the grid itself is that of plain rounding.
            assert module.absmax.dtype == torch.uint8, name


def test_distillation_that_does_harm_is_not_kept() -> None:
    fitting = text(2 * distill.ASIDE)
    kept = []
    for steps in (0, 3):
        model = tiny_llama.with_adapter()
        qlora_rs.merge_model(model, "distilled", fitting, text(2), steps=steps, learning_rate=0.5)
        kept.append(bytes_of(model))
    assert equal(*kept)


def test_the_scores_are_those_of_the_formulae() -> None:
    model = tiny_llama.with_adapter()
    unmerged = tiny_llama.logits(model).double()
    report = qlora_rs.merge_model(model, "nearest", evaluation=[IDS])
    merged = tiny_llama.logits(model).double()
    p, q = (x[:, :-1].log_softmax(-1) for x in (unmerged, merged))
    targets = IDS[:, 1:, None]
    assert report.merged.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert report.merged.loss == pytest.approx(-float(q.gather(2, targets).mean()), rel=1e-5)
    assert report.unmerged_loss == pytest.approx(-float(p.gather(2, targets).mean()), rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert report.merged.top1_agreement == pytest.approx(float(same), abs=1e-6)
    assert report.held_out_tokens == IDS[:, 1:].numel()


def test_padding_and_unlabelled_tokens_do_not_count() -> None:
    model = tiny_llama.with_adapter()
    ids = torch.randint(64, (2, 10))
    padded = torch.cat([ids, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 10), torch.zeros(2, 6)], dim=1).long()
    batch = {"input_ids": padded, "attention_mask": mask}
    plain = {"input_ids": ids}
    moments = []
    for batches in ([batch], [plain]):
        groups = statistics.group_by_input(model, find_adapted(model), batches[0], forward(model))
        list(statistics.collect(model, groups, batches, forward(model), 1 << 30))
        moments.append([group.mean() for group in groups])
        assert [len(group.layers) for group in groups] == [3, 1, 2, 1] * 2
    for padded_h, plain_h in zip(*moments, strict=True):
        torch.testing.assert_close(padded_h, plain_h, rtol=1e-4, atol=1e-5)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    counted, _ = evaluate.scored({**batch, "labels": labels})
    assert counted.sum() == 2 * 6
    assert evaluate.scored(batch)[0].sum() == 2 * 9


def forward(model: nn.Module) -> object:
    def run(batch: dict[str, Tensor]) -> None:
        with torch.no_grad():
            model(**batch)

    return run


def test_a_small_budget_reads_the_text_more_often_and_changes_nothing() -> None:
    fitting = text()
    merged = []
    for budget in (1 << 30, 1):
        model = tiny_llama.with_adapter()
        qlora_rs.merge_model(model, "calibrated", fitting, memory_budget=budget)
        merged.append(bytes_of(model))
    assert equal(*merged)


def test_the_same_input_gives_the_same_bytes_twice() -> None:
    fitting = text()
    merged = []
    for _ in range(2):
        model = tiny_llama.with_adapter()
        qlora_rs.merge_model(model, "distilled", fitting, steps=3)
        merged.append(bytes_of(model))
    assert equal(*merged)


def test_hybrid_keeps_a_small_adapter_beside_a_closer_merge() -> None:
    fitting = text()
    plain = qlora_rs.merge_model(tiny_llama.with_adapter(), "calibrated", fitting)
    model = tiny_llama.with_adapter()
    hybrid = qlora_rs.merge_model(model, "calibrated", fitting, hybrid_rank=2)
    ranks = {m.r for m in model.modules() if isinstance(m, QLoRALinear)}
    assert ranks == {2}
    assert hybrid.mean_error_to_update < plain.mean_error_to_update


def test_a_limit_refuses_and_leaves_the_model_as_it_was() -> None:
    model = tiny_llama.with_adapter()
    before = bytes_of(model)
    with pytest.raises(QloraError, match=r"above the limit 1e-09.*use the method"):
        qlora_rs.merge_model(model, "nearest", text(), limit_kl=1e-9)
    assert equal(before, bytes_of(model))
    with pytest.raises(QloraError, match="needs text to measure on"):
        qlora_rs.merge_model(model, "nearest", limit_kl=1.0)
    assert equal(before, bytes_of(model))


def test_a_lost_update_is_warned_of() -> None:
    model = tiny_llama.with_adapter()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    with pytest.warns(UserWarning, match=r"as good as lost there; use the method .calibrated"):
        qlora_rs.merge_model(model, "nearest", text())


def test_a_model_in_training_mode_stays_there() -> None:
    model = tiny_llama.with_adapter(dropout=0.5).train()
    qlora_rs.merge_model(model, "nearest", text(2))
    assert all(module.training for module in model.modules())


# ---- peft ---------------------------------------------------------------------------------------


def wrapped(**options: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    model = peft.get_peft_model(tiny_llama.quantized(), peft.LoraConfig(**config))
    return tiny_llama.randomize(model).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ],
    ids=["lora", "rslora", "dora", "bias", "per layer"],
)
def test_targets_are_what_peft_computes(options: dict) -> None:
    """W x as peft computes it, against the target the merge aims at."""
    model = wrapped(**options)
    for layer in find_adapted(model)[:7]:
        x = torch.randn(3, layer.packed.shape[1])
        with torch.no_grad():
            expected = layer.module(x)
        bias = layer.bias()
        found = x @ layer.target().t() + (0.0 if bias is None else bias)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_peft_model_is_merged_in_place_and_unmerged() -> None:
    model = wrapped()
    before, ids = bytes_of(model), text()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    report = qlora_rs.merge_model(model, "calibrated", ids)
    assert report.merged.kl < 0.6 * report.nearest.kl
    assert not any("lora_" in name for name, _ in model.named_parameters())
    qlora_rs.unmerge(model)
    assert equal(before, bytes_of(model))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits)


def test_two_active_adapters_are_summed_before_anything_is_rounded() -> None:
    peft = pytest.importorskip("peft")
    model = wrapped()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    tiny_llama.randomize(model)
    layer = find_adapted(model)[0]
    assert layer.adapters == ("default", "second")
    module = layer.module
    both = module.get_delta_weight("default") + module.get_delta_weight("second")
    torch.testing.assert_close(layer.delta(), both, rtol=1e-4, atol=1e-5)
    lora_b, lora_a = layer.factors()
    torch.testing.assert_close(lora_b @ lora_a, both, rtol=1e-4, atol=1e-5)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "distilled", "steps": -1}, "steps must be a whole number from 0 on, got -1"),
        ({"method": "best"}, "method must be one of nearest, calibrated, distilled"),
        ({"method": "calibrated"}, "0 tokens are left to calibrate on, at least 256"),
        ({"method": "calibrated", "calibration": [IDS, IDS]}, "24 tokens are left"),
        ({"method": "calibrated", "calibration": ["text"]}, "item 0 must be a tensor of token ids"),
        ({"method": "calibrated", "calibration": [IDS[None]]}, r"shape \[1, 2, 12\]"),
        ({"method": "calibrated", "hybrid_rank": 1, "limit_kl": -1.0}, "tokens"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    model = tiny_llama.with_adapter()
    before = bytes_of(model)
    with pytest.raises(QloraError, match=message):
        qlora_rs.merge_model(model, **arguments)
    assert equal(before, bytes_of(model))


def test_models_without_something_to_merge_are_refused() -> None:
    with pytest.raises(QloraError, match="no active adapter"):
        qlora_rs.merge_model(tiny_llama.quantized(), "nearest")
    model = tiny_llama.with_adapter()
    qlora_rs.disable_adapter(model)
    with pytest.raises(QloraError, match="no active adapter"):
        qlora_rs.merge_model(model, "nearest")
    with pytest.raises(QloraError, match="was not merged"):
        qlora_rs.unmerge(model)


def test_adapters_that_are_not_finite_are_refused() -> None:
    model = tiny_llama.with_adapter()
    model.model.layers[0].self_attn.q_proj.lora_A.data[0, 0] = float("nan")
    with pytest.raises(QloraError, match=r"q_proj holds NaN"):
        qlora_rs.merge_model(model, "nearest")


def test_a_model_that_overflows_is_refused() -> None:
    model = tiny_llama.with_adapter()
    model.model.embed_tokens.weight.data[3] = float("inf")
    batches = [torch.full((8, 40), 3), *text(3)]
    with pytest.raises(QloraError, match="not finite on the calibration text"):
        qlora_rs.merge_model(model, "calibrated", batches, text(1))


# ---- distillation's parts -----------------------------------------------------------------------


def test_the_gradient_of_scales_is_the_derivative() -> None:
    packed = qlora_rs.quantize(torch.randn(8, 128, dtype=torch.float32))
    student = distill.ScaledNF4Linear(NF4Linear(packed))
    x = torch.randn(5, 128, requires_grad=True)
    weights = torch.randn(5, 8)
    (student(x) * weights).sum().backward()
    step = 1e-2
    for block in (0, 3, 15):
        values = []
        for sign in (1, -1):
            student.g.data.zero_()
            student.g.data[block] = sign * step
            values.append(float((student(x) * weights).sum().detach()))
        numeric = (values[0] - values[1]) / (2 * step)
        assert float(student.g.grad[block]) == pytest.approx(numeric, rel=1e-2, abs=1e-3)
    torch.testing.assert_close(x.grad, weights @ packed.dequantize(torch.float32))


@pytest.mark.parametrize("double_quant", [True, False])
def test_scales_that_did_not_move_give_the_same_bytes(double_quant: bool) -> None:
    packed = qlora_rs.quantize(torch.randn(70, 640), double_quant=double_quant)
    again = distill.with_scales(packed, distill.single_absmax(packed))
    assert torch.equal(packed.dequantize(), again.dequantize())
    moved = distill.single_absmax(packed) * (1 + 0.1 * torch.randn(700))
    found = distill.single_absmax(distill.with_scales(packed, moved))
    if double_quant:
        groups = packed.nested_absmax.repeat_interleave(256)[:700, None]
        grid = packed.nested_map * groups + packed.nested_offset
        nearest = (grid - moved[:, None]).abs().min(1).values
        torch.testing.assert_close((found - moved).abs(), nearest, rtol=0, atol=1e-6)
    else:
        assert torch.equal(found, moved)


# ---- report -------------------------------------------------------------------------------------


def test_the_report_is_json_a_table_and_a_picture(tmp_path: Path) -> None:
    report = qlora_rs.merge_model(tiny_llama.with_adapter(), "calibrated", text())
    report.write(tmp_path / "merge.json")
    held = json.loads((tmp_path / "merge.json").read_text())
    assert held["summary"]["layers_worse_than_nearest"] == 0
    assert held["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert held["extra_bytes"] > 0
    table = report_table(report)
    assert "KL to the unmerged model" in table
    assert "peak extra memory" in table
    plot_layers(report, tmp_path / "merge.svg")
    assert (tmp_path / "merge.svg").read_text().count("<path") > 20
    assert report_table(MergeReport("nearest"))


def test_what_is_summed_apart_adds_up_to_the_second_moment() -> None:
    torch.manual_seed(5)
    rows = torch.randn(200, 32)
    rows[3] *= 400.0
    cut, rest = (part.t() @ part for part in statistics.beyond(rows))
    wanted = rows.t() @ rows
    torch.testing.assert_close(cut + rest, wanted, rtol=1e-4, atol=1.0)
    assert cut.trace() < 0.02 * wanted.trace()


def test_a_batch_that_weighs_tokens_counts_them_once() -> None:
    model = tiny_llama.with_adapter()
    batches = statistics.as_batches(text(7))
    layers = find_adapted(model)
    run = forward(model)
    weighing_ids = [batch["input_ids"] for batch in batches[:: importance.EVERY]]
    found = []
    for weigh in (None, importance.weighing(model)):
        with torch.no_grad():
            groups = statistics.group_by_input(model, layers, batches[0], run)
            list(statistics.collect(model, groups, batches, run, 1 << 30, weigh=weigh))
        found.append(groups)
    for plain, weighed in zip(*found, strict=True):
        assert plain.tokens == weighed.tokens > 0
        assert plain.weighted is None
        assert weighed.weighted is not None
        # No answer depends on the last token of a row.
        assert weighed.weighted_tokens == sum(ids.numel() - ids.shape[0] for ids in weighing_ids)
        torch.testing.assert_close(weighed.mean(), plain.mean(), rtol=1e-3, atol=1e-4)


def test_weighted_statistics_are_shrunk_by_the_tokens_that_they_come_from() -> None:
    def group(tokens: int, weighted_tokens: int) -> statistics.Moment:
        moment = statistics.Moment([find_adapted(tiny_llama.with_adapter())[0]], tokens=tokens)
        moment.weighted_tokens = weighted_tokens
        for name, count in (("total", tokens), ("weighted", 1)):
            gram = statistics.Gram(moment.columns)
            gram.total = torch.ones(moment.columns, moment.columns).mul_(count)
            setattr(moment, name, gram)
        return moment

    settings = importance.METHOD_SETTINGS["calibrated"]
    columns = group(1, 1).columns
    many, few, none = (
        importance.mixed(group(10**9, count), settings) for count in (10**9, 8 * columns, 1)
    )
    # The weighted part has the trace of the plain one, and one entry is as large as another.
    weighted = importance.WEIGHTED_SHARE * float(many.trace()) / columns
    for found, share in ((few, shrinkage.SHRINKAGE / 8), (none, shrinkage.MOST_SHRINKAGE)):
        lost = (many - found)[0, 1]
        assert float(lost) == pytest.approx(weighted * share, rel=1e-3)
        assert float(found.trace()) == pytest.approx(float(many.trace()))


def test_an_adapter_of_peft_around_one_of_ours_is_refused() -> None:
    model = tiny_llama.with_adapter()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(QloraError, match=r"q_proj has an adapter of peft around one of ours"):
        find_adapted(wrapped)


def test_indices_are_drawn_as_often_as_their_probability() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3]).repeat(20000, 1)
    drawn = importance._draw(probabilities, torch.Generator().manual_seed(1))
    shares = drawn.flatten().bincount(minlength=4) / 20000
    assert shares[1] == 0.0
    torch.testing.assert_close(shares, probabilities[0], rtol=0.0, atol=0.02)
