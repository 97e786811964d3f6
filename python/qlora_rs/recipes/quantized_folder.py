"""A model with NF4 layers ↔ a folder that transformers loads with bitsandbytes, and we without.

    config.json         with the quantization_config that transformers writes for bitsandbytes
    model.safetensors   bitsandbytes' keys for packed weights, plain tensors for the rest
    tokenizer files

The folder is filled under another name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from qlora_rs.errors import QloraError
from qlora_rs.files import sync_directory, write_atomically
from qlora_rs.layers import NF4Linear, QLoRALinear
from qlora_rs.model import replace_module
from qlora_rs.quantize import PackedWeight
from qlora_rs.recipes.base_model import BaseModel, import_transformers, quiet_libraries

WEIGHTS = "model.safetensors"
# A file is closed and opened again after so much of it was read, or one larger tensor.
READ_BYTES = 16 << 20


def is_quantized_folder(path: str | Path) -> bool:
    """Whether `path` is a folder of bitsandbytes' NF4 weights."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes"


@contextlib.contextmanager
def filled_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def save_quantized_folder(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a transformers model whose linear layers are NF4 (adapters are left out) into the
    existing folder `path`."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    if not layers:
        raise QloraError("the model has no NF4 layer to save")
    tensors = _state(model)
    write_atomically(path / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    config = model.config.to_dict()
    first = next(iter(layers.values()))
    dense = sorted(n for n, m in model.named_modules() if type(m) is nn.Linear)
    dtype = str(first.weight_dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": first.nested_absmax is not None,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense or ["lm_head"],
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
    config["architectures"] = [type(model).__name__]
    config.pop("_name_or_path", None)
    write_atomically(
        path / "config.json", (json.dumps(config, indent=2, default=str) + "\n").encode()
    )
    with quiet_libraries():
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(path)
        tokenizer.save_pretrained(path)


def _state(model: Any) -> dict[str, torch.Tensor]:
    """The state dict without adapters and without second copies of tied weights."""
    adapters = {n for n, m in model.named_modules() if isinstance(m, QLoRALinear)}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    tensors: dict[str, torch.Tensor] = {}
    kept: set[int] = set()
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in adapters and leaf in ("lora_A", "lora_B"):
            continue
        shared = tensor.data_ptr() in kept
        if name in tied and shared:
            continue
        kept.add(tensor.data_ptr())
        # safetensors refuses shared memory; the tables of codes are the same for all layers.
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    return tensors


def load_quantized_folder(
    path: str | Path, dtype: str = "bfloat16", with_tokenizer: bool = True
) -> BaseModel:
    """Load a folder of NF4 weights that we or bitsandbytes wrote, without bitsandbytes.

    dtype: of everything that is not packed. with_tokenizer: False leaves it out (None), for those
    who bring token ids. Memory: the folder's tensors, and up to 32 MiB of a file (or a larger
    tensor) while they are read; the dense model never exists. Raises QloraError when something is
    missing, damaged or of another kind; nothing is unpickled or downloaded.
    """
    path = Path(path).expanduser()
    transformers = import_transformers()
    import accelerate

    tensors = _read_tensors(path)
    try:
        with quiet_libraries():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            # Parameters without memory: those of the packed layers would be the dense model.
            with accelerate.init_empty_weights(include_buffers=False):
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, dtype), trust_remote_code=False
                )
            tokenizer = None
            if with_tokenizer:
                tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError...
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise QloraError(f"{path} could not be loaded: {reason}") from error
    _fill(model, tensors, path)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    model.eval()
    return BaseModel(model, tokenizer, path)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise QloraError(f"{path} has no *.safetensors file")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= _read_file(file)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise QloraError(f"{file} cannot be read: {error}") from error
    return tensors


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    """All tensors, as copies: a model must not change or end with the file it came from.

    What was read of a file counts as this process's memory until the file is closed, so it is
    opened again and again. The largest tensors are read first, while there is least beside them.
    """
    found = _version(file)
    with safetensors.safe_open(file, framework="pt") as held:
        shapes = {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118
    names = sorted(shapes, key=lambda name: math.prod(shapes[name]))
    tensors: dict[str, torch.Tensor] = {}
    while names:
        read = 0
        with safetensors.safe_open(file, framework="pt") as held:
            while names and read < READ_BYTES:
                name = names.pop()
                tensors[name] = held.get_tensor(name).clone()
                read += tensors[name].nbytes
    if _version(file) != found:
        raise OSError("it was changed or replaced while it was read; load it again")
    return tensors


def _version(file: Path) -> tuple[int, ...]:
    """Another one after any change."""
    state = file.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _fill(model: Any, tensors: dict[str, torch.Tensor], path: Path) -> None:
    marker = ".weight.quant_state.bitsandbytes__nf4"
    for key in [key for key in tensors if key.endswith(marker)]:
        name = key.removesuffix(marker)
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise QloraError(
                f"{path} holds {name}, which its config.json has no place for"
            ) from None
        if not isinstance(old, nn.Linear):
            raise QloraError(f"{path} holds 4-bit weights for {name}, a {type(old).__name__}")
        entries = {k: v for k, v in tensors.items() if k.startswith(f"{name}.weight")}
        packed = PackedWeight.from_bitsandbytes(entries, f"{name}.weight")
        if packed.shape != old.weight.shape:
            raise QloraError(
                f"{name} is {list(packed.shape)} in {path}, but its config.json says "
                f"{list(old.weight.shape)}"
            )
        for entry in entries:
            del tensors[entry]
        bias = tensors.pop(f"{name}.bias", None)
        replace_module(model, name, NF4Linear(packed, bias))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    tensors = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    own = {
        f"{n}.{leaf}"
        for n, m in model.named_modules()
        if isinstance(m, NF4Linear)
        for leaf in ("weight", "bias")
    }
    lost = set(missing) - own - tied
    if lost or unexpected:
        what = f"lacks {min(lost)}" if lost else f"holds {min(unexpected)}, which fits nowhere"
        raise QloraError(f"{path} {what}")
    if tied and hasattr(model, "tie_weights"):
        model.tie_weights()
