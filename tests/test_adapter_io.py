"""Adapters to peft and back: the same logits on both sides."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import peft
import pytest
import tiny_llama
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_llama import logits

import qlora_rs

# Warnings of peft about models that come from no hub.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

OPTIONS = {
    "all linear layers": {},
    "attention": {"target_modules": "attention"},
    "a list": {"target_modules": ["q_proj", "down_proj"]},
    "one layer by its full name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "a regular expression": {"target_modules": r"model\.layers\.0\..*"},
    "rslora": {"use_rslora": True},
    "rank 1": {"r": 1, "alpha": 3},
    "dropout": {"dropout": 0.1},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_peft_loads_our_adapter_and_gives_our_logits(options: str, tmp_path: Path) -> None:
    model = tiny_llama.with_adapter(**OPTIONS[options])
    base = tiny_llama.dequantized(qlora_rs.remove_lora(tiny_llama.quantized()))
    before = logits(base)
    qlora_rs.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(model) - before).abs().max() > 0.01


def test_peft_applies_our_ranks_and_alphas_layer_by_layer(tmp_path: Path) -> None:
    model = tiny_llama.quantized()
    qlora_rs.add_lora(model, r=4, alpha=8, target_modules=["q_proj", "gate_proj"])
    targets = {"model.layers.0.mlp.up_proj": (2, 8), "model.layers.1.mlp.up_proj": (4, 3)}
    for name, (r, alpha) in targets.items():
        layer = qlora_rs.QLoRALinear(model.get_submodule(name), r=r, alpha=alpha)
        qlora_rs.model.replace_module(model, name, layer)
    tiny_llama.randomize(model)
    qlora_rs.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == 1
    assert len(config["alpha_pattern"]) == 1
    base = tiny_llama.dequantized(tiny_llama.quantized())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    ours = qlora_rs.load_adapter(tiny_llama.quantized(), tmp_path)
    assert torch.equal(logits(ours.eval()), logits(model))


PEFT_OPTIONS = {
    "all linear layers": {"target_modules": "all-linear"},
    "a list": {"target_modules": ["q_proj", "v_proj"]},
    "a regular expression": {"target_modules": r".*\.1\..*_proj"},
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "an exclusion": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"model.layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"layers.0.mlp.up_proj": 5, "q_proj": 3},
    },
    "an anchored pattern": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3},
    },
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.2},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_we_load_pefts_adapter_and_give_its_logits(options: str, tmp_path: Path) -> None:
    ours = tiny_llama.quantized()
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **PEFT_OPTIONS[options])
    theirs = tiny_llama.randomize(peft.get_peft_model(tiny_llama.dequantized(ours), config))
    theirs.save_pretrained(tmp_path)
    qlora_rs.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_our_adapter_comes_back_with_equal_logits(options: str, tmp_path: Path) -> None:
    model = tiny_llama.with_adapter(**OPTIONS[options])
    qlora_rs.save_adapter(model, tmp_path)
    loaded = qlora_rs.load_adapter(tiny_llama.quantized(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_loads_into_its_own_layers_in_place(tmp_path: Path) -> None:
    model = tiny_llama.with_adapter()
    expected = logits(model)
    qlora_rs.save_adapter(model, tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    qlora_rs.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
    # An optimizer that holds the parameters goes on training the right ones.
    found = [p for p in model.parameters() if p.requires_grad]
    assert all(ours is kept for ours, kept in zip(found, parameters, strict=True))


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        ({"r": 8}, "has rank 4 in model.layers.0.*, the model's own adapter 8; call remove_lora"),
        ({"target_modules": "attention"}, r"mlp\.\w+, which the model's own adapter leaves"),
    ],
)
def test_another_adapter_than_the_models_own_is_refused(
    held: dict, sentence: str, tmp_path: Path
) -> None:
    qlora_rs.save_adapter(tiny_llama.with_adapter(), tmp_path)
    model = tiny_llama.with_adapter(**held)
    before, expected = list(model.parameters()), logits(model)
    with pytest.raises(qlora_rs.QloraError, match=sentence):
        qlora_rs.load_adapter(model, tmp_path)
    assert all(ours is kept for ours, kept in zip(model.parameters(), before, strict=True))
    assert torch.equal(logits(model), expected)
    qlora_rs.load_adapter(qlora_rs.remove_lora(model), tmp_path)


def test_pefts_adapter_is_neither_frozen_nor_saved_as_ours(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(tiny_llama.quantized(), config)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(qlora_rs.QloraError, match=r"has an adapter of peft.*unload"):
        qlora_rs.add_lora(model)
    assert [p.requires_grad for p in model.parameters()] == trained
    with pytest.raises(qlora_rs.QloraError, match=r"model\.save_pretrained"):
        qlora_rs.save_adapter(model, tmp_path)


def test_loading_into_adapter_layers_takes_over_alpha_and_dropout(tmp_path: Path) -> None:
    model = tiny_llama.with_adapter(alpha=20, dropout=0.25)
    qlora_rs.save_adapter(model, tmp_path)
    other = qlora_rs.load_adapter(tiny_llama.with_adapter(alpha=8, dropout=0.0), tmp_path)
    layers = [m for m in other.modules() if isinstance(m, qlora_rs.QLoRALinear)]
    assert {(layer.alpha, layer.scaling, layer.dropout) for layer in layers} == {(20, 5.0, 0.25)}


def test_only_the_adapter_is_trainable_after_loading(tmp_path: Path) -> None:
    qlora_rs.save_adapter(tiny_llama.with_adapter(), tmp_path)
    model = qlora_rs.load_adapter(tiny_llama.quantized().train(), tmp_path)
    assert model.training
    assert all(module.training for module in model.modules())
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


def test_the_files_are_pefts(tmp_path: Path) -> None:
    qlora_rs.save_adapter(tiny_llama.with_adapter(), tmp_path / "new" / "folder", "some/base")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert tensors[key].shape == (4, 64)
    config = peft.PeftConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 8, "some/base")
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_of_new_files_follows_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        qlora_rs.save_adapter(tiny_llama.with_adapter(), tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}


def test_saving_over_an_adapter_keeps_its_mode_and_leaves_no_other_file(tmp_path: Path) -> None:
    model = tiny_llama.with_adapter()
    qlora_rs.save_adapter(model, tmp_path)
    for file in tmp_path.iterdir():
        file.chmod(0o640)
    tiny_llama.randomize(model)
    qlora_rs.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}
    loaded = qlora_rs.load_adapter(tiny_llama.quantized(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_a_save_that_fails_leaves_the_old_files_and_no_temporary_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama.with_adapter()
    qlora_rs.save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    tiny_llama.randomize(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            qlora_rs.save_adapter(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_model_without_adapter_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(qlora_rs.QloraError, match="no adapter to save"):
        qlora_rs.save_adapter(tiny_llama.quantized(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_equal_adapters_make_equal_files(tmp_path: Path) -> None:
    model = tiny_llama.with_adapter()
    files = [
        qlora_rs.save_adapter(model, tmp_path / str(i)) / "adapter_model.safetensors"
        for i in range(6)
    ]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as held:
        assert held.metadata()["format"] == "pt"
        for name in held.keys():  # noqa: SIM118
            layer = model.get_submodule(name.removeprefix("base_model.model.").rsplit(".", 2)[0])
            assert torch.equal(held.get_tensor(name), getattr(layer, name.split(".")[-2]))
