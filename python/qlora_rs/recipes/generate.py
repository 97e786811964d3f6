"""Greedy answers in batches, from a 4-bit model with or without an adapter.

Generation itself is transformers'. We batch prompts of like length, pad on the left, and put the
answers back in order, so that a prompt's answer does not depend on how the caller sorted them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qlora_rs
from qlora_rs.errors import QloraError, refuse_together
from qlora_rs.recipes import base_model
from qlora_rs.recipes.base_model import BaseModel, check_model_path, load_base_model
from qlora_rs.recipes.data import check_data_path
from qlora_rs.recipes.progress import Progress
from qlora_rs.recipes.quantized_folder import is_quantized_folder, load_quantized_folder

Chat = list[dict[str, str]]


def check_base_path(model: str | Path) -> None:
    """Refuse what is neither a float model nor a folder of NF4 weights; loads nothing."""
    if not is_quantized_folder(model):
        check_model_path(model)


def check_adapter_path(adapter: str | Path) -> None:
    """Refuse what is no adapter directory."""
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise QloraError(
            f"{adapter} is not an adapter directory (no adapter_config.json); give the one that "
            "qlora-rs finetune (OUTPUT/adapter), save_adapter or peft wrote"
        )


def check_paths(
    model: str | Path, adapter: str | Path | None = None, data: str | Path | None = None
) -> None:
    """Refuse all that is not there at once, before anything is loaded."""
    checks = [partial(check_base_path, model)]
    checks += [partial(check_data_path, data)] if data is not None else []
    checks += [partial(check_adapter_path, adapter)] if adapter is not None else []
    refuse_together(*checks)


def load_for_generation(
    model: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> BaseModel:
    """Load a base model, quantize it to NF4 (unless it is so already), attach an adapter, speed up.

    adapter: directory in peft's layout; None for the base alone. Raises QloraError if either does
    not load or they do not belong together. The model is sped up (`speed_up`): called with labels
    it returns a loss and no logits.
    """
    progress = progress or Progress(quiet=True)
    check_paths(model, adapter)
    progress.stage(f"Loading {model}")
    if is_quantized_folder(model):
        base = load_quantized_folder(model, dtype)
    else:
        base = load_base_model(model, dtype)
        qlora_rs.quantize_model(base.model, skip=("lm_head",))
    if adapter is not None:
        qlora_rs.load_adapter(base.model, adapter)
    qlora_rs.speed_up(base.model)
    base.model.eval()
    return base


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Chat | str],
    max_new_tokens: int,
    batch_size: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer each prompt greedily; return the texts in the order of ``prompts``.

    prompts: chats that end before the answer (rendered with the tokenizer's template), or plain
    text. progress: called as (answered, total). Memory: the key-value cache of one batch.
    The model's training mode is restored.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise QloraError(
            f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and "
            f"{batch_size}"
        )
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    rows = [tokenizer(t, add_special_tokens=s)["input_ids"] for t, s in texts]
    # Like lengths together waste least padding; the sort is stable, so batches are reproducible.
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    answers = [""] * len(rows)
    config = _greedy(model, tokenizer, max_new_tokens)
    was_training = model.training
    model.eval()
    # Of a prompt only the last position reaches the LM head, as a strided slice, for which torch
    # copies the head's weight once per row of the batch: gigabytes. A contiguous slice avoids it.
    head = model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [rows[place] for place in places]},
                padding_side="left",  # so that every prompt ends where its answer begins
                return_tensors="pt",
            )
            output = model.generate(
                input_ids=batch["input_ids"],
                # Given explicitly: where pad and end token are one, it cannot be told from the ids.
                attention_mask=batch["attention_mask"],
                generation_config=config,
            )
            for place, row in zip(places, output[:, batch["input_ids"].shape[1] :], strict=True):
                answers[place] = tokenizer.decode(row, skip_special_tokens=True).strip()
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    finally:
        head.remove()
        model.train(was_training)
    return answers


def _contiguous(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def render_prompt(tokenizer: Any, prompt: Chat | str) -> tuple[str, bool]:
    """Return the prompt's text and whether the tokenizer adds its own start token to it."""
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return prompt, True
        prompt = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        raise QloraError(
            "this model's tokenizer has no chat template; give the prompt as plain text"
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return str(text), False


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """Build a configuration of its own: models ship sampling settings that would interfere."""
    transformers = base_model.import_transformers()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
