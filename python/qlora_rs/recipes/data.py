"""A user's JSONL file -> checked training examples.

Each line is one JSON object in one of two forms; a file may mix them:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

The whole file is read and checked before anything else happens, so that a run never starts on
data it cannot finish. Read next: ``encode.py`` (examples -> token ids and labels).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_rs.errors import QloraError

ROLES = ("system", "user", "assistant", "tool")
EXPECTED = (
    'expected {"messages": [{"role": ..., "content": ...}, ...]} that ends with an assistant '
    'message, or {"prompt": "...", "completion": "..."}'
)


class LineError(QloraError):
    """One line is not a training example; the message says why, without the file's name."""


@dataclass(frozen=True)
class Example:
    """One conversation whose assistant turns are to be learned.

    messages: role and content of each turn, in order; the last role is "assistant".
    plain: True when the line was prompt/completion text, which a tokenizer without a chat
        template can still encode.
    line: 1-based line number in the file it came from, 0 when it came from memory.
    """

    messages: tuple[tuple[str, str], ...]
    plain: bool = False
    line: int = 0

    def chat(self) -> list[dict[str, str]]:
        """Return the turns as chat templates want them: a list of role/content dicts."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class TrainingData:
    """The examples of one file and the digest that identifies it when a run is resumed."""

    examples: tuple[Example, ...]
    sha256: str
    blank_lines: int = 0


def _missing(path: str | Path) -> QloraError:
    return QloraError(f"{path} does not exist; give the path of a JSONL file")


def check_data_path(path: str | Path) -> None:
    """Refuse a file that is not there, before anything large is loaded; reads nothing."""
    if not Path(path).exists():
        raise _missing(path)


def read_examples(path: str | Path) -> TrainingData:
    """Read and check a JSONL file of chats or prompt/completion pairs.

    A byte-order mark, CRLF line ends and blank lines are accepted; nothing else is guessed.
    Memory: the examples' text, once. Raises QloraError naming the file, the first bad line
    (1-based), what was expected, and how many lines are bad.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> _ = file.write_text('{"prompt": "2+2=", "completion": "4"}\\n')
    >>> read_examples(file).examples[0].messages
    (('user', '2+2='), ('assistant', '4'))
    """
    path = Path(path)
    digest = hashlib.sha256()
    examples: list[Example] = []
    first_error: str | None = None
    bad_lines = blank_lines = 0
    for number, raw in _numbered_lines(path, digest):
        if not raw.strip():
            blank_lines += 1
            continue
        try:
            examples.append(parse_line(raw, number))
        except LineError as error:
            bad_lines += 1
            first_error = first_error or f"{path}, line {number}: {error}"
    if first_error is not None:
        more = f" ({bad_lines} lines of this file are bad)" if bad_lines > 1 else ""
        raise QloraError(first_error + more)
    if not examples:
        raise QloraError(f"{path} holds no training example; {EXPECTED} on each line")
    return TrainingData(tuple(examples), digest.hexdigest(), blank_lines)


def _numbered_lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based number, bytes) per line, feeding every byte to ``digest``.

    Lines end at "\\n" only: JSON strings may hold U+2028 and the like, where str.splitlines cuts.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                digest.update(raw)
                if number == 1:
                    _refuse_utf16(raw)
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                yield number, raw
    except FileNotFoundError:
        raise _missing(path) from None
    except IsADirectoryError:
        raise QloraError(f"{path} is a directory; give the path of one JSONL file") from None
    except LineError as error:
        raise QloraError(f"{path}: {error}") from None
    except OSError as error:
        raise QloraError(f"{path} cannot be read: {error.strerror or error}") from error


def _refuse_utf16(raw: bytes) -> None:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise LineError("the file is UTF-16, expected UTF-8; save it again as UTF-8")
    if raw.startswith(b"\x1f\x8b"):
        raise LineError("the file is gzip-compressed; decompress it first (gunzip)")


def parse_line(raw: bytes | str, number: int = 0) -> Example:
    """Turn one JSON line into an Example, or raise LineError saying what is wrong.

    >>> parse_line('{"prompt": "a", "completion": "b"}').plain
    True
    >>> parse_line('{"prompt": "a"}')
    Traceback (most recent call last):
        ...
    qlora_rs.recipes.data.LineError: the field "completion" is missing; found "prompt"
    """
    value = _parse_json(raw)
    if isinstance(value, list):
        raise LineError(
            "the line is a JSON array, expected one JSON object per line (JSONL); "
            "write each element of the array on a line of its own"
        )
    if not isinstance(value, dict):
        raise LineError(f"the line is a JSON {_kind(value)}; {EXPECTED}")
    if "messages" in value and ("prompt" in value or "completion" in value):
        raise LineError('the line has both "messages" and "prompt"/"completion"; keep one form')
    if "messages" in value:
        return Example(_messages(value["messages"]), plain=False, line=number)
    if "prompt" in value or "completion" in value:
        return Example(_prompt_completion(value), plain=True, line=number)
    raise LineError(f"{EXPECTED}; found the fields {_names(value)}")


def _parse_json(raw: bytes | str) -> Any:
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise LineError(
                f"byte {error.start + 1} of the line is not UTF-8; save the file again as UTF-8"
            ) from None
    try:
        # Without its line end, which would count as a second line in the error's column.
        return json.loads(raw.rstrip())
    except json.JSONDecodeError as error:
        raise LineError(f"not valid JSON at column {error.colno} ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested too deep, or an integer too long
        raise LineError(f"not usable JSON ({error})") from None


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise LineError(f'"messages" is a JSON {_kind(value)}, expected an array of messages')
    turns = tuple(_message(item, place) for place, item in enumerate(value, start=1))
    if len(turns) < 2:
        raise LineError(
            f'"messages" has {len(turns)} message(s), expected at least a question and an answer, '
            'as in [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]'
        )
    if turns[-1][0] != "assistant":
        raise LineError(f'the last message has role "{turns[-1][0]}", expected "assistant"')
    if not turns[-1][1].strip():
        raise LineError("the last message is empty, so there is no answer to learn")
    return turns


def _message(item: Any, place: int) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise LineError(f"message {place} is a JSON {_kind(item)}, expected an object")
    for field in ("role", "content"):
        if field not in item:
            raise LineError(f'message {place} lacks "{field}"; found {_names(item)}')
        if not isinstance(item[field], str):
            raise LineError(
                f'"{field}" of message {place} is a JSON {_kind(item[field])}, expected a string'
            )
    if item["role"] not in ROLES:
        raise LineError(
            f'message {place} has role "{item["role"]}", expected one of {", ".join(ROLES)}'
        )
    return item["role"], _encodable(item["content"], f"message {place}")


def _prompt_completion(value: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    for field in ("prompt", "completion"):
        if field not in value:
            raise LineError(f'the field "{field}" is missing; found {_names(value)}')
        if not isinstance(value[field], str):
            raise LineError(f'"{field}" is a JSON {_kind(value[field])}, expected a string')
        if not value[field]:
            raise LineError(f'"{field}" is empty, expected text')
    return (
        ("user", _encodable(value["prompt"], '"prompt"')),
        ("assistant", _encodable(value["completion"], '"completion"')),
    )


def _encodable(text: str, where: str) -> str:
    """Refuse lone surrogates ("\\ud800"): JSON allows them, UTF-8 and tokenizers do not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LineError(
            f"{where} holds half of a surrogate pair at character {error.start + 1}, "
            "which is not text"
        ) from None
    return text


def _kind(value: Any) -> str:
    kinds = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _names(fields: Iterable[str]) -> str:
    """List field names for a message: quoted, escaped and cut so that a hostile line stays short.

    >>> _names({})
    'none'
    """
    shown = [json.dumps(name[:40]) for name in list(fields)[:8]]
    return ", ".join(shown) if shown else "none"


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """Write examples as JSONL that ``read_examples`` reads back; a file there is replaced."""
    from qlora_rs.recipes.output_folder import write_text

    lines = (json.dumps({"messages": e.chat()}, ensure_ascii=False) for e in examples)
    write_text(Path(path), "".join(line + "\n" for line in lines))
