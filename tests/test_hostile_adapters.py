"""Adapters that lie, are cut short, or belong elsewhere: refused whole, the model untouched."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tiny_llama
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlora_rs
from qlora_rs import QloraError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
KEY_A, KEY_B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter, without the metadata that only our own files have."""
    folder = tmp_path_factory.mktemp("valid")
    qlora_rs.save_adapter(tiny_llama.with_adapter(), folder)
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    return folder


@pytest.fixture
def model() -> nn.Module:
    """A refusal must leave it as it is."""
    return tiny_llama.quantized()


def snapshot(model: nn.Module) -> list[tuple]:
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    parameters = [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]
    values = [hash(p.detach().numpy().tobytes()) for p in model.parameters()]
    return [modules, parameters, values]


def refusal(model: nn.Module, folder: Path) -> str:
    before = snapshot(model)
    with pytest.raises(QloraError) as caught:
        qlora_rs.load_adapter(model, folder)
    assert snapshot(model) == before
    return str(caught.value)


def with_tensors(valid: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    shutil.copytree(valid, folder, dirs_exist_ok=True)
    tensors = load_file(valid / "adapter_model.safetensors")
    change(tensors)
    separate = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(separate, folder / "adapter_model.safetensors")
    return folder


def with_config(valid: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(valid, folder, dirs_exist_ok=True)
    config = json.loads((valid / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_the_adapter_that_these_tests_damage_is_good(valid: Path) -> None:
    qlora_rs.load_adapter(tiny_llama.quantized(), valid)


def another_layer(module: str, out_features: int = 64) -> Callable[[dict], object]:
    lora = {"A": torch.zeros(4, 64), "B": torch.zeros(out_features, 4)}
    name = f"base_model.model.{module}.lora_"
    return lambda tensors: tensors.update({f"{name}{half}.weight": lora[half] for half in "AB"})


def put(key: str, tensor: Tensor) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({key: tensor})


TENSOR_LIES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "A is missing": (
        lambda t: t.pop(KEY_A),
        r"holds only lora_B of .*layers\.0\.self_attn\.q_proj",
    ),
    "B is missing": (lambda t: t.pop(KEY_B), "holds only lora_A"),
    "a layer is missing": (lambda t: (t.pop(KEY_A), t.pop(KEY_B)), "lacks 1 layer"),
    "a layer is too many": (
        another_layer("model.layers.7.self_attn.q_proj"),
        "made for another model: it adapts model.layers.7.self_attn.q_proj, .* no such layer",
    ),
    "lm_head is adapted": (another_layer("lm_head"), "lm_head, which .* not quantized here"),
    "a norm is adapted": (another_layer("model.norm"), "it adapts model.norm, .* a LlamaRMSNorm"),
    "an embedding is adapted": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 64)),
        "not a LoRA matrix",
    ),
    "a DoRA magnitude": (put(f"{Q_PROJ}.lora_magnitude_vector", torch.zeros(64)), "not a LoRA"),
    "A is too wide": (put(KEY_A, torch.zeros(4, 65)), r"is \[64, 64\] here, \[64, 65\] there"),
    "B is too long": (put(KEY_B, torch.zeros(65, 4)), r"is \[64, 64\] here, \[65, 64\] there"),
    "A has another rank": (put(KEY_A, torch.zeros(5, 64)), "says r=4"),
    "B has another rank": (put(KEY_B, torch.zeros(64, 5)), "says r=4"),
    "A is transposed": (put(KEY_A, torch.zeros(64, 4)), "says r=4"),
    "A has three dimensions": (put(KEY_A, torch.zeros(1, 4, 64)), "says r=4"),
    "A is a scalar": (put(KEY_A, torch.tensor(1.0)), "says r=4"),
    "A holds whole numbers": (
        put(KEY_A, torch.zeros(4, 64, dtype=torch.int8)),
        "not finite floats",
    ),
    "A holds NaN": (lambda t: t[KEY_A][-1:, -1:].fill_(float("nan")), "not finite floats"),
    "B holds infinity": (lambda t: t[KEY_B][:1, :1].fill_(-float("inf")), "not finite floats"),
    "nothing is there": (lambda t: t.clear(), "lacks"),
    "a key has no prefix": (put("x", torch.zeros(1)), "'x', which is not a LoRA"),
}


@pytest.mark.parametrize("lie", TENSOR_LIES)
def test_tensors_that_do_not_fit_are_refused(
    lie: str, valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    change, message = TENSOR_LIES[lie]
    assert re.search(message, refusal(model, with_tensors(valid, tmp_path, change)))


CONFIG_LIES: dict[str, tuple[dict, str]] = {
    "another rank": ({"r": 8}, "says r=8"),
    "another rank by pattern": ({"rank_pattern": {"q_proj": 3}}, "says r=3"),
    "DoRA": ({"use_dora": True}, "uses use_dora, which this package does not compute"),
    "biases": ({"bias": "all"}, "uses bias"),
    "LoRA biases": ({"lora_bias": True}, "uses lora_bias"),
    "fan in": ({"fan_in_fan_out": True}, "uses fan_in_fan_out"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
    "another method": ({"peft_type": "IA3"}, "describes a IA3 adapter"),
    "no method": ({"peft_type": None}, "describes a None adapter"),
    "more targets than tensors": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "a rank that is no number": ({"r": "four"}, "r"),
    "an alpha that is no number": ({"lora_alpha": "eight"}, "lora_alpha"),
    "an alpha that is not finite": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "a dropout above one": ({"lora_dropout": 1.5}, "dropout"),
    "a dropout that is no number": ({"lora_dropout": "some"}, "dropout"),
    "patterns that are no dict": ({"rank_pattern": [1]}, "rank_pattern"),
    "a pattern that is no expression": ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
    "targets that are no names": ({"target_modules": [1, 2]}, "target_modules"),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_a_config_that_does_not_fit_is_refused(
    lie: str, valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    changes, message = CONFIG_LIES[lie]
    assert message in refusal(model, with_config(valid, tmp_path, **changes))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"LORA"', "\x00", "[" * 100_000, '{"peft_type": "LORA"'],
    ids=lambda text: repr(text[:9]),
)  # fmt: skip
def test_a_config_that_is_not_a_json_object_is_refused(
    text: str, valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(model, tmp_path)


def test_a_config_that_is_not_text_is_refused(
    valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read" in refusal(model, tmp_path)


def test_a_folder_that_is_missing_empty_or_a_file_is_refused(
    model: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert "adapter_config.json" in refusal(model, folder)


def test_weights_cut_at_any_byte_are_refused(valid: Path, model: nn.Module, tmp_path: Path) -> None:
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {*range(20), *range(20, header, 97), header - 1, header, header + 1, len(whole) - 1}
    for cut in sorted(cuts | set(range(header, len(whole), len(whole) // 20))):
        weights.write_bytes(whole[:cut])
        assert "cannot be read" in refusal(model, tmp_path), cut


def test_weights_with_trailing_bytes_or_a_false_header_are_refused(
    valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    lengths = [
        length.to_bytes(8, "little") for length in (0, 1, len(whole), 2**40, 2**63, 2**64 - 1)
    ]
    for data in (whole + b"\0", *(length + whole[8:] for length in lengths), b"\0" * 64):
        weights.write_bytes(data)
        assert "cannot be read" in refusal(model, tmp_path)


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_flipped_bit_in_the_header_is_refused_or_harmless(
    at: int, bit: int, valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[at % (8 + int.from_bytes(data[:8], "little"))] ^= 1 << bit
    weights.write_bytes(data)
    try:
        qlora_rs.load_adapter(model, tmp_path)
    except QloraError:
        assert not any(isinstance(m, qlora_rs.QLoRALinear) for m in model.modules())
    else:
        qlora_rs.remove_lora(model)  # e.g. a flip in the metadata, or one between two dtypes


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "fired"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_is_never_loaded(
    name: str, write: str, valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_model.safetensors").unlink()
    canary = Canary(tmp_path / "canary")
    if write == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(canary))
    else:
        torch.save({"x": canary}, tmp_path / name)
    message = refusal(model, tmp_path)
    assert not (tmp_path / "canary").exists()
    if name.endswith("bin"):
        assert "adapter_model.bin is a pickle and is never loaded, so convert it" in message


def test_files_that_were_not_saved_together_are_refused(model: nn.Module, tmp_path: Path) -> None:
    qlora_rs.save_adapter(tiny_llama.with_adapter(alpha=8), tmp_path)
    config = (tmp_path / "adapter_config.json").read_bytes()
    qlora_rs.save_adapter(tiny_llama.with_adapter(alpha=16), tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(config)
    message = refusal(model, tmp_path)
    assert "were not saved together (lora_alpha is 8 in one and 16 in the other)" in message


@pytest.mark.parametrize("metadata", ["", "{", "[]", "null", "3", '"x"'])
def test_metadata_that_is_damaged_is_refused(
    metadata: str, valid: Path, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"qlora_rs.scaling": metadata})
    assert "adapter_model.safetensors" in refusal(model, tmp_path)


def test_a_real_dora_adapter_of_peft_is_refused(model: nn.Module, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(tiny_llama.dequantized(model), config).save_pretrained(tmp_path)
    assert "use_dora" in refusal(model, tmp_path)


def test_an_adapter_of_a_smaller_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    smaller = tiny_llama.with_adapter()
    del smaller.model.layers[1]
    qlora_rs.save_adapter(smaller, tmp_path)
    assert "lacks" in refusal(model, tmp_path)


def test_an_adapter_is_refused_by_a_float_model(valid: Path) -> None:
    said = refusal(tiny_llama.dense(), valid)
    assert "is not quantized here (a Linear); call quantize_model(model) first" in said


def test_an_adapter_on_fewer_layers_than_the_models_own_is_refused(tmp_path: Path) -> None:
    qlora_rs.save_adapter(tiny_llama.with_adapter(target_modules=["q_proj"]), tmp_path)
    assert "lacks" in refusal(tiny_llama.with_adapter(), tmp_path)
