"""The training step: the loss is trl's, packing keeps examples apart, the result is peft's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import (
    one_thread,  # noqa: F401
    save_tiny_model,
    tiny_model,
    tiny_tokenizer,
    write_sums,
)
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForCausalLM
from trl import SFTTrainer

import qlora_rs
from qlora_rs import QloraError
from qlora_rs.recipes import trainer as trainer_module
from qlora_rs.recipes.encode import IGNORED
from qlora_rs.recipes.finetune import finetune
from qlora_rs.recipes.generate import load_for_generation
from qlora_rs.recipes.progress import Progress
from qlora_rs.recipes.report import draw_loss_curve
from qlora_rs.recipes.run_callback import read_log
from qlora_rs.recipes.settings import FinetuneSettings
from qlora_rs.recipes.trainer import AnswerTrainer, training_arguments

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def rows(lengths: list[int]) -> Dataset:
    """Random examples of the given lengths whose second half is the answer."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(250, (n,), generator=generator).tolist() for n in lengths]
    labels = [[IGNORED] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def answer_trainer(tmp_path: Path, dataset: Dataset, model: Any = None, **options: Any) -> Any:
    settings = FinetuneSettings("m", "d", "o", max_length=64, dtype="float32", **options)
    if model is None:
        model = qlora_rs.add_lora(qlora_rs.quantize_model(tiny_model()), r=4, alpha=8)
        qlora_rs.speed_up(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide mistakes in A's gradient
                torch.nn.init.normal_(parameter, std=0.02)
    return AnswerTrainer(
        model=model,
        args=training_arguments(settings, tmp_path, evaluate=True),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny_tokenizer(),
        base_name="tiny",
        keep_checkpoints=False,
    )


def loss_and_gradients(trainer: Any, compute: Any, batch: dict[str, Any]) -> tuple[float, list]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = compute(trainer.model, dict(batch), num_items_in_batch=torch.tensor(17))
    loss.backward()
    trained = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), [gradient.clone() for gradient in trained]


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_equal_those_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    trainer = answer_trainer(tmp_path, rows([9, 14, 20, 7]), packing=packing, batch_size=2)
    trainer.model.config.vocab_size -= 5  # the head may be wider, for the sake of its shape
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("attention_mask" in batch) is not packing
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "compute_loss", None)  # ours must not lean on it here
        ours, our_gradients = loss_and_gradients(trainer, trainer.compute_loss, batch)
    theirs, their_gradients = loss_and_gradients(
        trainer, lambda *args, **kw: SFTTrainer.compute_loss(trainer, *args, **kw), batch
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in our_gradients)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_logits_that_would_be_large_go_to_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    trainer = answer_trainer(tmp_path, rows([9, 14]))
    called = []
    original = SFTTrainer.compute_loss
    monkeypatch.setattr(
        SFTTrainer, "compute_loss", lambda *a, **k: called.append(1) or original(*a, **k)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected, _ = loss_and_gradients(trainer, trainer.compute_loss, batch)
    assert not called
    monkeypatch.setattr(trainer_module, "LOGITS_BYTES", 1)
    if not fused:
        trainer.model.get_output_embeddings().__dict__["forward"].remove()
    actual, _ = loss_and_gradients(trainer, trainer.compute_loss, batch)
    assert called == ([] if fused else [1])
    assert actual == pytest.approx(expected, rel=1e-5)


def test_auxiliary_losses_are_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = answer_trainer(tmp_path, rows([9, 14]))
    batch = next(iter(trainer.get_train_dataloader()))
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *arguments: "trl's")
    assert trainer.compute_loss(trainer.model, dict(batch)) != "trl's"
    trainer.aux_loss_enabled = True
    assert trainer.compute_loss(trainer.model, dict(batch)) == "trl's"


def bart() -> Any:
    """Its own loss neither shifts labels nor divides by the number of items."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=260, d_model=64, decoder_layers=1, decoder_attention_heads=4,
        decoder_ffn_dim=64, max_position_embeddings=128, dropout=0.0,
    )  # fmt: skip
    return BartForCausalLM(config)


def test_a_model_whose_own_loss_is_another_learns_the_next_token_too(tmp_path: Path) -> None:
    model = qlora_rs.add_lora(qlora_rs.quantize_model(bart()), r=4)
    qlora_rs.speed_up(model)
    trainer = answer_trainer(tmp_path, rows([9, 14]), model, packing=False, batch_size=2)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, _ = loss_and_gradients(trainer, trainer.compute_loss, batch)
    assert loss == pytest.approx(next_token_loss(trainer.model, batch) / 17, rel=1e-5)


@torch.no_grad()
def next_token_loss(model: Any, batch: dict[str, Any]) -> float:
    """The sum over answer tokens, from the logits of all positions."""
    others = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**others).logits[:, :-1], batch["labels"][:, 1:]
    return float(cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="sum"))


def test_a_row_with_nothing_to_learn_gives_a_zero_with_gradient(tmp_path: Path) -> None:
    trainer = answer_trainer(tmp_path, rows([9, 14]))
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss, gradients = loss_and_gradients(trainer, trainer.compute_loss, batch)
    assert loss == 0.0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_packing_gives_each_example_the_logits_it_has_alone(tmp_path: Path) -> None:
    """Block-diagonal attention and restarted positions, on the collator's real output."""
    dataset = rows([13, 21, 9])
    trainer = answer_trainer(tmp_path, dataset)
    assert len(trainer.train_dataset) == 1, "the three examples should share one row"
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    model = trainer.model.eval()
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    assert sorted(e - s for s, e in zip(starts, ends, strict=True)) == [9, 13, 21]
    for start, end in zip(starts, ends, strict=True):
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"][:, start:end]).logits[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)
    # The test can fail: without the position ids the examples see each other.
    with torch.no_grad():
        mixed = model(input_ids=batch["input_ids"]).logits[0]
    assert (mixed[starts[1] : ends[1]] - packed[starts[1] : ends[1]]).abs().max() > 1e-3


def test_packed_loss_is_the_sum_over_the_examples_apart(tmp_path: Path) -> None:
    dataset = rows([13, 21, 9])
    trainer = answer_trainer(tmp_path, dataset)
    batch = next(iter(trainer.get_train_dataloader()))
    packed = trainer.compute_loss(trainer.model.eval(), dict(batch), num_items_in_batch=1).item()
    apart = sum(next_token_loss(trainer.model, alone(row)) for row in dataset)
    assert packed == pytest.approx(apart, rel=1e-5)


def alone(row: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}


def test_held_out_loss_is_the_mean_over_answer_tokens(tmp_path: Path) -> None:
    dataset = rows([8, 40, 30])  # rows of unequal answers, where a mean of means would differ
    trainer = answer_trainer(tmp_path, dataset)
    trainer.model.eval()
    total = sum(next_token_loss(trainer.model, alone(row)) for row in dataset)
    tokens = sum(sum(label != IGNORED for label in row["labels"][1:]) for row in dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One finished run that has something to learn."""
    folder = tmp_path_factory.mktemp("run")
    data = write_sums(folder / "sums.jsonl", 12)
    settings = FinetuneSettings(
        str(tiny), str(data), str(folder / "out"), r=8, alpha=32, learning_rate=1e-2, epochs=20,
        gradient_accumulation=1, max_length=96, dtype="float32", eval_fraction=0.1, save_every=10,
    )  # fmt: skip
    return finetune(settings, progress=QUIET), folder / "out"


def test_a_run_learns_and_leaves_what_it_promises(run: tuple[Any, Path]) -> None:
    result, output = run
    assert result.finished
    assert result.summary["last_loss"] < 0.7 * result.summary["first_loss"]
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter", "log.jsonl", "loss.png", "run.json", "summary.json",
    ]  # fmt: skip
    assert json.loads((output / "summary.json").read_text()) == result.summary
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(output / "log.jsonl")
    assert [e["step"] for e in log if "loss" in e] == list(range(1, result.step + 1))
    assert log[-1]["eval_loss"] == result.summary["held_out_loss"]
    tokens = [entry["tokens"] for entry in log if "loss" in entry]
    assert tokens[-1] == result.summary["tokens"]
    assert tokens == sorted(tokens)


def test_the_saved_adapter_gives_the_same_logits_on_a_fresh_base(
    run: tuple[Any, Path], tiny: Path
) -> None:
    result, output = run
    fresh = load_for_generation(tiny, output / "adapter", dtype="float32").model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, result.model(ids).logits)
        with qlora_rs.disable_adapter(fresh):
            assert not torch.equal(fresh(ids).logits, result.model(ids).logits)


def test_peft_loads_the_adapter_on_the_dequantized_model(run: tuple[Any, Path]) -> None:
    peft = pytest.importorskip("peft")
    result, output = run
    dense = tiny_model()
    for name, module in result.model.named_modules():
        if isinstance(module, qlora_rs.NF4Linear):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(dense, output / "adapter").eval()(ids).logits
        torch.testing.assert_close(theirs, result.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_training_leaves_the_base_untouched(run: tuple[Any, Path]) -> None:
    result, _ = run
    fresh = qlora_rs.quantize_model(tiny_model())
    trained = dict(result.model.named_parameters())
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AnswerTrainer.compute_loss

    def break_at_step_3(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(AnswerTrainer, "compute_loss", break_at_step_3)
    data = write_sums(tmp_path / "sums.jsonl")
    settings = FinetuneSettings(
        str(tiny), str(data), str(tmp_path / "out"), dtype="float32", max_length=64,
        gradient_accumulation=1, save_every=1,
    )  # fmt: skip
    with pytest.raises(QloraError, match="the loss became nan at step 3; lower --learning-rate"):
        finetune(settings, progress=QUIET)
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved == ["step-00000001", "step-00000002"]


def test_the_first_step_of_a_short_run_is_no_warm_up(tiny: Path, tmp_path: Path) -> None:
    data = write_sums(tmp_path / "sums.jsonl", 8)
    settings = FinetuneSettings(
        str(tiny), str(data), str(tmp_path / "out"), dtype="float32", max_length=64, max_steps=1,
    )  # fmt: skip
    model = finetune(settings, progress=QUIET).model
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in trained)


def test_gradient_checkpointing_trains_to_the_same_losses(tiny: Path, tmp_path: Path) -> None:
    data = write_sums(tmp_path / "sums.jsonl", 8)
    losses = []
    for flag in (False, True):
        output = tmp_path / f"out-{flag}"
        settings = FinetuneSettings(
            str(tiny), str(data), str(output), dtype="float32", max_length=64,
            gradient_accumulation=1, max_steps=3, gradient_checkpointing=flag,
        )  # fmt: skip
        finetune(settings, progress=QUIET)
        losses.append([e["loss"] for e in read_log(output / "log.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_loss_curve_is_skipped_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not draw_loss_curve(tmp_path / "loss.png", [{"step": 1, "loss": 2.0}], "t")
    assert not (tmp_path / "loss.png").exists()
