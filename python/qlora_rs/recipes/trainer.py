"""trl's SFTTrainer with the loss computed where the answers are, and checkpoints without pickle.

The training loop, packing, schedule, clipping and accumulation are trl's and transformers' own.
Four things differ, each by overriding a method here and nothing by patching a library:

- ``compute_loss`` runs the LM head only on positions that predict an answer token, without holding
  its logits where ``fuse_loss`` fits the model. trl scores every position on a CPU, where the head
  is a large part of a small model's step.
- a warm-up of less than one step is none.
- ``evaluate`` reports the mean over answer tokens, not the mean of the rows' means.
- checkpoints go through ``checkpoint.py`` instead of torch.save and torch.load.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

import qlora_rs
from qlora_rs.fusion import deferred_logits, has_fused_loss
from qlora_rs.recipes import checkpoint
from qlora_rs.recipes.encode import IGNORED
from qlora_rs.recipes.settings import FinetuneSettings

# Above this size of float32 logits that would be held, trl's chunked LM head is used.
LOGITS_BYTES = 256 << 20
KEPT_CHECKPOINTS = 2


def training_arguments(settings: FinetuneSettings, folder: Path, evaluate: bool) -> SFTConfig:
    """Translate our settings into trl's configuration."""
    # transformers 5.2x renamed gradient checkpointing; trl switches it on unless told otherwise.
    known = inspect.signature(SFTConfig).parameters
    word = "activation" if "activation_checkpointing" in known else "gradient"
    recompute: dict[str, Any] = {f"{word}_checkpointing": settings.gradient_checkpointing}
    if settings.gradient_checkpointing:
        recompute[f"{word}_checkpointing_kwargs"] = {"use_reentrant": False}
    every = settings.save_every
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # below 1, transformers 5 reads it as a share of the run
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_length=settings.max_length,
        packing=settings.packing,
        packing_strategy="bfd",  # keeps examples whole; implies padding-free rows
        shuffle_dataset=True,
        seed=settings.seed,
        use_cpu=True,  # the GPU path is another issue's; adapters train in float32 beside 4-bit W
        bf16=False,  # the model is already in its dtype; autocast would only add casts
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not averaged away
        include_num_input_tokens_seen="all",
        save_strategy="steps" if every else "no",
        save_steps=every or 1,
        eval_strategy="steps" if evaluate and every else "no",
        eval_steps=every or None,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
        **recompute,
    )


class AnswerTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints ``checkpoint.newest`` can verify and nothing has to unpickle.

    base_name: what the adapter's configuration names as its base model.
    on_checkpoint: called with each checkpoint's path after it is on disk.
    """

    # The libraries declare these optional; a trainer that trains has them.
    model: Any
    optimizer: Any
    args: Any

    def __init__(
        self,
        *args: Any,
        base_name: str,
        keep_checkpoints: bool,
        on_checkpoint: Callable[[Path], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.base_name = base_name
        self.keep_checkpoints = keep_checkpoints
        self.on_checkpoint = on_checkpoint
        self.remove_callback(PrinterCallback)
        self._takes_positions = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Without warm-up where its share is less than a step, which would be one at rate zero."""
        if self.args.warmup_steps * num_training_steps < 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- loss ------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum of the answer tokens' cross-entropy divided by ``num_items_in_batch``.

        Equal to trl's loss (a test compares loss and gradients); it falls back to trl's where the
        logits would be large, the model has an auxiliary loss, or it takes no ``logits_to_keep``.
        """
        targets = inputs["labels"][:, 1:]
        positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
        vocabulary = self.model.config.get_text_config().vocab_size
        held = 0 if has_fused_loss(self.model) else targets.shape[0] * positions.numel()
        too_large = held * vocabulary * 4 > LOGITS_BYTES
        if return_outputs or too_large or self.aux_loss_enabled or not self._takes_positions:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if positions.numel() == 0:  # nothing to learn here: a zero that still has a gradient
            positions = torch.zeros(1, dtype=torch.long, device=targets.device)
        others = {name: value for name, value in inputs.items() if name != "labels"}
        with deferred_logits(self.model):
            outputs = model(**{**others, "use_cache": False, "logits_to_keep": positions})
        logits = outputs.logits.float()
        loss = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets[:, positions].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum().clamp(min=1)
        return loss / num_items_in_batch

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean cross-entropy per answer token over the held-out examples, in nats."""
        was_training = self.model.training
        self.model.eval()
        total, tokens = 0.0, 0
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
            total += float(self.compute_loss(self.model, inputs, num_items_in_batch=1))
        metrics = {f"{metric_key_prefix}_loss": total / max(tokens, 1)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.model.train(was_training)
        return metrics

    # ---- checkpoints -----------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def fill(path: Path) -> None:
            qlora_rs.save_adapter(self.model, path / checkpoint.ADAPTER, self.base_name)
            checkpoint.save_training_state(
                path, self.optimizer, self.lr_scheduler, self._parameter_names()
            )
            self.state.save_to_json(str(path / "trainer_state.json"))

        folder = Path(self.args.output_dir)
        path = checkpoint.write(folder, self.state.global_step, fill)
        if not self.keep_checkpoints:
            checkpoint.prune(folder, KEPT_CHECKPOINTS)
        if self.on_checkpoint is not None:
            self.on_checkpoint(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        qlora_rs.load_adapter(self.model, Path(resume_from_checkpoint) / checkpoint.ADAPTER)

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_training_state(
                Path(checkpoint_path), self.optimizer, self.lr_scheduler, self._parameter_names()
            )

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_random_state(Path(checkpoint_path))

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        """Nothing to load: gradient scaling belongs to float16 autocast, which is off."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter. The base model is not copied, and no arguments are pickled."""
        qlora_rs.save_adapter(self.model, Path(output_dir or self.args.output_dir), self.base_name)

    def _parameter_names(self) -> list[str]:
        """Names of the optimizer's parameters, in the order of its state's indices."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return [names[id(parameter)] for group in groups for parameter in group["params"]]
