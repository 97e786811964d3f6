"""The command line: exit statuses, sentences instead of tracebacks, Ctrl-C and resuming."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import (
    one_thread,  # noqa: F401
    save_tiny_model,
    write_sums,
)

import qlora_rs
from qlora_rs import cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    save_tiny_model(place / "model")
    write_sums(place / "sums.jsonl", 16)
    return place


def finetune_command(place: Path, output: Path, *more: str) -> list[str]:
    return [
        "finetune", "--model", str(place / "model"), "--data", str(place / "sums.jsonl"),
        "--output", str(output), "--dtype", "float32", "--max-length", "64", *more,
    ]  # fmt: skip


def test_help_lists_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["doctor"], ["demo"], ["finetune"], ["generate"], ["merge"]):
        with pytest.raises(SystemExit) as caught:
            cli.main([*command, "--help"])
        assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("doctor", "demo", "finetune", "generate", "merge", "--limit-kl", "--resume"):
        assert word in text


def test_version_and_a_bare_call_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"qlora-rs {qlora_rs.__version__}\n"
    assert cli.main([]) == 0
    assert "finetune" in capsys.readouterr().out


def test_every_option_of_every_command_says_what_it_is_and_its_default() -> None:
    (commands,) = [a for a in cli.build_parser()._actions if a.choices]
    for name, command in commands.choices.items():
        for action in command._actions:
            text = (action.help or "") % vars(action)
            assert len(text.split()) >= 2, (name, action.dest, text)
            if action.nargs is None and action.option_strings:
                assert action.metavar in ("N", "X", "NAME", "FILE", "DIR", "PATH", "TEXT"), action
            if type(action.default) in (int, float) and action.dest != "json":
                assert f"{action.default}" in text, (name, action.dest, text)
    text = commands.choices["merge"].format_help()
    assert re.search(r"nf4; bf16, .* separate, .*\(default: nf4\)", text, re.DOTALL)
    assert re.search(r"distilled\s+\(default: calibrated\)", text)


def test_help_imports_neither_transformers_nor_trl() -> None:
    code = (
        "import sys; from qlora_rs import cli\n"
        "try: cli.main(['finetune', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'transformers', 'trl', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().split("\n")[-1] == "[]", done.stderr


def test_every_finetune_option_is_a_setting_and_the_reverse() -> None:
    import dataclasses

    from qlora_rs.recipes.settings import FinetuneSettings

    fields = {field.name for field in dataclasses.fields(FinetuneSettings)}
    assert set(cli.FINETUNE_OPTIONS) | set(cli.FINETUNE_SWITCHES) | {
        "model", "data", "output",
    } == fields  # fmt: skip


def test_doctor_passes_its_self_test_and_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["self_test"]["passed"]
    assert report["cpu_path"] in report["cpu_paths"]
    assert report["packages"]["torch"]
    assert cli.main(["doctor"]) == 0
    assert "self-test" in capsys.readouterr().out


def test_doctor_reports_a_broken_operator_instead_of_breaking(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_rs

    def broken(*args: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(qlora_rs, "lora_linear", broken)
    assert cli.main(["doctor"]) == 1
    assert "FAILED: RuntimeError: illegal instruction" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["finetune", "--output", "x"], "--model and --data must be given"),
        (["finetune", "--output", "x", "--resume"], "holds no fine-tuning run to resume"),
        (["finetune", "--output", "x", "--resume", "--overwrite"], "contradict each other"),
        (
            ["finetune", "--output", "x", "--model", "absent", "--data", "absent"],
            "absent does not exist",
        ),
        (
            ["finetune", "--output", "x", "--model", "m", "--data", "d", "--r", "0"],
            "--r must be between 1 and 4096, got 0",
        ),
        (
            ["finetune", "--output", "x", "--model", "nomodel", "--data", "nodata"],
            "`hf download`); and nodata does not exist; give the path",
        ),
        (
            ["generate", "--model", "nomodel", "--data", "nodata", "--adapter", "a"],
            "and nodata does not exist; give the path of a JSONL file; and a is not an adapter",
        ),
        (["merge", "nomodel", "a", "out"], "`hf download`); and a is not an adapter directory"),
        (["finetune", "--output", "x", "--epochs", "x"], "--epochs: invalid float value: 'x'"),
        (["finetune"], "required: --output (`qlora-rs finetune --help` lists the options)"),
        (["tune"], "invalid choice: 'tune'"),
        (["generate", "--model", "absent"], "give either --prompt or --data"),
        (["generate", "--model", "m", "--prompt", "p", "--dtype", "int4"], "--dtype must be one"),
        (["generate", "--model", "m", "--prompt", "p", "--adapter", "a"], "not an adapter"),
        (["demo", "--examples", "0"], "--examples must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr_and_status_2(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("qlora-rs: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["trl", "transformers", "datasets"])
def test_a_missing_extra_names_the_pip_command(
    package: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes `import package` an ImportError
    assert cli.main(finetune_command(place, tmp_path / "out")) == 2
    assert 'pip install "qlora_rs[train]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_finetune_then_generate(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ("--max-steps", "2", "--target-modules", "q_proj, v_proj", "--rslora")
    assert cli.main(finetune_command(place, out, *more)) == 0
    captured = capsys.readouterr()
    assert "Fine-tuning finished" in captured.out
    assert "step 2/2" in captured.err
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["target_modules"]) == (True, ["q_proj", "v_proj"])

    ask = ["generate", "--model", str(place / "model"), "--adapter", str(out / "adapter")]
    ask += ["--max-new-tokens", "4", "--dtype", "float32"]
    assert cli.main([*ask, "--prompt", "3+1", "--quiet"]) == 0
    single = capsys.readouterr().out
    assert cli.main([*ask, "--data", str(place / "sums.jsonl"), "--json", "--quiet"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 16
    assert lines[3]["prompt"] == [{"role": "user", "content": "3+1"}]
    assert lines[3]["answer"] == single.strip()


def test_an_interrupt_outside_training_is_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process_leaves_a_run_that_the_printed_command_resumes(
    place: Path, tmp_path: Path, number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # Many steps, so that it cannot finish before the signal, which follows the first step seen.
    command = finetune_command(place, out, "--max-steps", "5000", "--save-every", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_rs", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.match(r"step \d+/5000", line):
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=240)
    text = "".join(lines) + rest
    assert process.returncode == status, text
    assert f"{signal.Signals(number).name}: saving a checkpoint after this step" in text
    assert f"qlora-rs finetune --resume --output {out}" in text
    assert "Traceback" not in text
    assert len(list((out / "checkpoints").glob("step-*"))) == 1

    # Resuming keeps the run's own settings: another length would be another run.
    assert cli.main(["finetune", "--resume", "--output", str(out), "--max-steps", "6000"]) == 2
    assert "--max-steps was 5000" in capsys.readouterr().err
