"""Examples -> token ids and labels, with loss on the answers only.

An answer is what the model must produce: the text of each assistant turn and the token that ends
it. Every other token (system, user, the template's own markers) gets the label -100, which the
loss ignores. The boundaries come from rendering the conversation up to each assistant turn with
the tokenizer's own chat template and comparing with the whole, so no template is special-cased.

Read next: ``trainer.py`` (packs what we produce and trains on it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_rs.errors import QloraError
from qlora_rs.recipes.data import Example

IGNORED = -100


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one conversation and, in step with them, labels (-100: no loss here)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EncodedData:
    """What a run trains on, with the counts its summary reports.

    shortened: examples cut to max_length that kept part of an answer.
    dropped: examples of which nothing to learn was left within max_length.
    last_answer_only: chats whose template renders earlier turns differently once more turns
        follow (it may strip reasoning, for one), so only the last answer is learned.
    """

    examples: tuple[EncodedExample, ...]
    shortened: int = 0
    dropped: int = 0
    last_answer_only: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that the loss sees."""
        return sum(label != IGNORED for example in self.examples for label in example.labels[1:])


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> EncodedData:
    """Encode every example, cut to ``max_length`` tokens from the right.

    tokenizer: a fast transformers tokenizer. progress: called with (done, total) now and then.
    Memory: two Python lists of ints per example. Raises QloraError when an example cannot be
    rendered, naming its line, or when nothing is left to learn.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise QloraError(
            f"{type(tokenizer).__name__} reports no character offsets, which are needed to put "
            "the loss on answers only; use a model directory that has a tokenizer.json"
        )
    encoded: list[EncodedExample] = []
    shortened = dropped = last_answer_only = 0
    for done, example in enumerate(examples, start=1):
        input_ids, labels, every_answer = encode_example(example, tokenizer)
        last_answer_only += not every_answer
        cut = EncodedExample(input_ids[:max_length], labels[:max_length])
        # The first label is never predicted (nothing comes before it), hence [1:].
        if all(label == IGNORED for label in cut.labels[1:]):
            dropped += 1
        else:
            shortened += len(input_ids) > max_length
            encoded.append(cut)
        if progress is not None and (done % 500 == 0 or done == len(examples)):
            progress(done, len(examples))
    if not encoded:
        raise QloraError(
            f"none of the {len(examples)} examples keeps any of its answer within "
            f"{max_length} tokens; raise --max-length"
        )
    return EncodedData(tuple(encoded), shortened, dropped, last_answer_only)


def encode_example(example: Example, tokenizer: Any) -> tuple[list[int], list[int], bool]:
    """Encode one example; return (input_ids, labels, whether every assistant turn is learned)."""
    if tokenizer.chat_template is None:
        return *_encode_plain(example, tokenizer), True
    text, answers, every_answer = _render(example, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    labels = _labels_inside(input_ids, offsets, answers, tokenizer.eos_token_id)
    return input_ids, labels, every_answer


def _encode_plain(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """prompt + completion + end-of-sequence, for tokenizers that have no chat template."""
    if not example.plain:
        raise QloraError(
            f"{_where(example)} is a chat, but this model's tokenizer has no chat template; "
            'write it as {"prompt": ..., "completion": ...}, or use an instruction-tuned model'
        )
    (_, prompt), (_, completion) = example.messages
    encoding = tokenizer(prompt + completion, return_offsets_mapping=True)
    input_ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    answer = (len(prompt), len(prompt) + len(completion))
    labels = _labels_inside(input_ids, offsets, [answer], None)
    end = tokenizer.eos_token_id
    if end is not None:
        # Some tokenizers append it themselves, with an empty offset and so without a label.
        if input_ids[-1] == end:
            labels[-1] = end
        else:
            input_ids, labels = [*input_ids, end], [*labels, end]
    return input_ids, labels


def _render(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]], bool]:
    """Render a chat; return (text, character spans of the answers, all answers found)."""
    chat = example.chat()
    text = _apply_template(tokenizer, chat, example, generation_prompt=False)
    spans: list[tuple[int, int]] = []
    for place, turn in enumerate(chat):
        if turn["role"] != "assistant" or place == 0:
            continue
        last = place == len(chat) - 1
        before = _apply_template(tokenizer, chat[:place], example, generation_prompt=True)
        until = (
            text
            if last
            else _apply_template(tokenizer, chat[: place + 1], example, generation_prompt=False)
        )
        if text.startswith(before) and text.startswith(until):
            spans.append((len(before), len(until)))
        elif last:
            # The prompt alone renders differently from the prompt inside the whole; the answer
            # starts where the two part, which is also what trl does.
            return text, [(_common_prefix(before, text), len(text))], place == 1
    answers = sum(turn["role"] == "assistant" for turn in chat[1:])
    return text, spans, len(spans) == answers


def _apply_template(
    tokenizer: Any, chat: list[dict[str, str]], example: Example, generation_prompt: bool
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except Exception as error:  # templates raise jinja2's errors and whatever they like
        raise QloraError(
            f"{_where(example)} cannot be rendered by this model's chat template: {error}"
        ) from error


def _labels_inside(
    input_ids: list[int],
    offsets: list[tuple[int, int]],
    answers: list[tuple[int, int]],
    end_token: int | None,
) -> list[int]:
    """Label the tokens that reach into an answer, up to and with its first ``end_token``.

    A token that straddles an answer's start is labelled: its characters include the answer's
    first. What a template writes after the end token (SmolLM2: a line feed) is never generated,
    because generation stops there, so it is not learned either.

    >>> _labels_inside([5, 6, 7, 8], [(0, 2), (2, 3), (3, 4), (4, 5)], [(2, 5)], end_token=7)
    [-100, 6, 7, -100]
    """
    labels = [IGNORED] * len(input_ids)
    spans = iter(answers)
    start, stop = next(spans, (0, 0))
    ended = False
    for place, (token, (token_start, token_stop)) in enumerate(
        zip(input_ids, offsets, strict=True)
    ):
        while token_start >= stop and stop > 0:
            start, stop = next(spans, (0, 0))
            ended = False
        if token_stop > start and token_stop > token_start and stop > 0 and not ended:
            labels[place] = token
            ended = token == end_token
    return labels


def _common_prefix(left: str, right: str) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def _where(example: Example) -> str:
    return f"line {example.line}" if example.line else "an example"
