"""The commands take every speed-up that fits a model, and models that none fits as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    one_thread,  # noqa: F401
    tiny_model,
    tiny_tokenizer,
    write_sums,
)
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

import qlora_rs
from qlora_rs import QloraError, cpu, speed_up, undo_speed_up
from qlora_rs.recipes.finetune import finetune
from qlora_rs.recipes.generate import generate_answers, load_for_generation
from qlora_rs.recipes.progress import Progress
from qlora_rs.recipes.settings import FinetuneSettings

FUSED = ("fuse_loss", "fuse_norms", "fuse_mlps", "fuse_attention")


def gemma() -> Gemma2ForCausalLM:
    """Soft-capped logits, norms of another formula, GELU: only its attention can be fused."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer()), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    return qlora_rs.add_lora(qlora_rs.quantize_model(model), r=4)


@pytest.mark.parametrize("wide", [True, False])
def test_everything_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    monkeypatch.setattr(cpu, "is_faster_in_float32", lambda dtype: wide)
    assert speed_up(adapted(tiny_model())) == ((*FUSED, "widen_attention") if wide else FUSED)


def test_the_cpu_decides_whether_attention_is_widened() -> None:
    slow = qlora_rs._rust.cpu_path() in ("avx2", "avx2_vnni", "avx512", "avx512_vnni")
    assert cpu.is_faster_in_float32(torch.bfloat16) == cpu.is_faster_in_float32(torch.float16)
    assert cpu.is_faster_in_float32(torch.bfloat16) == slow
    assert not cpu.is_faster_in_float32(torch.float32)


def test_without_an_adapter_there_is_no_mlp_to_fuse() -> None:
    taken = speed_up(qlora_rs.quantize_model(tiny_model()))
    assert taken == ("fuse_loss", "fuse_norms", "fuse_attention")


def test_all_is_undone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_faster_in_float32", lambda dtype: True)
    model = adapted(tiny_model(dtype=torch.bfloat16))
    ids = torch.arange(9)[None]
    expected = model(input_ids=ids, labels=ids).loss
    assert speed_up(model)[-1] == "widen_attention"
    undone = ("unfuse_loss", "unfuse_norms", "unfuse_mlps", "unfuse_attention", "unwiden_attention")
    assert undo_speed_up(model) == undone
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
    assert undo_speed_up(model) == ()


def test_what_was_taken_before_is_not_named_again() -> None:
    model = qlora_rs.fuse_norms(adapted(tiny_model()))
    assert speed_up(model) == ("fuse_loss", "fuse_mlps", "fuse_attention")
    assert speed_up(model) == ()


def test_a_model_that_nothing_fits_is_left_as_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert speed_up(model) == ()
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(QloraError, match="got NoneType; pass the model itself"):
        speed_up(None)


class Picky(LlamaForCausalLM):
    """Wants three tokens at least."""

    def forward(self, input_ids: torch.Tensor, labels: object = None, **options: object) -> object:
        if input_ids.shape[1] < 3:
            raise ValueError("too short")
        return super().forward(input_ids, labels=labels, **options)


def test_a_model_that_cannot_be_tried_goes_without() -> None:
    model = adapted(tiny_model())
    model.__class__ = Picky
    sentence = "cannot be called with two tokens .* .ValueError: too short.; train it with"
    with pytest.raises(QloraError, match=sentence):
        qlora_rs.fuse_loss(model)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert speed_up(model) == FUSED[1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_both_kinds_are_trained_and_answer_the_same_after_a_reload(
    tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On every CPU: attention is widened in bfloat16.
    monkeypatch.setattr(cpu, "is_faster_in_float32", lambda dtype: dtype is torch.bfloat16)
    model = tiny_model() if kind == "llama" else gemma()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = write_sums(tmp_path / "sums.jsonl", 12)
    settings = FinetuneSettings(
        str(tmp_path / "model"), str(data), str(tmp_path / "out"), r=8, learning_rate=1e-2,
        epochs=10, gradient_accumulation=1, max_length=96, dtype=dtype,
    )  # fmt: skip
    result = finetune(settings, progress=Progress(quiet=True))
    expected = [*(FUSED if kind == "llama" else FUSED[3:])]
    if dtype == "bfloat16" and kind == "llama":  # Gemma 2's attention is not torch's
        expected.append("widen_attention")
    assert result.summary["speed_ups"] == expected
    assert result.summary["last_loss"] < 0.9 * result.summary["first_loss"]
    fresh = load_for_generation(tmp_path / "model", tmp_path / "out" / "adapter", dtype)
    prompts = ["1 + 1", "2 + 5"]
    answers = [
        generate_answers(m, result.tokenizer, prompts, 8) for m in (result.model, fresh.model)
    ]
    assert answers[0] == answers[1]
    if kind == "llama":  # what trl's trainer put around the model is gone
        ids = torch.arange(5)[None]
        assert qlora_rs.unfuse_loss(result.model)(input_ids=ids, labels=ids).logits is not None
