"""`qlora-rs merge`: base and adapter → a merged checkpoint, its report and its page."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qlora_rs
from qlora_rs.adapter_io import CONFIG as ADAPTER_CONFIG
from qlora_rs.adapter_io import WEIGHTS as ADAPTER_WEIGHTS
from qlora_rs.errors import QloraError
from qlora_rs.layers import NF4Linear
from qlora_rs.merging.adapted import find_adapted
from qlora_rs.merging.report import MergeReport, plot_layers
from qlora_rs.merging.solve import REVISION
from qlora_rs.model import lora_layers, replace_module
from qlora_rs.recipes import base_model
from qlora_rs.recipes.base_model import BaseModel, load_base_model
from qlora_rs.recipes.generate import check_paths
from qlora_rs.recipes.merge_page import merge_page
from qlora_rs.recipes.merge_store import LayerStore
from qlora_rs.recipes.merge_text import Batch, digest, generate_calibration, read_calibration
from qlora_rs.recipes.output_folder import write_text
from qlora_rs.recipes.process_memory import forget_peak, peak, release, resident
from qlora_rs.recipes.progress import Progress, duration
from qlora_rs.recipes.quantized_folder import (
    filled_folder,
    is_quantized_folder,
    load_quantized_folder,
    save_quantized_folder,
)
from qlora_rs.recipes.report import peak_rss_bytes
from qlora_rs.recipes.settings import DTYPES, FinetuneSettings

REPORT_FILE, PAGE_FILE, PLOT_FILE = "merge.json", "merge.html", "merge.svg"
ADAPTER_FOLDER = "adapter"
# Tokens of --evaluation, whatever --tokens says of the calibration.
EVALUATION_TOKENS = 4096
FORMATS = ("nf4", "bf16", "separate")


@dataclass(frozen=True)
class MergeSettings:
    """What `merge_checkpoint` does; checked on construction.

    base: float model directory, .gguf file, or folder of NF4 weights. adapter: directory. output:
    folder to make. to: "nf4"; "bf16", a plain 16-bit model with nothing lost; "separate", the
    packed base with the adapter beside it. calibration: JSONL or text file; None takes the
    adapter's training data where it is found, else text that the model writes itself. tokens: how
    much of it. evaluation: text to measure on (4,096 tokens of it); None sets an eighth of the
    calibration aside. steps: of `distilled`, that train the scales (None: 24); 0 keeps them as they
    were solved. limit_kl: refuse a result farther from the unmerged model, in nats per token.
    """

    base: str
    adapter: str
    output: str
    method: str = "calibrated"
    to: str = "nf4"
    calibration: str | None = None
    evaluation: str | None = None
    tokens: int = 12288
    length: int = 512
    hybrid_rank: int = 0
    steps: int | None = None
    limit_kl: float | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        from qlora_rs.merging.solve import METHODS

        for name, value, allowed in (
            ("--method", self.method, METHODS),
            ("--to", self.to, FORMATS),
            ("--dtype", self.dtype, DTYPES),
        ):
            if value not in allowed:
                raise QloraError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, number, least in (
            ("--tokens", self.tokens, 512),
            ("--length", self.length, 16),
            ("--hybrid-rank", self.hybrid_rank, 0),
            ("--steps", self.steps or 0, 0),
        ):
            if number < least:
                raise QloraError(f"{name} must be at least {least}, got {number}")
        if self.steps is not None and self.method != "distilled":
            raise QloraError(
                f"--steps {self.steps} is for --method distilled, which trains scales; "
                f"{self.method} has no steps: leave it out"
            )


def merge_checkpoint(
    settings: MergeSettings, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Merge and write the result; return what merge.json holds.

    The output folder appears when it is complete. Interrupted at any point, the same call goes on
    with the layers and the steps of distillation that were finished. Raises
    QloraError when base, adapter, text or output do not fit, or the result is above the limit.
    """
    progress = progress or Progress(quiet=True)
    started = time.monotonic()
    output = Path(settings.output).expanduser()
    check_paths(settings.base, Path(settings.adapter).expanduser())
    _check_output(output, overwrite)
    notes: list[str] = []
    base = _load(settings, notes, progress)
    loading = peak_rss_bytes()
    release()
    held = resident() if forget_peak() else None
    if settings.to == "nf4":
        report, batches = _merge(settings, base, notes, output, progress)
    else:
        report, batches = MergeReport(settings.to, notes=notes), []
    most = peak()
    memory = {"peak_rss_bytes": max(loading, most or peak_rss_bytes())}
    if settings.to == "nf4" and held is not None and most is not None:
        memory["peak_above_model_bytes"] = max(most - held, 0)
    record = {
        "qlora_rs": qlora_rs.__version__,
        "base": settings.base,
        "adapter": settings.adapter,
        "to": settings.to,
        "calibration_sha256": digest(batches),
        **report.to_dict(),
    }
    record["seconds"]["all"] = round(time.monotonic() - started, 1)
    record |= memory
    progress.stage(f"Writing {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Filled beside it; an old one stands until the new one is whole.
    with filled_folder(_aside(output) if output.exists() else output) as folder:
        _write(settings, base, folder)
        write_text(folder / REPORT_FILE, json.dumps(record, indent=2) + "\n")
        if report.layers:
            with contextlib.suppress(QloraError):  # without matplotlib the page has no picture
                plot_layers(report, folder / PLOT_FILE)
        write_text(folder / PAGE_FILE, merge_page(report, record, folder / PLOT_FILE))
    if _aside(output).exists():
        shutil.rmtree(output)
        _aside(output).rename(output)
    shutil.rmtree(_work(output), ignore_errors=True)
    record["output"] = str(output)
    record["report"] = report
    return record


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.new")


def _work(output: Path) -> Path:
    return output.with_name(f".{output.name}.merging")


def _check_output(output: Path, overwrite: bool) -> None:
    for left_over in output.parent.glob(f".{output.name}*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    if _aside(output).exists() and not output.exists():
        # Killed between removing the old folder and renaming the new one, which is whole.
        _aside(output).rename(output)
    shutil.rmtree(_aside(output), ignore_errors=True)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise QloraError(f"{output} exists and is not a directory; choose another output")
    if not output.exists() or not any(output.iterdir()):
        if output.exists():
            output.rmdir()
        return
    if not overwrite:
        raise QloraError(f"{output} exists; use --overwrite to replace it, or another output")
    if not (output / REPORT_FILE).is_file():
        raise QloraError(
            f"{output} was not made by qlora-rs merge (no {REPORT_FILE}), so --overwrite will not "
            "delete it; remove it yourself or choose another output"
        )


def _load(settings: MergeSettings, notes: list[str], progress: Progress) -> BaseModel:
    """The unmerged model, quantized as the adapter was trained."""
    adapter = Path(settings.adapter).expanduser()
    run = _training_run(adapter)
    progress.stage(f"Loading {settings.base}")
    if is_quantized_folder(settings.base):
        base = load_quantized_folder(settings.base, settings.dtype)
        layer = next(m for m in base.model.modules() if isinstance(m, NF4Linear))
        found = (layer.block_size, layer.nested_absmax is not None)
    else:
        base = load_base_model(settings.base, settings.dtype)
        found = (run.block_size, run.double_quant) if run is not None else (64, True)
        qlora_rs.quantize_model(
            base.model, skip=("lm_head",), block_size=found[0], double_quant=found[1]
        )
    if run is not None:
        trained = (run.block_size, run.double_quant)
        if trained != found:
            notes.append(
                f"the adapter was trained on a base in blocks of {trained[0]}, double "
                f"quantization {trained[1]}; this base has blocks of {found[0]}, {found[1]}"
            )
        record = json.loads((adapter.parent / "run.json").read_text(encoding="utf-8"))
        identity = record.get("model_identity")
        if not is_quantized_folder(settings.base) and identity != base_model.model_identity(
            settings.base
        ):
            notes.append(
                "the adapter's training run names another base model (their digests differ); the "
                "merge goes on because all shapes fit, but check --base"
            )
    for note in notes:
        progress.warn(f"Warning: {note}")
    qlora_rs.load_adapter(base.model, adapter)
    base.model.eval()
    return base


def _training_run(adapter: Path) -> FinetuneSettings | None:
    """The settings of the run that made the adapter, where its folder is still around it."""
    from qlora_rs.recipes.run_identity import settings_of_run

    try:
        return settings_of_run(adapter.parent)
    except (QloraError, KeyError, TypeError):
        return None


def _merge(
    settings: MergeSettings, base: BaseModel, notes: list[str], output: Path, progress: Progress
) -> tuple[MergeReport, list[Batch]]:
    batches = _text(settings, base, notes, progress)
    held_out = None
    if settings.evaluation is not None:
        held_out = _read(settings, "--evaluation", settings.evaluation, base, EVALUATION_TOKENS)
    identity = {
        "base": base_model.model_identity(settings.base),
        "adapter": _adapter_digest(Path(settings.adapter).expanduser()),
        "calibration": digest(batches),
        # Without text to measure on, some of the calibration's is set aside.
        "evaluation": "set aside" if held_out is None else digest(held_out),
        "solver": f"{settings.method} {REVISION}",
        "hybrid_rank": settings.hybrid_rank,
        "dtype": settings.dtype,
        "version": qlora_rs.__version__,
    }
    store = LayerStore(_work(output), identity)
    clock = _Clock(progress)
    with _held_back():
        report = qlora_rs.merge_model(
            base.model,
            settings.method,
            batches,
            held_out,
            hybrid_rank=settings.hybrid_rank,
            limit_kl=settings.limit_kl,
            reversible=False,
            progress=clock,
            store=store,
            **({} if settings.steps is None else {"steps": settings.steps}),
        )
    report.notes.extend(notes)
    return report, batches


def _text(
    settings: MergeSettings, base: BaseModel, notes: list[str], progress: Progress
) -> list[Batch]:
    run = _training_run(Path(settings.adapter).expanduser())
    if settings.calibration is not None:
        return _read(settings, "--calibration", settings.calibration, base, settings.tokens)
    used = "measured" if settings.method == "nearest" else "calibrated"
    if run is not None and Path(run.data).is_file():
        notes.append(f"{used} on the training data, {run.data}")
        return read_calibration(Path(run.data), base.tokenizer, settings.tokens, settings.length)
    notes.append(f"{used} on text that the unmerged model wrote itself, as none was given")
    clock = _Clock(progress)
    return generate_calibration(
        base.model,
        base.tokenizer,
        settings.tokens,
        min(settings.length, 256),
        progress=lambda done, total: clock("writing calibration text", done, total),
    )


def _read(
    settings: MergeSettings, option: str, file: str, base: BaseModel, tokens: int
) -> list[Batch]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise QloraError(f"{option} {path} does not exist or is no file")
    return read_calibration(path, base.tokenizer, tokens, settings.length)


def _adapter_digest(adapter: Path) -> str:
    state = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        state.update((adapter / name).read_bytes())
    return state.hexdigest()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """The report's table says what merge_model would warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Clock:
    """Progress lines with the time left in each stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.stage, self.started = progress, "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started = stage, now
        spent = now - self.started
        left = f"  {duration(spent / done * (total - done))} left" if done else ""
        share = 100 * done // max(total, 1)
        self.progress.line(
            f"{stage}  {share}%  {duration(spent)} elapsed{left}", last=done >= total
        )


def _write(settings: MergeSettings, base: BaseModel, folder: Path) -> None:
    model = base.model
    if settings.to == "bf16":
        for layer in find_adapted(model):
            _to_dense(model, layer.name, layer.target(), layer.bias())
        for name, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                _to_dense(model, name, module.dequantize(torch.float32), module.bias)
        model.to(torch.bfloat16)
        with base_model.quiet_libraries():
            model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
        return
    save_quantized_folder(model, base.tokenizer, folder)
    if lora_layers(model):
        qlora_rs.save_adapter(model, folder / ADAPTER_FOLDER, settings.output)


def _to_dense(model: nn.Module, name: str, weight: torch.Tensor, bias: Any) -> None:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)
    replace_module(model, name, layer)


def separate_advice(output: str) -> str:
    """How to use a base with its adapter beside it, and why one would."""
    return (
        f"The packed base is in {output}, the adapter in {output}/{ADAPTER_FOLDER}. Nothing is "
        "lost this way: qlora-rs generate --model OUT --adapter OUT/adapter, or peft's "
        "PeftModel.from_pretrained(base, adapter). It costs the adapter's own product in each "
        "layer (a few per cent for long inputs, more for single tokens)."
    )
