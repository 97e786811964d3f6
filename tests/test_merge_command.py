"""`qlora-rs merge`: whole or absent, resumed after any interruption, loaded by everybody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_model, write_sums
from torch import nn
from transformers import AutoModelForCausalLM

import qlora_rs
from qlora_rs import NF4Linear, QloraError, cli
from qlora_rs.merging import model as merge_of_models
from qlora_rs.recipes import merge as recipe
from qlora_rs.recipes import quantized_folder
from qlora_rs.recipes.merge import MergeSettings, merge_checkpoint
from qlora_rs.recipes.merge_store import LayerStore
from qlora_rs.recipes.quantized_folder import load_quantized_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter for it, and text."""
    place = tmp_path_factory.mktemp("merge")
    save_tiny_model(place / "model")
    write_sums(place / "sums.jsonl", 80)
    adapter(tiny_model(), place / "adapter")
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return place


def adapter(model: nn.Module, path: Path, **options: object) -> None:
    torch.manual_seed(9)
    qlora_rs.add_lora(qlora_rs.quantize_model(model, **options), r=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    qlora_rs.save_adapter(model, path)


def settings(place: Path, output: Path, **changes: object) -> MergeSettings:
    values = {
        "base": str(place / "model"), "adapter": str(place / "adapter"), "output": str(output),
        "calibration": str(place / "sums.jsonl"), "tokens": 2000, "length": 64,
        "dtype": "float32", **changes,
    }  # fmt: skip
    return MergeSettings(**values)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def merged(place: Path) -> Path:
    output = place / "merged"
    merge_checkpoint(settings(place, output))
    return output


def test_the_folder_holds_model_report_page_and_picture(merged: Path) -> None:
    names = {file.name for file in merged.iterdir()}
    assert {"config.json", "merge.json", "merge.html", "merge.svg", "tokenizer.json"} <= names
    report = json.loads((merged / "merge.json").read_text())
    assert len(report["layers"]) == 14
    assert report["merged"]["kl"] < report["nearest"]["kl"]
    assert "<svg" in (merged / "merge.html").read_text()
    assert not [file for file in merged.parent.iterdir() if file.name.startswith(".merged")]


def test_it_loads_through_transformers_and_bitsandbytes_with_equal_values(merged: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(merged, local_files_only=True).train()
    ours = load_quantized_folder(merged, "float32").model
    layers = [n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    for name in layers:
        weight = theirs.get_submodule(name).weight
        found = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(found, ours.get_submodule(name).dequantize(found.dtype))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-3, atol=1e-3)


def test_it_loads_without_a_tokenizer_for_those_who_bring_token_ids(
    merged: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(merged / name, bare / name)
    loaded = load_quantized_folder(bare, "float32", with_tokenizer=False)
    assert loaded.tokenizer is None
    ids = torch.arange(20)[None]
    assert torch.equal(
        loaded.model(ids).logits, load_quantized_folder(merged, "float32").model(ids).logits
    )
    with pytest.raises(QloraError, match="could not be loaded"):
        load_quantized_folder(bare, "float32")


def test_a_file_read_tensor_by_tensor_gives_the_same_model(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_quantized_folder(merged, "float32").model.state_dict()
    monkeypatch.setattr(quantized_folder, "READ_BYTES", 1)
    found = load_quantized_folder(merged, "float32").model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opened = tmp_path / "folder", []
    shutil.copytree(merged, folder)
    safe_open = quantized_folder.safetensors.safe_open

    def replacing(file: Path, **options: object) -> object:
        opened.append(file)
        if len(opened) == 3:
            shutil.copy(merged / file.name, folder / "new")
            (folder / "new").replace(file)
        return safe_open(file, **options)

    monkeypatch.setattr(quantized_folder, "READ_BYTES", 1)
    monkeypatch.setattr(quantized_folder.safetensors, "safe_open", replacing)
    with pytest.raises(QloraError, match="changed or replaced while it was read"):
        load_quantized_folder(folder, "float32")


def test_loading_imports_no_library_that_it_does_not_need(
    merged: Path, run_python: Callable
) -> None:
    done = run_python(f"""
        import sys
        from qlora_rs.recipes.quantized_folder import load_quantized_folder
        load_quantized_folder({str(merged)!r})
        print({{"datasets", "pandas", "peft", "bitsandbytes", "trl"}} & set(sys.modules))
    """)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_merging_in_memory_gives_the_same_bytes(place: Path, merged: Path) -> None:
    loaded = load_quantized_folder(merged, "float32").model
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = qlora_rs.load_adapter(qlora_rs.quantize_model(base), place / "adapter").eval()
    batches = recipe.read_calibration(
        place / "sums.jsonl", load_quantized_folder(merged).tokenizer, 2000, 64
    )
    qlora_rs.merge_model(model, "calibrated", batches)
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            assert torch.equal(module.dequantize(), loaded.get_submodule(name).dequantize()), name


@pytest.mark.parametrize("finished", [0, 1, 5, 13])
def test_an_interrupted_merge_goes_on_where_it_stopped(
    place: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    output = tmp_path / "out"
    keep, solve_one = LayerStore.put, merge_of_models.calibrate_unbiased
    kept, solved = [], []

    def put(self: LayerStore, name: str, *rest: object) -> None:
        if len(kept) == finished:
            raise KeyboardInterrupt
        kept.append(name)
        keep(self, name, *rest)

    def count(*arguments: object, **settings: object) -> object:
        solved.append(1)
        return solve_one(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "put", put)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(settings(place, output))
    assert not output.exists()
    monkeypatch.setattr(merge_of_models, "calibrate_unbiased", count)
    merge_checkpoint(settings(place, output))
    # Groups (q, k, v together) are done again when one of their layers is missing.
    assert 14 - finished <= len(solved) <= 14 - finished + 2
    assert weights(output) == weights(merged)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_killed_while_writing_the_output_is_absent_and_then_whole(
    place: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "merge_page", fail)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(settings(place, output))
    assert not output.exists()
    (tmp_path / ".out.0123.tmp").mkdir()  # what SIGKILL would leave
    merge_checkpoint(settings(place, output))
    assert weights(output) == weights(merged)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_layers_of_another_merge_or_damaged_ones_are_not_used(
    place: Path, merged: Path, tmp_path: Path
) -> None:
    output, work = tmp_path / "out", tmp_path / ".out.merging"
    store = LayerStore(work, {"another": "merge"})
    store.put("model.layers.0.self_attn.q_proj", qlora_rs.quantize(torch.eye(64)))
    merge_checkpoint(settings(place, output))
    assert weights(output) == weights(merged)
    store = LayerStore(work, {})
    store.put("a", qlora_rs.quantize(torch.eye(64)))
    for file in work.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    assert LayerStore(work, {}).get("a") is None


def test_overwrite_replaces_only_what_merge_made(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quick = settings(place, output, method="nearest")
    merge_checkpoint(quick)
    with pytest.raises(QloraError, match="use --overwrite"):
        merge_checkpoint(quick)
    (output / "old").touch()
    merge_checkpoint(quick, overwrite=True)
    assert not (output / "old").exists()
    (output / "merge.json").unlink()
    with pytest.raises(QloraError, match="was not made by qlora-rs merge"):
        merge_checkpoint(quick, overwrite=True)
    shutil.rmtree(output)
    output.touch()
    with pytest.raises(QloraError, match="not a directory"):
        merge_checkpoint(quick)


def test_bf16_is_the_unmerged_model_in_16_bits(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    merge_checkpoint(settings(place, output, to="bf16"))
    plain = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    model = qlora_rs.load_adapter(qlora_rs.quantize_model(tiny_model()), place / "adapter").eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (model, plain))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3


def test_separate_keeps_base_and_adapter_apart(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["merge", str(place / "model"), str(place / "adapter"), str(output), "--quiet"]
    assert cli.main([*command, "--adapter-separate", "--dtype", "float32"]) == 0
    assert "Nothing is lost this way" in " ".join(capsys.readouterr().out.split())
    model = load_quantized_folder(output, "float32").model
    qlora_rs.load_adapter(model, output / "adapter")
    expected = qlora_rs.load_adapter(qlora_rs.quantize_model(tiny_model()), place / "adapter")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, expected.eval()(ids).logits)


def test_hybrid_writes_the_small_adapter_beside_the_model(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    merge_checkpoint(settings(place, output, hybrid_rank=1))
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 1
    model = load_quantized_folder(output, "float32").model
    assert qlora_rs.load_adapter(model, output / "adapter") is model


def test_an_already_packed_base_is_merged_too(place: Path, merged: Path, tmp_path: Path) -> None:
    packed, output = tmp_path / "packed", tmp_path / "out"
    merge_checkpoint(settings(place, packed, to="separate"))
    merge_checkpoint(settings(place, output, base=str(packed)))
    again, first = (load_quantized_folder(f, "float32").model for f in (output, merged))
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(again.get_submodule(name).weight, first.get_submodule(name).weight)


@pytest.mark.parametrize("text", ["text.txt", None], ids=["plain text", "the model's own"])
def test_other_sources_of_text(place: Path, tmp_path: Path, text: str | None) -> None:
    file = None if text is None else str(place / text)
    record = merge_checkpoint(settings(place, tmp_path / "out", calibration=file, tokens=1024))
    assert 600 < record["calibration_tokens"] <= 1024
    assert record["summary"]["layers_worse_than_nearest"] == 0
    own = "wrote itself" in " ".join(record["report"].notes)
    assert own == (text is None)


def test_distilled_without_steps_keeps_the_scales_as_solved(place: Path, tmp_path: Path) -> None:
    record = merge_checkpoint(settings(place, tmp_path / "out", method="distilled", steps=0))
    assert "calibrate" in record["seconds"]
    assert "distill" not in record["seconds"]
    assert record["summary"]["kl_removed"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "best"], "--method must be one of nearest, calibrated, distilled"),
        (["--to", "int8"], "--to must be one of"),
        (["--tokens", "3"], "--tokens must be at least 512, got 3"),
        (["--method", "distilled", "--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--steps", "3"], "--steps 3 is for --method distilled"),
        (["--calibration", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--limit-kl", "1e-12"], "above the limit 1e-12"),
    ],
)
def test_refusals_are_sentences_and_leave_nothing(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    output = tmp_path / "out"
    command = ["merge", str(place / "model"), str(place / "adapter"), str(output), "--quiet"]
    text = [] if "--calibration" in changes else ["--calibration", str(place / "sums.jsonl")]
    assert cli.main([*command, *text, *changes]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not output.exists()


def test_an_adapter_for_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    other = qlora_rs.quantize_model(nn.Sequential(nn.Linear(64, 64)))
    qlora_rs.save_adapter(qlora_rs.add_lora(other), tmp_path / "adapter")
    with pytest.raises(QloraError, match=r"made for another model: it adapts 0"):
        merge_checkpoint(settings(place, tmp_path / "out", adapter=str(tmp_path / "adapter")))


def test_the_training_run_tells_how_the_base_was_quantized(place: Path, tmp_path: Path) -> None:
    from qlora_rs.recipes.finetune import finetune
    from qlora_rs.recipes.settings import FinetuneSettings

    run = tmp_path / "run"
    finetune(
        FinetuneSettings(
            str(place / "model"), str(place / "sums.jsonl"), str(run), max_steps=1,
            block_size=32, max_length=64, dtype="float32",
        )
    )  # fmt: skip
    changes = {"adapter": str(run / "adapter"), "calibration": None}
    record = merge_checkpoint(settings(place, tmp_path / "out", **changes))
    model = load_quantized_folder(tmp_path / "out").model
    assert {m.block_size for m in model.modules() if isinstance(m, NF4Linear)} == {32}
    assert "calibrated on the training data" in " ".join(record["report"].notes)
    # A base that was packed otherwise is merged all the same, with a warning of what was found.
    merge_checkpoint(settings(place, tmp_path / "packed", to="separate"))
    changes["base"] = str(tmp_path / "packed")
    record = merge_checkpoint(settings(place, tmp_path / "other", **changes))
    assert "blocks of 32" in record["notes"][0]
    assert "this base has blocks of 64" in record["notes"][0]
