"""What a run refuses before it writes anything, and what --overwrite may delete."""

from __future__ import annotations

import io
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    one_thread,  # noqa: F401
    save_tiny_model,
    tiny_model,
    tiny_tokenizer,
    write_sums,
)

import qlora_rs
from qlora_rs import QloraError
from qlora_rs.recipes import output_folder as folder
from qlora_rs.recipes.base_model import (
    check_model_path,
    demo_model_path,
    load_base_model,
    model_identity,
)
from qlora_rs.recipes.finetune import finetune
from qlora_rs.recipes.generate import generate_answers
from qlora_rs.recipes.progress import Progress, duration, size
from qlora_rs.recipes.run_callback import read_log
from qlora_rs.recipes.settings import FinetuneSettings

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> FinetuneSettings:
    data = write_sums(tmp_path / "sums.jsonl", 8)
    return FinetuneSettings(
        str(tiny), str(data), str(tmp_path / "out"), dtype="float32", max_steps=1, max_length=64
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model": "absent"},
        {"data": "absent.jsonl"},
        {"max_length": 8},
        {"eval_fraction": 0.01},
        {"target_modules": ("no_such_layer",)},
        {"block_size": 7},
    ],
)
def test_a_run_that_cannot_work_writes_nothing(
    settings: FinetuneSettings, change: dict[str, Any]
) -> None:
    with pytest.raises(QloraError):
        finetune(replace(settings, **change), progress=QUIET)
    assert not Path(settings.output).exists()


def test_wrong_targets_are_refused_before_anything_is_quantized(
    settings: FinetuneSettings,
) -> None:
    said = io.StringIO()
    wrong = replace(settings, target_modules=("no_such_layer",))
    with pytest.raises(QloraError, match=r"no_such_layer.* matches none of the 14 quantized"):
        finetune(wrong, progress=Progress(said))
    assert "Loading" in said.getvalue()
    assert "Quantizing" not in said.getvalue()


def test_a_bad_line_writes_nothing(settings: FinetuneSettings) -> None:
    with Path(settings.data).open("a") as file:
        file.write('{"prompt": "no completion"}\n')
    with pytest.raises(QloraError, match=r"sums.jsonl, line 9: .*completion"):
        finetune(settings, progress=QUIET)
    assert not Path(settings.output).exists()


def test_a_used_output_is_refused_and_left_alone(settings: FinetuneSettings) -> None:
    notes = Path(settings.output) / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(QloraError, match="exists and holds 1 entry; use --overwrite"):
        finetune(settings, progress=QUIET)
    with pytest.raises(QloraError, match="was not made by qlora-rs finetune"):
        finetune(settings, overwrite=True, progress=QUIET)
    assert notes.read_text() == "mine"


def test_an_empty_output_is_taken(settings: FinetuneSettings) -> None:
    Path(settings.output).mkdir()
    assert finetune(settings, progress=QUIET).finished


def test_overwrite_replaces_a_run_but_not_one_with_foreign_files(
    settings: FinetuneSettings,
) -> None:
    output = Path(settings.output)
    finetune(settings, progress=QUIET)
    with pytest.raises(QloraError, match="holds a run that is complete; use --overwrite to start"):
        finetune(settings, progress=QUIET)
    (output / "summary.json").unlink()  # as a run that was stopped leaves it
    with pytest.raises(QloraError, match="use --resume to continue it, --overwrite"):
        finetune(settings, progress=QUIET)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(QloraError, match=r"also holds notes.txt"):
        finetune(settings, overwrite=True, progress=QUIET)
    assert (output / "adapter").is_dir()
    (output / "notes.txt").unlink()
    (output / ".log.jsonl.1234.tmp").write_text("what a killed write leaves")
    assert finetune(replace(settings, seed=1), overwrite=True, progress=QUIET).finished
    assert json.loads((output / "run.json").read_text())["settings"]["seed"] == 1
    assert not (output / ".log.jsonl.1234.tmp").exists()


def test_a_file_or_link_as_output_is_refused(settings: FinetuneSettings, tmp_path: Path) -> None:
    Path(settings.output).write_text("x")
    with pytest.raises(QloraError, match="is not a directory"):
        finetune(settings, overwrite=True, progress=QUIET)
    Path(settings.output).unlink()
    (tmp_path / "real").mkdir()
    Path(settings.output).symlink_to(tmp_path / "real")
    with pytest.raises(QloraError, match="is not a directory"):
        finetune(settings, overwrite=True, progress=QUIET)


def hold(path: Path, held: Any, release: Any) -> None:
    with folder.lock(path):
        held.set()
        release.wait(60)


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, held, release))
    other.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(QloraError, match="another process is writing to"),
            folder.lock(tmp_path),
        ):
            pass
    finally:
        release.set()
        other.join(60)
    with folder.lock(tmp_path):
        pass


# ---- models -------------------------------------------------------------------------------------


def test_paths_that_are_no_model_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(QloraError, match="nothing is downloaded"):
        check_model_path("HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(QloraError, match=r"no config.json \(it holds nothing\)"):
        check_model_path(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"GGML1234")
    with pytest.raises(QloraError, match=r"not a GGUF file .it starts with b'GGML'"):
        check_model_path(tmp_path / "weights.gguf")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(QloraError, match=r"no \*.safetensors file"):
        check_model_path(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(QloraError, match=r"only pytorch_model.bin, a pickle"):
        check_model_path(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(QloraError, match=r"already quantized \(gptq\)"):
        check_model_path(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(QloraError, match="not valid JSON"):
        check_model_path(tmp_path)


def test_a_damaged_model_is_a_sentence_not_a_traceback(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(QloraError, match="could not be loaded as a causal language model: "):
        load_base_model(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(QloraError, match="could not be loaded as a causal language model: "):
        load_base_model(tmp_path / "broken.gguf")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    sentence = r"the tokenizer of .* could not be loaded \(.*[^:]\); put the model's tokenizer.json"
    with pytest.raises(QloraError, match=sentence):
        load_base_model(tmp_path)


def test_a_tokenizer_without_pad_token_gets_its_end_token(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_base_model(tmp_path).tokenizer.pad_token == "<|im_end|>"


def test_identity_tells_models_apart_and_survives_a_copy(tiny: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy", save_tiny_model(tmp_path / "other", seed=1)
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_identity(tiny) == model_identity(copy) != model_identity(other)


def test_the_demonstration_model_is_trainable_and_answers_in_four_bits() -> None:
    """The GGUF path on the real file: transformers would call it quantized and not trainable."""
    pytest.importorskip("gguf")
    base = load_base_model(demo_model_path())
    assert not getattr(base.model, "is_quantized", False)
    assert base.model.config.num_hidden_layers == 30
    assert base.tokenizer.chat_template is not None
    qlora_rs.quantize_model(base.model)
    question = "What is the capital of France?"
    answer = generate_answers(base.model, base.tokenizer, [question], max_new_tokens=12)[0]
    assert "Paris" in answer


# ---- settings and small things ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 0, "--r must be between 1 and 4096, got 0"),
        ("learning_rate", 0.0, "--learning-rate must be above 0"),
        ("learning_rate", float("nan"), "--learning-rate must be between 0 and 1, got nan"),
        ("dropout", 1.0, "--dropout must be between 0 and 0.99, got 1.0"),
        ("max_steps", 0, "--max-steps must be between 1"),
        ("batch_size", True, "--batch-size must be between 1"),
        ("dtype", "int8", "--dtype must be one of bfloat16, float32, float16, got 'int8'"),
        ("schedule", "step", "--schedule must be one of"),
        ("model", "", "--model is empty"),
    ],
)
def test_a_bad_setting_is_refused_by_its_option(field: str, value: object, message: str) -> None:
    with pytest.raises(QloraError) as caught:
        replace(FinetuneSettings("m", "d", "o"), **{field: value})
    assert message in str(caught.value)


def test_settings_survive_json_and_another_version_is_refused() -> None:
    settings = FinetuneSettings("m", "d", "o", target_modules=("q_proj", "v_proj"), max_steps=3)
    written = json.loads(json.dumps(settings.to_json()))
    assert FinetuneSettings.from_json(written) == settings
    del written["seed"]
    with pytest.raises(QloraError, match=r"another version of qlora_rs .settings differ: seed"):
        FinetuneSettings.from_json(written)


def test_sizes_and_durations_at_their_borders() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_949, 999_950, 1e15)] == [
        "0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1000.0 TB",
    ]  # fmt: skip
    assert [duration(s) for s in (-1, 59.4, 59.6, 3599.4, 3600)] == [
        "0s", "59s", "1m00s", "59m59s", "1h00m",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_live_line_and_a_file_gets_plain_ones() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream)
        progress.line("step 1")
        progress.line("step 2")  # too soon after the first
        progress.line("step 3", last=True)
        progress.stage("Done")
    assert terminal.getvalue() == "\rstep 1\x1b[K\rstep 3\x1b[K\nDone\n"
    assert file.getvalue() == "step 1\nstep 3\nDone\n"


def test_a_log_is_read_up_to_the_line_a_killed_process_tore(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_log(log) == []
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [entry["step"] for entry in read_log(log)] == [1, 2]
