"""Adapters on disk, in peft's format: `adapter_model.safetensors` and `adapter_config.json`.

peft loads what `save_adapter` writes and the other way round. Keys are
`base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. Nothing is ever
unpickled, and a model is changed only after the whole adapter was found to fit.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qlora_rs.errors import QloraError, check_model
from qlora_rs.files import write_atomically, write_json
from qlora_rs.layers import NF4Linear, QLoRALinear
from qlora_rs.model import is_of_peft, lora_layers, replace_module, select_targets

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# What decides the scaling; a copy in the weights' metadata shows files that do not belong together.
_SCALING_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def save_adapter(
    model: nn.Module, path: str | Path, base_model_name_or_path: str | None = None
) -> Path:
    """Write the model's adapter to the directory `path` so that peft can load it.

    Creates the directory; replaces an adapter there file by file, each atomically. Returns the
    directory. Raises QloraError when the model has no adapter.

    >>> import tempfile
    >>> model = add_lora(quantize_model(nn.Sequential(nn.Linear(64, 64))))
    >>> sorted(file.name for file in save_adapter(model, tempfile.mkdtemp()).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_model(model)
    layers = lora_layers(model)
    if not layers:
        if is_of_peft(model):
            raise QloraError(
                "the model's adapter is peft's, which saves it itself: "
                f"model.save_pretrained({str(path)!r})"
            )
        raise QloraError("the model has no adapter to save; call add_lora(model) first")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = _config(model, layers, base_model_name_or_path)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    scaling = json.dumps({field: config[field] for field in _SCALING_FIELDS}, sort_keys=True)
    data = safetensors.torch.save(tensors, metadata={"format": "pt", "qlora_rs.scaling": scaling})
    write_atomically(path / WEIGHTS, _in_order(data))
    write_json(path / CONFIG, config)
    return path


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: equal adapters make equal files.

    safetensors writes metadata in the order of a hash table that is seeded at random.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[end:]


def _config(
    model: nn.Module, layers: dict[str, QLoRALinear], base_model_name_or_path: str | None
) -> dict[str, Any]:
    rank = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    first = next(iter(layers.values()))
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        raise QloraError("some layers use rslora and some do not; peft's format cannot say that")
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "base_model_name_or_path": base_model_name_or_path,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "target_modules": _target_modules(model, layers),
        "rank_pattern": {_pattern(n): m.r for n, m in layers.items() if m.r != rank},
        "alpha_pattern": {_pattern(n): m.alpha for n, m in layers.items() if m.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _pattern(name: str) -> str:
    """peft reads the keys of its patterns as regular expressions."""
    return f"^{re.escape(name)}"


def _target_modules(model: nn.Module, layers: dict[str, QLoRALinear]) -> list[str]:
    """Short names where they mean exactly these layers, else full ones."""
    short = {name.rpartition(".")[2] for name in layers}
    meant = {n for n, _ in model.named_modules() if n and n.rpartition(".")[2] in short}
    return sorted(short if meant == set(layers) and all(short) else layers)


@dataclass(frozen=True)
class _LayerAdapter:
    lora_a: Tensor
    lora_b: Tensor
    alpha: float


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Load the adapter in the directory `path`, written by `save_adapter` or by peft.

    model: quantized, without adapter (layers get one, in place) or with the same adapter layers
    (their values are replaced). Returns the model, in the training mode it was in.
    Raises QloraError, and leaves the model untouched, when a file is missing or damaged, when the
    adapter is of a kind this package does not compute (DoRA, biases, other peft methods), or when
    its layers, ranks or shapes do not fit the model.
    """
    check_model(model)
    path = Path(path)
    config = _read_config(path)
    tensors, metadata = _read_weights(path)
    _check_belong_together(path, config, metadata)
    adapters = _group(path, tensors, config)
    _check_fit(model, path, config, adapters)
    use_rslora = bool(config.get("use_rslora", False))
    dropout = float(config.get("lora_dropout", 0.0))
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, NF4Linear)
        base = layer.without_adapter() if isinstance(layer, QLoRALinear) else layer
        new = QLoRALinear(base, adapter.lora_a.shape[0], adapter.alpha, dropout, use_rslora)
        with torch.no_grad():
            new.lora_A.copy_(adapter.lora_a)
            new.lora_B.copy_(adapter.lora_b)
        new.train(layer.training)
        if isinstance(layer, QLoRALinear):
            # Keep the parameters themselves: an optimizer may hold them.
            with torch.no_grad():
                layer.lora_A.copy_(new.lora_A)
                layer.lora_B.copy_(new.lora_B)
            layer.alpha, layer.scaling = new.alpha, new.scaling
            layer.use_rslora, layer.dropout = use_rslora, dropout
        else:
            replace_module(model, name, new)
    return model


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QloraError(
            f"{path} holds no adapter: {CONFIG} is missing; give the directory that save_adapter, "
            "qlora-rs finetune (OUTPUT/adapter) or peft wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise QloraError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise QloraError(f"{file} describes a {kind} adapter; only LORA can be loaded")
    unsupported = {
        "use_dora": bool(config.get("use_dora")),
        "lora_bias": bool(config.get("lora_bias")),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "bias": config.get("bias", "none") != "none",
    }
    found = [name for name, used in unsupported.items() if used]
    if found:
        raise QloraError(
            f"{file} uses {', '.join(found)}, which this package does not compute; load it with "
            "peft instead"
        )
    _check_fields(file, config)
    return config


def _check_fields(file: Path, config: dict[str, Any]) -> None:
    """Refuse values of the wrong kind here, so that no later code meets them."""

    def number(value: object) -> bool:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]

    def patterns(value: object) -> bool:
        return value is None or (
            isinstance(value, dict)
            and all(_is_pattern(key) and number(entry) for key, entry in value.items())
        )

    def targets(value: object) -> bool:
        if isinstance(value, str):
            return _is_pattern(value)
        return value is None or (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        )

    valid = {
        "r": lambda value: type(value) is int and value >= 1,
        "lora_alpha": number,
        "lora_dropout": lambda value: number(value) and 0.0 <= value < 1.0,
        "use_rslora": lambda value: value is None or isinstance(value, bool),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": targets,
    }
    for field, is_valid in valid.items():
        if field in config and not is_valid(config[field]):
            raise QloraError(f"{file} has {field}={config[field]!r}, which is no value for it")


def _is_pattern(value: object) -> bool:
    try:
        re.compile(value)  # type: ignore[call-overload]
    except (re.error, TypeError, RecursionError):
        return False
    return True


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = path / WEIGHTS
    if not file.exists():
        pickled = path / "adapter_model.bin"
        remedy = (
            f"; {pickled.name} is a pickle and is never loaded, so convert it with peft "
            "(save_pretrained with safe_serialization=True)"
            if pickled.exists()
            else ""
        )
        raise QloraError(f"{path} holds no adapter: {WEIGHTS} is missing{remedy}")
    try:
        # Read whole, not mapped: a mapped file that somebody truncates kills the process.
        data = file.read_bytes()
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise QloraError(f"{file} cannot be read: {error}") from error
    return tensors, metadata


def _check_belong_together(path: Path, config: dict[str, Any], metadata: dict[str, str]) -> None:
    """A crash between the two files of a replaced adapter leaves one of each."""
    if "qlora_rs.scaling" not in metadata:
        return
    try:
        saved = json.loads(metadata["qlora_rs.scaling"])
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise QloraError(f"the metadata of {path / WEIGHTS} is damaged; save the adapter again")
    differ = [f for f in _SCALING_FIELDS if f in config and config[f] != saved.get(f)]
    if differ:
        raise QloraError(
            f"{path}: {CONFIG} and {WEIGHTS} were not saved together ({differ[0]} is "
            f"{config[differ[0]]} in one and {saved.get(differ[0])} in the other); save again"
        )


def _group(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, _LayerAdapter]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.*)\.lora_([AB])\.weight", key)
        if match is None:
            raise QloraError(
                f"{path / WEIGHTS} holds {key!r}, which is not a LoRA matrix of a linear layer"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    adapters = {}
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise QloraError(f"{path / WEIGHTS} holds only lora_{min(half)} of {name}")
        rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        lora_a, lora_b = half["A"], half["B"]
        if lora_a.dim() != 2 or lora_b.dim() != 2 or {lora_a.shape[0], lora_b.shape[1]} != {rank}:
            raise QloraError(
                f"{path}: {name} has lora_A {list(lora_a.shape)} and lora_B "
                f"{list(lora_b.shape)}, but {CONFIG} says r={rank}"
            )
        for matrix in half.values():
            if not matrix.is_floating_point() or not torch.isfinite(matrix).all():
                raise QloraError(
                    f"{path / WEIGHTS}: the adapter of {name} holds values that are not finite "
                    "floats"
                )
        adapters[name] = _LayerAdapter(lora_a, lora_b, alpha)
    return adapters


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_same_adapter(
    path: Path, held: dict[str, QLoRALinear], adapters: dict[str, _LayerAdapter]
) -> None:
    """Refuse to give layers other parameters than those that an optimizer may hold."""
    if not held:
        return
    remedy = "call remove_lora(model) first, and build the optimizer afterwards"
    for name, adapter in sorted(adapters.items()):
        rank = adapter.lora_a.shape[0]
        if name not in held:
            raise QloraError(
                f"the adapter in {path} adapts {name}, which the model's own adapter leaves out; "
                f"{remedy}"
            )
        if held[name].r != rank:
            raise QloraError(
                f"the adapter in {path} has rank {rank} in {name}, the model's own adapter "
                f"{held[name].r}; {remedy}"
            )


def _check_fit(
    model: nn.Module, path: Path, config: dict[str, Any], adapters: dict[str, _LayerAdapter]
) -> None:
    modules = dict(model.named_modules())
    for name, adapter in adapters.items():
        layer = modules.get(name)
        if not isinstance(layer, NF4Linear):
            if isinstance(layer, nn.Linear):
                raise QloraError(
                    f"{name}, which the adapter in {path} adapts, is not quantized here (a "
                    f"{type(layer).__name__}); call quantize_model(model) first, with a skip that "
                    "does not name this layer"
                )
            found = "no such layer" if layer is None else f"a {type(layer).__name__}"
            raise QloraError(
                f"the adapter in {path} was made for another model: it adapts {name}, where this "
                f"model has {found}; load the base model that it was trained on"
            )
        found_shape = (adapter.lora_b.shape[0], adapter.lora_a.shape[1])
        if found_shape != (layer.out_features, layer.in_features):
            raise QloraError(
                f"the adapter in {path} was made for another model: {name} is "
                f"[{layer.out_features}, {layer.in_features}] here, {list(found_shape)} there"
            )
    _check_same_adapter(path, lora_layers(model), adapters)
    missing: set[str] = set()
    selective = config.get("layers_to_transform") or config.get("exclude_modules")
    if config.get("target_modules") and not selective:
        missing = set(select_targets(model, config["target_modules"])) - adapters.keys()
    missing |= lora_layers(model).keys() - adapters.keys()
    if missing:
        raise QloraError(
            f"the adapter in {path} lacks {len(missing)} layer(s) that it or this model should "
            f"have, the first {min(missing)}; it was cut short or made for another model"
        )
