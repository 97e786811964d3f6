"""Fine-tune a 4-bit model with LoRA on a JSONL file: the whole run, in order.

    check paths and data -> load -> quantize to NF4 -> attach LoRA -> speed up -> train (trl)
    -> save adapter

Nothing is written before paths, data and model were found good. A run that stops (Ctrl-C,
SIGTERM, power cut) continues with ``resume=True`` from its newest whole checkpoint, bit for bit as
if it had not stopped, given the same versions and thread count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qlora_rs
from qlora_rs.errors import QloraError, refuse_together
from qlora_rs.model import layers_to_quantize, match_targets
from qlora_rs.recipes import base_model, report
from qlora_rs.recipes import output_folder as folder
from qlora_rs.recipes.data import Example, check_data_path, read_examples
from qlora_rs.recipes.encode import EncodedData, encode_examples
from qlora_rs.recipes.progress import Progress, StopRequest, stop_on_signals
from qlora_rs.recipes.run_identity import check_same_run, run_record
from qlora_rs.recipes.settings import FinetuneSettings


@dataclass(frozen=True)
class FinetuneResult:
    """What ``finetune`` returns.

    model: the quantized model with its adapter, in evaluation mode, sped up (`speed_up`: called
    with labels it returns a loss and no logits); tokenizer: its tokenizer.
    finished: False when the user stopped the run; ``signal`` then says by what.
    summary: what summary.json holds (empty unless finished). step: optimizer steps done.
    """

    model: Any
    tokenizer: Any
    settings: FinetuneSettings
    finished: bool
    step: int
    summary: dict[str, Any]
    signal: int | None = None


def finetune(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_ready: Callable[[Any, Any], None] | None = None,
) -> FinetuneResult:
    """Carry out a fine-tuning run; see FinetuneSettings for what it does.

    resume: continue the run in ``settings.output``, which must have been started with equal
    settings, data and model. overwrite: delete an earlier run there first.
    on_ready: called once as (model, tokenizer) before the first step, adapter attached but zero.
    Memory: the float weights while loading; afterwards the 4-bit model, float32 adapter, its
    gradient and two moments, and the activations of one packed row batch.
    Raises QloraError for everything a user can mend; nothing was written then, except after
    training began, where checkpoints stay.
    """
    progress = progress or Progress()
    output = Path(settings.output).expanduser()
    require_training_libraries()
    refuse_together(
        lambda: base_model.check_model_path(settings.model), lambda: check_data_path(settings.data)
    )
    if not resume:
        folder.refuse_existing(output, overwrite)
    progress.stage(f"Reading {settings.data}")
    data = read_examples(settings.data)
    record = run_record(settings, data)
    if resume:
        check_same_run(output, record, progress)

    progress.stage(f"Loading {settings.model}")
    base = base_model.load_base_model(settings.model, settings.dtype)
    train, held_out = _split(data.examples, settings)
    encoded = encode_examples(train, base.tokenizer, settings.max_length)
    encoded_held_out = (
        encode_examples(held_out, base.tokenizer, settings.max_length) if held_out else None
    )
    _say_what_was_cut(encoded, settings, progress)
    float_bytes = report.model_bytes(base.model)
    prepare_model(base.model, settings, progress)
    speed_ups = qlora_rs.speed_up(base.model)

    output.mkdir(parents=True, exist_ok=True)
    with folder.lock(output):
        if not resume:
            folder.refuse_existing(output, overwrite)  # again, now that nobody else can write
            folder.clear(output)
            folder.write_json(output / folder.RUN_FILE, record)
        examples = (encoded, encoded_held_out)
        run = _Run(settings, output, base, *examples, float_bytes, speed_ups, progress)
        return run.carry_out(resume, on_ready)


def prepare_model(model: Any, settings: FinetuneSettings, progress: Progress) -> None:
    """Quantize a float model in place and attach a fresh adapter, reproducibly by seed."""
    import transformers

    def show(done: int, total: int, name: str) -> None:
        progress.line(f"Quantizing to NF4  {done}/{total}  {name}", last=done == total)

    targets: str | list[str] = (
        settings.target_modules
        if isinstance(settings.target_modules, str)
        else list(settings.target_modules)
    )
    # Quantizing a large model takes minutes: a wrong name is refused before.
    match_targets([name for name, _ in layers_to_quantize(model)], targets)
    qlora_rs.quantize_model(
        model,
        block_size=settings.block_size,
        double_quant=settings.double_quant,
        progress=show,
    )
    transformers.set_seed(settings.seed)
    qlora_rs.add_lora(
        model,
        r=settings.r,
        alpha=settings.alpha,
        dropout=settings.dropout,
        target_modules=targets,
        use_rslora=settings.rslora,
    )


class _Run:
    """The part of a run that owns its output folder."""

    def __init__(
        self,
        settings: FinetuneSettings,
        output: Path,
        base: base_model.BaseModel,
        encoded: EncodedData,
        held_out: EncodedData | None,
        float_bytes: int,
        speed_ups: tuple[str, ...],
        progress: Progress,
    ) -> None:
        self.settings, self.output, self.base = settings, output, base
        self.encoded, self.held_out = encoded, held_out
        self.float_bytes, self.progress = float_bytes, progress
        self.checkpoints = output / folder.CHECKPOINT_FOLDER
        self.speed_ups = speed_ups

    def carry_out(
        self, resume: bool, on_ready: Callable[[Any, Any], None] | None
    ) -> FinetuneResult:
        from qlora_rs.recipes.checkpoint import newest, prune
        from qlora_rs.recipes.run_callback import RunCallback

        self.checkpoints.mkdir(exist_ok=True)
        found = newest(self.checkpoints)
        for reason in found.skipped:
            self.progress.warn(f"Skipped a damaged checkpoint: {reason}")
        if resume:
            place = f"step {found.step}" if found.path else "the start (no whole checkpoint yet)"
            self.progress.stage(f"Resuming from {place}")
        prune(self.checkpoints, keep=1 << 30)  # only what a killed run left half-written

        what = "saving a checkpoint after this step"
        with stop_on_signals(self.progress, what) as stop, base_model.quiet_libraries():
            log_file = self.output / folder.LOG_FILE
            callback = RunCallback(log_file, self.progress, stop)
            held = self.base.model.__dict__
            forward = held.get("forward")
            try:
                trainer = self._trainer(callback)
                callback.open_log(found.step if found.path else -1)
                if found.path is None:
                    if on_ready is not None:
                        on_ready(self.base.model, self.base.tokenizer)
                        if stop:
                            return self._stopped(0, stop)
                    if self.held_out is not None:
                        trainer.evaluate()
                self._train(trainer, found.path, found.step)
                self.base.model.eval()
                if stop and trainer.state.global_step < trainer.state.max_steps:
                    return self._stopped(trainer.state.global_step, stop)
                if self.held_out is not None:
                    trainer.evaluate()
            finally:
                callback.close()
                held.pop("forward", None)  # trl's trainer has put its own around it
                if forward is not None:
                    held["forward"] = forward
        return self._finish(trainer, callback)

    def _trainer(self, callback: Any) -> Any:
        from datasets import Dataset

        from qlora_rs.recipes.trainer import AnswerTrainer, training_arguments

        def dataset(encoded: EncodedData) -> Dataset:
            return Dataset.from_dict(
                {
                    "input_ids": [example.input_ids for example in encoded.examples],
                    "labels": [example.labels for example in encoded.examples],
                }
            )

        held_out = None if self.held_out is None else dataset(self.held_out)
        return AnswerTrainer(
            model=self.base.model,
            args=training_arguments(self.settings, self.checkpoints, held_out is not None),
            train_dataset=dataset(self.encoded),
            eval_dataset=held_out,
            processing_class=self.base.tokenizer,
            callbacks=[callback],
            base_name=self.settings.model,
            keep_checkpoints=self.settings.keep_checkpoints,
        )

    def _train(self, trainer: Any, checkpoint: Path | None, step: int) -> None:
        if checkpoint is None:
            trainer.train()
            return
        state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
        if step < state.max_steps:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:
            # Every step was done before the run was cut off; Trainer would do one more.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state

    def _stopped(self, step: int, stop: StopRequest) -> FinetuneResult:
        self.progress.warn(
            f"Stopped after step {step}; nothing is lost. Continue with:\n"
            f"  qlora-rs finetune --resume --output {self.settings.output}"
        )
        model, tokenizer = self.base.model, self.base.tokenizer
        return FinetuneResult(model, tokenizer, self.settings, False, step, {}, stop.signal)

    def _finish(self, trainer: Any, callback: Any) -> FinetuneResult:
        from qlora_rs.recipes.checkpoint import remove
        from qlora_rs.recipes.run_callback import read_log

        model, settings, output = self.base.model, self.settings, self.output
        adapter = output / folder.ADAPTER_FOLDER
        qlora_rs.save_adapter(model, adapter, settings.model)
        log = read_log(output / folder.LOG_FILE)
        name = Path(settings.model).name
        title = f"{name}, NF4 + LoRA r={settings.r}, lr {settings.learning_rate:g}"
        if not report.draw_loss_curve(output / folder.LOSS_FILE, log, title):
            self.progress.warn("No loss.png: matplotlib is not installed (pip install matplotlib)")
        summary = self._summary(trainer, callback, log)
        folder.write_json(output / folder.SUMMARY_FILE, summary)
        if not settings.keep_checkpoints:
            for path in sorted(self.checkpoints.glob("step-*")):
                remove(path)
            if not any(self.checkpoints.iterdir()):
                self.checkpoints.rmdir()
        step = trainer.state.global_step
        return FinetuneResult(model, self.base.tokenizer, settings, True, step, summary)

    def _summary(self, trainer: Any, callback: Any, log: list[dict[str, Any]]) -> dict[str, Any]:
        losses = [entry["loss"] for entry in log if "loss" in entry]
        held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        trainable, parameters = qlora_rs.trainable_parameters(self.base.model)
        window = max(1, min(10, len(losses) // 10))
        quantized = report.model_bytes(self.base.model) - sum(
            p.numel() * p.element_size() for p in self.base.model.parameters() if p.requires_grad
        )
        seconds = callback.session_seconds
        return {
            "model": self.settings.model,
            "parameters": parameters - trainable,
            "trainable_parameters": trainable,
            "dtype": self.settings.dtype,
            "speed_ups": list(self.speed_ups),
            "float_bytes": self.float_bytes,
            "quantized_bytes": quantized,
            "examples": len(self.encoded.examples),
            "examples_shortened": self.encoded.shortened,
            "examples_dropped": self.encoded.dropped,
            "data_tokens": self.encoded.tokens,
            "answer_tokens": self.encoded.answer_tokens,
            "steps": trainer.state.global_step,
            "tokens": int(trainer.state.num_input_tokens_seen),
            "first_loss": sum(losses[:window]) / window,
            "last_loss": sum(losses[-window:]) / window,
            "loss_window": window,
            "held_out_loss_before": held_out[0] if len(held_out) > 1 else None,
            "held_out_loss": held_out[-1] if held_out else None,
            "train_seconds": round(callback.earlier_seconds + seconds, 1),
            "tokens_per_second": round(callback.session_tokens / seconds, 1) if seconds else 0.0,
            "peak_rss_bytes": report.peak_rss_bytes(),
            "adapter": str(self.output / folder.ADAPTER_FOLDER),
        }


def require_training_libraries() -> None:
    """Check that trl and datasets are installed; raise QloraError with the pip command if not."""
    base_model.import_transformers()
    try:
        import datasets  # noqa: F401

        with base_model.quiet_libraries():
            from trl import SFTTrainer  # noqa: F401  (trl itself imports lazily)
    except ImportError as error:
        raise QloraError(
            f'fine-tuning needs trl and datasets ({error}): pip install "qlora_rs[train]"'
        ) from error


def _split(
    examples: Sequence[Example], settings: FinetuneSettings
) -> tuple[list[Example], list[Example]]:
    """Hold out ``eval_fraction`` of the examples, chosen by the seed."""
    count = round(len(examples) * settings.eval_fraction)
    if settings.eval_fraction > 0 and not 1 <= count < len(examples):
        raise QloraError(
            f"--eval-fraction {settings.eval_fraction:g} of {len(examples)} examples holds out "
            f"{count}; at least 1 must be held out and 1 left to train on"
        )
    order = list(range(len(examples)))
    random.Random(settings.seed).shuffle(order)
    held_out = set(order[:count])
    train = [example for place, example in enumerate(examples) if place not in held_out]
    return train, [examples[place] for place in sorted(held_out)]


def _say_what_was_cut(encoded: EncodedData, settings: FinetuneSettings, progress: Progress) -> None:
    if encoded.shortened or encoded.dropped:
        progress.warn(
            f"{encoded.shortened} examples were cut to {settings.max_length} tokens and "
            f"{encoded.dropped} left out, because no answer fits; --max-length changes that"
        )
    if encoded.last_answer_only:
        progress.warn(
            f"in {encoded.last_answer_only} chats only the last answer is learned: the chat "
            "template renders earlier turns differently once more turns follow"
        )
