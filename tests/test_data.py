"""JSONL files in, token ids and labels out: what is accepted, what is refused, and its words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

from qlora_rs import QloraError
from qlora_rs.recipes.data import (
    Example,
    LineError,
    parse_line,
    read_examples,
    write_examples,
)
from qlora_rs.recipes.encode import IGNORED, encode_example, encode_examples

GOOD = '{"prompt": "2+2=", "completion": "4"}'


def file_with(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_both_forms_are_read_in_order(tmp_path: Path) -> None:
    chat = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    data = read_examples(file_with(tmp_path, f"{GOOD}\n{chat}\n"))
    assert [example.plain for example in data.examples] == [True, False]
    assert [example.line for example in data.examples] == [1, 2]
    assert data.examples[1].messages == (("user", "a"), ("assistant", "b"))


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    data = read_examples(file_with(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n \n"))
    assert len(data.examples) == 1
    assert data.blank_lines == 2


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a\u2028b\x85c", "completion": "d"}, ensure_ascii=False)
    assert read_examples(file_with(tmp_path, line)).examples[0].messages[0][1] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not valid JSON at column 2"),
        ("[1, 2]", "one JSON object per line"),
        ("3", "the line is a JSON number"),
        ("{}", 'expected {"messages"'),
        ('{"text": "x"}', 'found the fields "text"'),
        ('{"prompt": "a"}', 'the field "completion" is missing'),
        ('{"prompt": "a", "completion": 1}', '"completion" is a JSON number, expected a string'),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('{"prompt": "\\ud800", "completion": "b"}', "half of a surrogate pair at character 1"),
        ('{"messages": {}}', '"messages" is a JSON object, expected an array'),
        ('{"messages": []}', "0 message(s), expected at least a question and an answer"),
        ('{"messages": ["a", "b"]}', "message 1 is a JSON string, expected an object"),
        ('{"messages": [{"role": "user"}]}', 'message 1 lacks "content"'),
        (
            '{"messages": [{"role": "user", "content": null}, {}]}',
            '"content" of message 1 is a JSON null, expected a string',
        ),
        (
            '{"messages": [{"role": "bot", "content": "a"}, {"role": "user", "content": "b"}]}',
            'message 1 has role "bot", expected one of system, user, assistant, tool',
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, '
            '{"role": "user", "content": "b"}]}',
            'the last message has role "user", expected "assistant"',
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": " "}]}',
            "there is no answer to learn",
        ),
        ('{"messages": [], "prompt": "a"}', "keep one form"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_reason(
    tmp_path: Path, line: str, expected: str
) -> None:
    path = file_with(tmp_path, f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(QloraError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert expected in str(caught.value)


def test_the_first_of_several_bad_lines_is_named_and_they_are_counted(tmp_path: Path) -> None:
    path = file_with(tmp_path, f"{GOOD}\n{{\n{GOOD}\n[]\n")
    with pytest.raises(QloraError, match=r"line 2: .*\(2 lines of this file are bad\)"):
        read_examples(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no training example"),
        (b"\n  \n", "holds no training example"),
        (b'{"prompt": "\xff"}', "byte 13 of the line is not UTF-8"),
        (GOOD.encode("utf-16"), "UTF-16, expected UTF-8"),
        (b"\x1f\x8b\x08\x00", "gzip-compressed"),
        (b"[" * 100_000, "line 1: not "),
    ],
)
def test_a_file_that_is_no_jsonl_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(QloraError, match=expected):
        read_examples(file_with(tmp_path, content))


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QloraError, match="does not exist"):
        read_examples(tmp_path / "absent.jsonl")
    with pytest.raises(QloraError, match="is a directory"):
        read_examples(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "prompt", "completion", "role", "content", "x"]), inner
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_line_is_an_example_or_a_line_error(value: object) -> None:
    try:
        example = parse_line(json.dumps(value))
    except LineError:
        return
    assert example.messages[-1][0] == "assistant"


@given(st.binary(max_size=60))
def test_any_bytes_are_an_example_or_a_line_error(raw: bytes) -> None:
    with pytest.raises(LineError):
        parse_line(raw)


def test_written_examples_are_read_back_equal(tmp_path: Path) -> None:
    examples = [Example((("user", "Hva er det?\u2028"), ("assistant", "Ingenting."))) for _ in "ab"]
    write_examples(tmp_path / "out.jsonl", examples)
    assert [e.messages for e in read_examples(tmp_path / "out.jsonl").examples] == [
        e.messages for e in examples
    ]


# ---- labels -------------------------------------------------------------------------------------


def learned(tokenizer: object, input_ids: list[int], labels: list[int]) -> str:
    """The text the loss sees; every label must be its token."""
    assert all(label in (IGNORED, token) for token, label in zip(input_ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORED])  # type: ignore[attr-defined]


def test_only_the_answer_and_its_end_token_are_learned() -> None:
    tokenizer = tiny_tokenizer()
    ids, labels, _ = encode_example(parse_line('{"prompt": "bæ?", "completion": "æ!"}'), tokenizer)
    assert learned(tokenizer, ids, labels) == "æ!<|im_end|>"
    assert tokenizer.decode(ids).startswith(
        "<|im_start|>user\nbæ?<|im_end|>\n<|im_start|>assistant"
    )


def test_every_assistant_turn_of_a_chat_is_learned() -> None:
    tokenizer = tiny_tokenizer()
    turns = (("system", "s"), ("user", "a"), ("assistant", "b1"), ("user", "c"), ("assistant", "d"))
    ids, labels, every_answer = encode_example(Example(turns), tokenizer)
    assert learned(tokenizer, ids, labels) == "b1<|im_end|>d<|im_end|>"
    assert every_answer


def test_a_template_that_rewrites_earlier_turns_learns_the_last_answer_and_says_so() -> None:
    template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if loop.last or message['role'] != 'assistant' %}{{ message['content'] }}"
        "{% else %}(cut){% endif %}",
    )
    tokenizer = tiny_tokenizer(template)
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    data = encode_examples([Example(turns)], tokenizer, max_length=100)
    only = data.examples[0]
    assert learned(tokenizer, only.input_ids, only.labels) == "d<|im_end|>"
    assert data.last_answer_only == 1


def test_a_template_whose_generation_prompt_is_not_in_the_chat_still_learns_the_answer() -> None:
    template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = tiny_tokenizer(template)
    ids, labels, _ = encode_example(Example((("user", "a"), ("assistant", "b"))), tokenizer)
    assert learned(tokenizer, ids, labels) == "b<|im_end|>"


def test_plain_text_is_encoded_without_a_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    ids, labels, _ = encode_example(parse_line(GOOD), tokenizer)
    assert tokenizer.decode(ids) == "2+2=4<|im_end|>"
    assert learned(tokenizer, ids, labels) == "4<|im_end|>"


def test_a_chat_without_a_template_is_refused_with_its_line() -> None:
    example = Example((("user", "a"), ("assistant", "b")), line=7)
    with pytest.raises(QloraError, match=r"line 7 is a chat, but .* no chat template"):
        encode_example(example, tiny_tokenizer(chat_template=None))


def test_a_template_that_fails_is_reported_with_the_line() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(QloraError, match=r"line 5 cannot be rendered .*roles must alternate"):
        encode_example(Example((("user", "a"), ("assistant", "b")), line=5), tokenizer)


def test_long_examples_are_cut_and_those_without_an_answer_left_are_dropped() -> None:
    tokenizer = tiny_tokenizer()
    short, cut, lost = (
        Example((("user", "q" * count), ("assistant", "a" * 10))) for count in (1, 20, 90)
    )
    fixed = len(encode_example(short, tokenizer)[0]) - 11
    data = encode_examples([short, cut, lost], tokenizer, max_length=fixed + 21)
    assert (len(data.examples), data.shortened, data.dropped) == (2, 1, 1)
    assert all(len(example.input_ids) <= fixed + 21 for example in data.examples)
    with pytest.raises(QloraError, match="none of the 1 examples keeps any of its answer within 8"):
        encode_examples([lost], tokenizer, max_length=8)


def test_counts_are_what_the_loss_sees() -> None:
    data = encode_examples([parse_line(GOOD)] * 3, tiny_tokenizer(), max_length=100)
    assert data.answer_tokens == 3 * len("4|")  # the digit and the end token
    assert data.tokens == 3 * len(data.examples[0].input_ids)
