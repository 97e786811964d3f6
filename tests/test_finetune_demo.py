"""Generation, scores and the demonstration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    one_thread,  # noqa: F401
    save_tiny_model,
    tiny_model,
    tiny_tokenizer,
)

from qlora_rs import QloraError
from qlora_rs.recipes import calendar_dates, scores
from qlora_rs.recipes.demo import DemoSettings, demo_text, run_demo
from qlora_rs.recipes.generate import generate_answers
from qlora_rs.recipes.memory_peer import compare_memory
from qlora_rs.recipes.progress import Progress

QUIET = Progress(quiet=True)


# ---- generation ---------------------------------------------------------------------------------


def test_answers_do_not_depend_on_batching_or_order() -> None:
    """Left padding, attention mask and reordering: a batch gives what each prompt gives alone."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["a", "a much longer prompt " * 3, "bb", "why?", "the end"]
    together = generate_answers(model, tokenizer, prompts, 12, batch_size=5)
    alone = [generate_answers(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    pairs = generate_answers(model, tokenizer, prompts[::-1], 12, batch_size=2)[::-1]
    assert together == alone == pairs
    assert len(set(together)) > 1, "random answers that are all equal would prove nothing"


def test_generation_stops_at_the_end_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    calls: list[int] = []

    def always_end(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        output[..., tokenizer.eos_token_id] = 1e4
        return output

    model.lm_head.register_forward_hook(always_end)
    assert generate_answers(model, tokenizer, ["a", "bb"], 50) == ["", ""]
    assert len(calls) == 1


def test_a_chat_for_a_model_without_template_is_refused() -> None:
    chat = [{"role": "user", "content": "a"}]
    with pytest.raises(QloraError, match="no chat template"):
        generate_answers(tiny_model(), tiny_tokenizer(chat_template=None), [chat], 5)


# ---- scores -------------------------------------------------------------------------------------


def test_wilson_interval_agrees_with_published_values() -> None:
    # Newcombe (1998), table I: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611.
    assert scores.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert scores.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def distance(a: str, b: str) -> int:
    """Levenshtein distance from its recursive definition, memoised by rows."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


words = st.text(alphabet="abcé", min_size=1, max_size=6)


@given(words, st.lists(words, min_size=1, max_size=8))
def test_the_nearest_text_is_the_one_of_least_relative_edit_distance(
    query: str, known: list[str]
) -> None:
    relative = [distance(query, text) / max(len(query), len(text)) for text in known]
    assert scores.nearest_places([query], known) == [relative.index(min(relative))]


# ---- the task -----------------------------------------------------------------------------------


def test_no_held_out_day_occurs_in_training_in_any_language() -> None:
    task = calendar_dates.make_task(1400, 300)
    assert not {d.answer for d in task.train} & {d.answer for d in task.held_out}
    assert not {d.text for d in task.train} & {d.text for d in task.held_out}
    assert len({d.text for d in task.train}) == 1400
    assert {d.language for d in task.train} == set(calendar_dates.LANGUAGES)


def test_the_task_is_the_same_each_time_and_another_with_another_seed() -> None:
    first, again = (calendar_dates.make_task(50, 20, seed=1) for _ in range(2))
    assert first == again
    assert calendar_dates.make_task(50, 20, seed=2) != first


def test_every_text_spells_its_month_and_contains_its_numbers() -> None:
    task = calendar_dates.make_task(900, 300)
    for date in (*task.train, *task.held_out):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date.answer)
        year, _, day = map(int, date.answer.split("-"))
        assert sorted(map(int, re.findall(r"\d+", date.text))) == [day, year], date
        assert re.search(r"[^\W\d_]{3}", date.text), date


def test_base_rates_are_what_they_say() -> None:
    task = calendar_dates.make_task(900, 300)
    assert calendar_dates.months_seen(task) == 1.0  # 804 combinations, each drawn at least once
    assert calendar_dates.copy_numbers_score(task) == pytest.approx(1 / 12, abs=0.05)
    assert calendar_dates.nearest_text_score(task) < 0.02


# ---- the demonstration --------------------------------------------------------------------------


def test_the_demonstration_runs_end_to_end_on_a_tiny_model(tmp_path: Path) -> None:
    """All of it but the learning: scores, training, and the same answers in a fresh process."""
    model = save_tiny_model(tmp_path / "model")
    settings = DemoSettings.quick(str(tmp_path / "demo"), str(model))
    report = run_demo(settings, progress=QUIET)
    assert report is not None
    assert report == json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert report["score_before"]["total"] == report["score_after"]["total"] == 10
    assert report["finetune"]["steps"] == 6
    assert "the same answers, every one" in demo_text(report)
    for sample in report["samples"]:
        assert sample["text"] in demo_text(report)
    with pytest.raises(QloraError, match="use --overwrite to start again"):
        run_demo(settings, progress=QUIET)
    (tmp_path / "demo" / "mine.txt").write_text("x")
    with pytest.raises(QloraError, match=r"also holds mine.txt, which qlora-rs demo does not"):
        run_demo(settings, overwrite=True, progress=QUIET)


def test_memory_is_measured_for_both_methods_and_ours_is_less() -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    model.config.hidden_size, model.config.intermediate_size = 512, 2048
    measured = compare_memory(model, tokens=16, dtype="bfloat16")
    if not Path("/proc/self/clear_refs").exists():
        assert measured is None  # not Linux: nothing is said rather than something guessed
        return
    assert measured is not None
    ours, peer = measured["nf4"], measured["float"]
    assert ours["weight_bytes"] < 0.3 * peer["weight_bytes"]
    assert 0 < ours["step_bytes"] < peer["step_bytes"]
