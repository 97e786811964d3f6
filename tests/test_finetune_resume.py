"""A stopped run continues bit for bit: after Ctrl-C, SIGTERM, kill -9, and a damaged checkpoint."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    one_thread,  # noqa: F401
    save_tiny_model,
    write_sums,
)

from qlora_rs import QloraError
from qlora_rs.recipes.finetune import finetune
from qlora_rs.recipes.progress import Progress
from qlora_rs.recipes.run_callback import read_log
from qlora_rs.recipes.run_identity import settings_of_run
from qlora_rs.recipes.settings import FinetuneSettings

STEPS = 10


class SignalAt(Progress):
    """A progress that sends this process a signal when training reports a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        super().__init__(io.StringIO())
        self.step, self.number, self.sent = step, number, False

    def line(self, text: str, last: bool = False) -> None:
        match = re.match(r"step (\d+)/", text)
        if match and int(match[1]) == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)

    @property
    def text(self) -> str:
        return self.stream.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("resume")
    save_tiny_model(place / "model")
    write_sums(place / "sums.jsonl", 24)
    return place


def settings(place: Path, output: str, **changes: Any) -> FinetuneSettings:
    """Dropout, accumulation, several epochs and held-out examples: all that draws numbers."""
    base = FinetuneSettings(
        str(place / "model"), str(place / "sums.jsonl"), str(place / output), r=4, alpha=16,
        dropout=0.2, learning_rate=1e-2, max_steps=STEPS, gradient_accumulation=2, max_length=64,
        dtype="float32", eval_fraction=0.1, save_every=3, seed=3,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def unbroken(place: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    result = finetune(settings(place, "unbroken"), progress=Progress(quiet=True))
    assert result.finished
    assert result.step == STEPS
    return outcome(place / "unbroken")


def outcome(output: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The adapter's weights and the log without its times."""
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    log = [{k: v for k, v in e.items() if k != "seconds"} for e in read_log(output / "log.jsonl")]
    return weights, log


def assert_same_outcome(output: Path, unbroken: Any) -> None:
    weights, log = outcome(output)
    expected_weights, expected_log = unbroken
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert log == expected_log


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_stopped_at_any_step_and_resumed_equals_the_unbroken_run(
    place: Path, unbroken: Any, step: int
) -> None:
    run = settings(place, f"stopped-{step}")
    progress = SignalAt(step)
    stopped = finetune(run, progress=progress)
    assert not stopped.finished
    assert (stopped.step, stopped.signal) == (step, signal.SIGINT)
    assert f"qlora-rs finetune --resume --output {run.output}" in progress.text
    assert not (Path(run.output) / "adapter").exists()
    resumed = finetune(settings_of_run(run.output), resume=True, progress=Progress(quiet=True))
    assert resumed.finished
    assert_same_outcome(Path(run.output), unbroken)
    assert not (Path(run.output) / "checkpoints").exists()


def test_a_run_stopped_twice_equals_the_unbroken_run(place: Path, unbroken: Any) -> None:
    run = settings(place, "twice")
    assert not finetune(run, progress=SignalAt(2, signal.SIGTERM)).finished
    second = finetune(run, resume=True, progress=SignalAt(7))
    assert (second.finished, second.step) == (False, 7)
    assert finetune(run, resume=True, progress=Progress(quiet=True)).finished
    assert_same_outcome(Path(run.output), unbroken)


def test_a_damaged_newest_checkpoint_is_skipped_by_name(place: Path, unbroken: Any) -> None:
    run = settings(place, "damaged")
    finetune(run, progress=SignalAt(8))
    newest = Path(run.output) / "checkpoints" / "step-00000008"
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    stream = io.StringIO()
    assert finetune(run, resume=True, progress=Progress(stream)).finished
    assert "Skipped a damaged checkpoint: step-00000008: optimizer.safetensors has" in (
        stream.getvalue()
    )
    assert "Resuming from step 6" in stream.getvalue()
    assert_same_outcome(Path(run.output), unbroken)


def test_without_any_whole_checkpoint_the_run_starts_over(place: Path, unbroken: Any) -> None:
    run = settings(place, "none")
    finetune(run, progress=SignalAt(2))
    shutil.rmtree(Path(run.output) / "checkpoints")
    stream = io.StringIO()
    assert finetune(run, resume=True, progress=Progress(stream)).finished
    assert "Resuming from the start (no whole checkpoint yet)" in stream.getvalue()
    assert_same_outcome(Path(run.output), unbroken)


def test_a_run_killed_after_its_last_step_only_writes_its_result(
    place: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_rs.recipes.finetune as module

    run = settings(place, "late")
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_finish", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            finetune(run, progress=Progress(quiet=True))
    # The final checkpoint of step 10 is not a multiple of save_every; Trainer saves it anyway.
    resumed = finetune(run, resume=True, progress=Progress(quiet=True))
    assert (resumed.finished, resumed.step) == (True, STEPS)
    weights, _ = outcome(Path(run.output))
    assert all(torch.equal(weights[name], tensor) for name, tensor in unbroken[0].items())


def test_a_run_stopped_while_its_caller_measures_the_base_has_done_no_step(
    place: Path, unbroken: Any
) -> None:
    run = settings(place, "measuring")
    stopped = finetune(
        run,
        progress=Progress(io.StringIO()),
        on_ready=lambda model, tokenizer: os.kill(os.getpid(), signal.SIGINT),
    )
    assert (stopped.finished, stopped.step) == (False, 0)
    assert finetune(run, resume=True, progress=Progress(quiet=True)).finished
    assert_same_outcome(Path(run.output), unbroken)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from qlora_rs.recipes import checkpoint
from test_finetune_resume import finetune, settings, Path, Progress
written = checkpoint.write_json
def die_inside_the_second_checkpoint(path, value):
    if value.get("step") == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    written(path, value)
checkpoint.write_json = die_inside_the_second_checkpoint
finetune(settings(Path({place!r}), "killed"), progress=Progress(quiet=True))
"""


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_from_the_one_before(
    place: Path, unbroken: Any
) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), place=str(place))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    run = settings(place, "killed")
    left = sorted(p.name for p in (Path(run.output) / "checkpoints").iterdir())
    assert left[-1] == "step-00000003"
    assert left[0].startswith(".step-00000006.")
    stream = io.StringIO()
    assert finetune(run, resume=True, progress=Progress(stream)).finished
    assert "Resuming from step 3" in stream.getvalue()
    assert_same_outcome(Path(run.output), unbroken)


# ---- what may not be resumed --------------------------------------------------------------------


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> FinetuneSettings:
    run = settings(place, str(tmp_path / "out"))
    finetune(run, progress=SignalAt(1))
    return run


def test_changed_settings_are_refused(stopped: FinetuneSettings) -> None:
    changed = replace(stopped, learning_rate=1e-3)
    with pytest.raises(QloraError, match=r"--learning-rate was 0.01 when .* and is 0.001 now"):
        finetune(changed, resume=True)


def test_changed_data_is_refused_and_moved_data_is_not(
    stopped: FinetuneSettings, tmp_path: Path
) -> None:
    other = write_sums(tmp_path / "other.jsonl", 23)
    with pytest.raises(QloraError, match=r"the training data .*its digest differs"):
        finetune(replace(stopped, data=str(other)), resume=True)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(stopped.data).read_bytes())
    resumed = replace(stopped, data=str(moved))
    assert finetune(resumed, resume=True, progress=Progress(quiet=True)).finished


def test_another_model_is_refused(stopped: FinetuneSettings, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(QloraError, match=r"the base model .*its digest differs"):
        finetune(replace(stopped, model=str(other)), resume=True)


def test_a_complete_run_is_not_resumed(place: Path, unbroken: Any) -> None:
    with pytest.raises(QloraError, match="is complete; its adapter is in"):
        finetune(settings(place, "unbroken"), resume=True)


def test_a_folder_without_a_run_is_not_resumed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(QloraError, match="holds no fine-tuning run to resume"):
        finetune(settings(place, str(tmp_path)), resume=True)


def test_another_environment_is_allowed_with_a_warning(stopped: FinetuneSettings) -> None:
    record = Path(stopped.output) / "run.json"
    record.write_text(re.sub(r'"torch": "[^"]*"', '"torch": "1.0"', record.read_text()))
    stream = io.StringIO()
    assert finetune(stopped, resume=True, progress=Progress(stream)).finished
    assert f"torch 1.0 -> {torch.__version__}" in stream.getvalue()
