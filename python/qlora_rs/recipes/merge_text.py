"""Calibration text for `qlora-rs merge`: the user's file, the training data, or the model's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_rs.errors import QloraError
from qlora_rs.merging.evaluate import IGNORED
from qlora_rs.recipes.data import read_examples
from qlora_rs.recipes.encode import encode_examples

Batch = dict[str, Tensor]
FEWEST_BATCHES = 32


def read_calibration(path: Path, tokenizer: Any, tokens: int, length: int) -> list[Batch]:
    """Rows of at most `length` tokens from a file, `tokens` in all or a row more.

    .jsonl: chats as `finetune` reads them, whose answers alone are scored; rows are drawn evenly
    from the whole file, short ones several to a batch. Anything else: plain UTF-8 text, cut into
    pieces of `length` tokens.
    """
    if path.suffix == ".jsonl":
        examples = read_examples(path).examples
        # Some more than needed, since lengths are not known before they are encoded.
        wanted = min(len(examples), max(8, tokens // 16))
        step = len(examples) / wanted
        spread = [examples[int(place * step)] for place in range(wanted)]
        encoded = encode_examples(spread, tokenizer, length).examples
        mean = sum(len(e.input_ids) for e in encoded) / len(encoded)
        kept = min(len(encoded), max(2, round(tokens / mean)))
        step = len(encoded) / kept
        rows = [encoded[int(place * step)] for place in range(kept)]
        # So many batches at least that some can be set aside, to measure and to decide on.
        most = min(length, sum(len(e.input_ids) for e in rows) // FEWEST_BATCHES)
        return batched([(e.input_ids, e.labels) for e in rows], most)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QloraError(f"{path} cannot be read as UTF-8 text: {error}") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) >= min(length, 16)]
    if not pieces:
        raise QloraError(f"{path} holds {len(ids)} tokens, which is too little to calibrate on")
    kept = min(len(pieces), max(2, tokens // length))
    step = len(pieces) / kept
    return [{"input_ids": torch.tensor([pieces[int(place * step)]])} for place in range(kept)]


def batched(rows: list[tuple[list[int], list[int]]], tokens: int) -> list[Batch]:
    """(token ids, labels) of rows → batches of at most `tokens` (or one row), padding among them.

    A model takes many short rows at once in half the time that it takes them one by one. Rows stay
    in order; padding is at the end, where a causal model does not see it.

    >>> [batch["input_ids"].tolist() for batch in batched([([1, 2], [1, 2]), ([3], [3])], 4)]
    [[[1, 2], [3, 0]]]
    """
    batches: list[Batch] = []
    waiting: list[tuple[list[int], list[int]]] = []
    for row in rows:
        width = max(len(ids) for ids, _ in (*waiting, row))
        if waiting and width * (len(waiting) + 1) > tokens:
            batches.append(_padded(waiting))
            waiting = []
        waiting.append(row)
    return batches + ([_padded(waiting)] if waiting else [])


def _padded(rows: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(ids) for ids, _ in rows)

    def filled(values: list[int], padding: int) -> list[int]:
        return values + [padding] * (width - len(values))

    batch = {
        "input_ids": torch.tensor([filled(ids, 0) for ids, _ in rows]),
        "labels": torch.tensor([filled(labels, IGNORED) for _, labels in rows]),
    }
    if any(len(ids) < width for ids, _ in rows):
        ones = [filled([1] * len(ids), 0) for ids, _ in rows]
        batch["attention_mask"] = torch.tensor(ones)
    return batch


@torch.no_grad()
def generate_calibration(
    model: Any,
    tokenizer: Any,
    tokens: int,
    length: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Batch]:
    """Text sampled from the unmerged model itself, for those who have no other.

    Each row starts from the model's first token, or from a random one where it has none.
    """
    generator = torch.Generator().manual_seed(seed)
    first = tokenizer.bos_token_id
    count = max(2, tokens // length)
    batches: list[Batch] = []
    width = 16
    for start in range(0, count, width):
        rows = min(width, count - start)
        vocabulary = model.get_input_embeddings().num_embeddings
        second = torch.randint(vocabulary, (rows, 1), generator=generator)
        ids = second if first is None else torch.cat([torch.full((rows, 1), first), second], dim=1)
        past = None
        while ids.shape[1] < length:
            fed = ids if past is None else ids[:, -1:]
            outputs = model(input_ids=fed, past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            odds = outputs.logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], dim=1)
            if progress is not None:
                progress(start * length + rows * ids.shape[1], count * length)
        batches.extend({"input_ids": row[None]} for row in ids)
    return batches


def digest(batches: list[Batch]) -> str:
    """SHA-256 of all token ids and labels, to tell one calibration from another."""
    state = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            state.update(f"{name} {tuple(batch[name].shape)}".encode())
            state.update(batch[name].contiguous().numpy().tobytes())
    return state.hexdigest()
