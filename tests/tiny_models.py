"""A random language model and tokenizer small enough to train in a test, built in code.

The tokenizer knows the 256 bytes and a chat template like SmolLM2's; the model is a Llama of two
layers. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Import this into a test module to run it, and processes it starts, on one thread.

    Matrices this small gain nothing from two, and OpenMP's spinning barriers make every step many
    times slower when anything else runs on the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama with 2 layers of width 64 and tied embeddings, as SmolLM2 has."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # with the usual 0.02 the logits could hardly move
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval()


def save_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Write model and tokenizer as a model directory; return it."""
    tiny_model(seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def write_sums(path: Path, count: int = 40) -> Path:
    """Write a JSONL file of little chats and prompt/completion pairs."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = f"{number}+1", str(number + 1)
            chat = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            plain = {"prompt": question, "completion": answer}
            file.write(json.dumps({"messages": chat} if number % 2 else plain) + "\n")
    return path
