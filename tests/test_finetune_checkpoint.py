"""Checkpoints: whole or absent, verified before use, bit-exact, never unpickled."""

from __future__ import annotations

import ast
import json
import random
import shutil
from pathlib import Path

import numpy
import pytest
import torch

import qlora_rs
from qlora_rs import QloraError
from qlora_rs.recipes import checkpoint


def fill_with(content: bytes):
    """A filler that writes one file and one nested file."""

    def fill(path: Path) -> None:
        (path / "adapter").mkdir()
        (path / "adapter" / "a.bin").write_bytes(content)
        (path / "b.bin").write_bytes(content * 2)

    return fill


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_a_written_checkpoint_verifies_and_is_the_newest(folder: Path) -> None:
    checkpoint.write(folder, 3, fill_with(b"old"))
    path = checkpoint.write(folder, 12, fill_with(b"new"))
    found = checkpoint.newest(folder)
    assert (found.path, found.step, found.skipped) == (path, 12, ())
    assert (path / "adapter" / "a.bin").read_bytes() == b"new"


def test_an_absent_folder_has_no_checkpoint(folder: Path) -> None:
    assert checkpoint.newest(folder) == checkpoint.Found(None, 0, ())


@pytest.mark.parametrize("name", ["adapter/a.bin", "b.bin", "manifest.json"])
def test_every_truncation_and_a_flipped_bit_is_skipped_for_the_older_whole_one(
    folder: Path, name: str
) -> None:
    good = checkpoint.write(folder, 1, fill_with(b"good"))
    bad = checkpoint.write(folder, 2, fill_with(b"bad!"))
    whole = (bad / name).read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for damaged in [*(whole[:length] for length in range(len(whole) - 1)), flipped]:
        (bad / name).write_bytes(damaged)
        found = checkpoint.newest(folder)
        assert found.path == good, f"{name} cut to {len(damaged)} bytes was accepted"
        assert found.skipped[0].startswith("step-00000002: ")
    (bad / name).unlink()
    assert checkpoint.newest(folder).path == good


def test_a_manifest_that_points_outside_is_refused(folder: Path) -> None:
    path = checkpoint.write(folder, 1, fill_with(b"x"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {"../../secret": {"bytes": 1, "sha256": ""}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the checkpoint" in (checkpoint.verify(path) or "")


@pytest.mark.parametrize("moment", ["fill", "manifest", "rename"])
def test_a_write_that_fails_at_any_point_leaves_the_earlier_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    earlier = checkpoint.write(folder, 1, fill_with(b"x"))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    if moment == "manifest":
        monkeypatch.setattr(checkpoint, "write_json", fail)
    if moment == "rename":
        monkeypatch.setattr(checkpoint.os, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(folder, 2, fail if moment == "fill" else fill_with(b"y"))
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(folder).path == earlier


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(folder: Path) -> None:
    path = checkpoint.write(folder, 5, fill_with(b"x"))
    (path / "b.bin").unlink()
    checkpoint.write(folder, 5, fill_with(b"y"))
    assert checkpoint.newest(folder).step == 5
    assert (path / "b.bin").read_bytes() == b"yy"


def test_pruning_keeps_the_newest_and_clears_what_a_killed_writer_left(folder: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(folder, step, fill_with(b"x"))
    shutil.copytree(folder / "step-00000003", folder / ".step-00000004.abc.tmp")
    checkpoint.prune(folder, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]


def train_a_little(steps: int, seed: int = 0) -> tuple[torch.nn.Module, object, object]:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(steps):
        layer(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return layer, optimizer, scheduler


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def test_optimizer_schedule_and_generators_come_back_bit_for_bit(tmp_path: Path) -> None:
    _, optimizer, scheduler = train_a_little(3)
    numpy.random.standard_normal()  # leaves a half-used pair, part of numpy's state
    random.gauss(0, 1)
    checkpoint.save_training_state(tmp_path, optimizer, scheduler, ["weight", "bias"])
    expected = draws(), random.gauss(0, 1), float(numpy.random.standard_normal())

    _, other, other_scheduler = train_a_little(1, seed=1)
    checkpoint.load_training_state(tmp_path, other, other_scheduler, ["weight", "bias"])
    checkpoint.load_random_state(tmp_path)
    assert (draws(), random.gauss(0, 1), float(numpy.random.standard_normal())) == expected
    assert other_scheduler.state_dict() == scheduler.state_dict()
    mine, theirs = other.state_dict()["state"], optimizer.state_dict()["state"]
    assert mine.keys() == theirs.keys() == {0, 1}
    for index in theirs:
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(mine[index][key], theirs[index][key]), (index, key)


def test_a_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    _, optimizer, scheduler = train_a_little(1)
    checkpoint.save_training_state(tmp_path, optimizer, scheduler, ["weight", "bias"])
    with pytest.raises(QloraError, match="2 trainable parameters with other names"):
        checkpoint.load_training_state(tmp_path, optimizer, scheduler, ["bias", "weight"])


def test_a_schedule_that_is_not_json_is_refused_rather_than_pickled(tmp_path: Path) -> None:
    _, optimizer, scheduler = train_a_little(1)
    scheduler.extra = object()
    with pytest.raises(QloraError, match="cannot be checkpointed without pickle"):
        checkpoint.save_training_state(tmp_path, optimizer, scheduler, ["weight", "bias"])


def test_no_recipe_calls_pickle_or_torch_load() -> None:
    package = Path(qlora_rs.__file__).parent
    files = [*sorted((package / "recipes").rglob("*.py")), package / "cli.py"]
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert not {"pickle", "dill", "joblib"} & set(modules), file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, (
                    file
                )
