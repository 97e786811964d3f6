"""Model surgery: quantize a model's linear layers, add adapters, switch them off and on.

All of it works on any `nn.Module`, in place, layer by layer: at no time do the float and the
packed copy of more than one layer exist beside each other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

from qlora_rs.errors import QloraError, check_model
from qlora_rs.layers import NF4Linear, QLoRALinear
from qlora_rs.ops import DEVICES, check_weight

# Names of attention projections in the model families of transformers.
ATTENTION = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj",
    "query_key_value", "query", "key", "value", "c_attn", "Wqkv", "qkv",
)  # fmt: skip


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` by `NF4Linear`, in place, and freeze the whole model.

    skip: layers to leave as they are, by full name or last part of it ("lm_head",
    "model.layers.0.mlp.down_proj"). A layer whose weight is tied to another module's is left alone
    too, since packing it would untie it. progress: called as (done, total, name) after each layer.
    Returns the model. Raises QloraError, and leaves the model as it was, when no layer is left to
    quantize or a weight holds NaN or infinity.

    >>> model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    >>> type(model[0]).__name__
    'NF4Linear'
    """
    chosen = layers_to_quantize(model, skip)
    for name, module in chosen:
        _check_layer(name, module, block_size, double_quant)
    model.requires_grad_(False)
    for done, (name, module) in enumerate(chosen, start=1):
        layer = NF4Linear.from_linear(module, block_size, double_quant, compute_dtype)
        replace_module(model, name, layer.train(module.training))
        if progress is not None:
            progress(done, len(chosen), name)
    return model


def layers_to_quantize(
    model: nn.Module, skip: Iterable[str] = ("lm_head",)
) -> list[tuple[str, nn.Linear]]:
    """The layers that `quantize_model` would replace, by full name; raises QloraError likewise."""
    check_model(model)
    skip = frozenset([skip] if isinstance(skip, str) else skip)
    names = {name for name, _ in model.named_modules()}
    ends = {name.rpartition(".")[2] for name in names}
    unknown = skip - names - ends - {"lm_head"}
    if unknown:
        raise QloraError(f"skip names {sorted(unknown)}, but the model has no such layer")
    if type(model) is nn.Linear:
        raise QloraError(
            "the model itself is an nn.Linear, which cannot be replaced in place; use "
            "NF4Linear.from_linear(model)"
        )
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name not in skip
        and name.rpartition(".")[2] not in skip
        and owners[id(module.weight)] == 1
    ]
    if not chosen:
        raise QloraError(
            f"the model has no nn.Linear to quantize outside skip={sorted(skip)}; one that is "
            "quantized already needs no second call, others a smaller skip"
        )
    return chosen


def _check_layer(name: str, module: nn.Linear, block_size: int, double_quant: bool) -> None:
    """Refuse what cannot be quantized, before any layer is replaced: the model stays whole."""
    try:
        check_weight(module.weight, block_size, double_quant)
    except QloraError as error:
        raise QloraError(f"{name}: {error}; nothing was quantized") from error
    if module.weight.device.type not in DEVICES:
        raise QloraError(
            f"{name}.weight is on {module.weight.device}; nothing was quantized, so move the "
            'model to the CPU first with .to("cpu")'
        )
    if module.weight.device.type != "meta" and not torch.isfinite(module.weight).all():
        count = int((~torch.isfinite(module.weight)).sum())
        first = (~torch.isfinite(module.weight)).nonzero()[0].tolist()
        raise QloraError(
            f"{name}.weight holds {count} NaN or infinite value(s), the first at {first}; "
            "nothing was quantized, so clean or skip this layer"
        )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is, and wherever else the module there stands."""
    replace_modules(model, {name: module})


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """The same for many at once, in one search through the model; none may be inside another."""
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    places = [
        (place, new[id(old)])
        for place, old in model.named_modules(remove_duplicate=False)
        if id(old) in new
    ]
    for place, module in places:
        parent, _, attribute = place.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def select_targets(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Names of the quantized layers that `target_modules` means.

    "all-linear": every one. "attention": those named like attention projections. Another string: a
    regular expression that the full name must match, as in peft. A list: full names or last parts.
    Raises QloraError when nothing matches, or a listed name matches nothing.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    if not names:
        raise QloraError("the model has no NF4Linear; call quantize_model(model) first")
    return match_targets(names, target_modules)


def match_targets(names: list[str], target_modules: str | Iterable[str]) -> list[str]:
    """Those of the quantized layers' names that `target_modules` means; see `select_targets`."""
    if target_modules == "all-linear":
        return names
    if isinstance(target_modules, str) and target_modules != "attention":
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise QloraError(
                f"target_modules={target_modules!r} is not a regular expression: {error}"
            ) from error
        found = [name for name in names if pattern.fullmatch(name)]
        wanted: set[str] = set()
    else:
        wanted = set(ATTENTION if target_modules == "attention" else target_modules)
        found = [n for n in names if n in wanted or any(n.endswith("." + w) for w in wanted)]
    if not found:
        raise QloraError(
            f"target_modules={target_modules!r} matches none of the {len(names)} quantized "
            f"layers, whose names look like {names[0]!r}; give the ends of such names, "
            '"attention" or "all-linear"'
        )
    if not isinstance(target_modules, str):
        missing = {w for w in wanted if not any(n == w or n.endswith("." + w) for n in names)}
        if missing:
            raise QloraError(
                f"target_modules names {sorted(missing)}, which match no quantized layer; names "
                f"look like {names[0]!r}"
            )
    return found


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: str | Iterable[str] = "all-linear",
    use_rslora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Give quantized layers a trainable adapter each, in place; everything else is frozen.

    r, alpha, dropout, use_rslora: see `QLoRALinear`. target_modules: see `select_targets`.
    dtype: of the adapter's matrices. Returns the model. Raises QloraError, and leaves the model as
    it was, when targets match nothing or a layer has an adapter already, ours or peft's.

    >>> model = add_lora(quantize_model(nn.Sequential(nn.Linear(64, 64))), r=4, alpha=8)
    >>> trainable_parameters(model)
    (512, 4672)
    """
    check_model(model)
    if is_of_peft(model):
        raise QloraError(
            "the model has an adapter of peft, which would be frozen; train that one, or take it "
            "off with model = model.unload() first"
        )
    targets = select_targets(model, target_modules)
    taken = [name for name in targets if isinstance(model.get_submodule(name), QLoRALinear)]
    if taken:
        raise QloraError(f"{taken[0]} has an adapter already; remove it with remove_lora(model)")
    layers = []
    for name in targets:
        base = model.get_submodule(name)
        assert isinstance(base, NF4Linear)
        layer = QLoRALinear(base, r, alpha, dropout, use_rslora, dtype)
        layers.append((name, layer.train(base.training)))
    model.requires_grad_(False)
    for name, layer in layers:
        replace_module(model, name, layer)
    return model


def is_of_peft(model: nn.Module) -> bool:
    """Whether peft has adapted a layer of the model."""
    # Without importing peft, which those who have its layers have done.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    kind = getattr(tuners, "BaseTunerLayer", None)
    return kind is not None and any(isinstance(module, kind) for module in model.modules())


def lora_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """The layers with an adapter, by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear)}


def remove_lora(model: nn.Module) -> nn.Module:
    """Drop all adapters, in place; the packed base stays as it is."""
    check_model(model)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.without_adapter().train(layer.training))
    return model


def enable_adapter(model: nn.Module, enabled: bool = True) -> None:
    """Switch all adapters on (or off)."""
    check_model(model)
    for layer in lora_layers(model).values():
        layer.adapter_enabled = enabled


class _Disabled(AbstractContextManager[nn.Module]):
    """All adapters of a model off, until the end of a `with` block if it is used as one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {layer: layer.adapter_enabled for layer in lora_layers(model).values()}
        enable_adapter(model, enabled=False)

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *error: object) -> None:
        for layer, enabled in self.before.items():
            layer.adapter_enabled = enabled


def disable_adapter(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Switch all adapters off: at once, and as `with`, until the block ends.

    After the block each adapter is as it was, also when the block raised.

    >>> model = add_lora(quantize_model(nn.Sequential(nn.Linear(64, 64))))
    >>> with disable_adapter(model) as base:
    ...     base[0].adapter_enabled
    False
    >>> model[0].adapter_enabled
    True
    """
    check_model(model)
    return _Disabled(model)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed weight counts its weights, not its bytes."""
    check_model(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = {
        id(p)
        for m in model.modules()
        if isinstance(m, NF4Linear)
        for p in (m.weight, m.absmax, m.nested_absmax, m.nested_offset, m.nested_map)
    }
    total = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    weights = (m.out_features * m.in_features for m in model.modules() if isinstance(m, NF4Linear))
    return trainable, total + sum(weights)
