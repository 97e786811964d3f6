"""What a launch is given: arrays, numbers and options, checked where they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ACCEPTED = "a numpy array, output(), inout(), window(), a number, bytes or None"


@dataclass(frozen=True)
class Buffer:
    """An array lent to a kernel, and what the kernel may do with it."""

    array: np.ndarray
    writable: bool
    defined: bool
    offset: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray):
            raise TypeError(f"expected a numpy array; got {_described(self.array)}")
        if self.array.dtype.hasobject:
            raise TypeError(
                f"an array of dtype {self.array.dtype} holds Python objects, not numbers"
            )
        whole("offset", self.offset, 0, 2**46)


def output(array: np.ndarray, offset: int = 0) -> Buffer:
    """A buffer that the kernel fills. What `array` holds is never seen.

    Reading it before writing is refused. Bytes that the kernel does not write come back as 0xff (a
    NaN in f32, f16 and bf16), and `Result.unwritten` says how many they are.
    """
    return Buffer(array, writable=True, defined=False, offset=offset)


def inout(array: np.ndarray, offset: int = 0) -> Buffer:
    """A buffer that the kernel reads and writes."""
    return Buffer(array, writable=True, defined=True, offset=offset)


def window(array: np.ndarray, offset: int) -> Buffer:
    """An input that stands `offset` bytes behind the pointer that the kernel gets.

    Nothing else behind the pointer may be touched. So a few blocks of a launch over a tensor of
    many gigabytes can run (with `blocks=`), and a misaligned view can be lent. `output` and `inout`
    take the same offset.
    """
    return Buffer(array, writable=False, defined=True, offset=offset)


def _described(value: Any) -> str:
    """The type of a value, and how to make an array of it if that is plain."""
    kind = type(value)
    if isinstance(value, list | tuple):
        return f"{kind.__name__} (use np.array)"
    if hasattr(value, "numpy"):
        return f"{kind.__module__}.{kind.__name__} (use .numpy())"
    return f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.")


def lend(index: int, argument: Any) -> Buffer | None:
    """The buffer that an argument is, or None for a value. Raises TypeError for anything else."""
    if isinstance(argument, Buffer):
        return argument
    if isinstance(argument, np.ndarray) and argument.ndim:
        try:
            return Buffer(argument, writable=False, defined=True)
        except TypeError as error:
            raise TypeError(f"argument {index}: {error}") from None
    scalar = isinstance(argument, np.ndarray | np.generic) and not argument.dtype.hasobject
    if scalar or argument is None or isinstance(argument, bytes | int | float):
        return None
    raise TypeError(f"argument {index}: expected {ACCEPTED}; got {_described(argument)}")


def value(index: int, argument: Any, name: str, size: int, is_float: bool) -> bytes:
    """The bytes of a value passed by copy."""
    if argument is None:
        return bytes(size)
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, np.ndarray | np.generic):
        return argument.tobytes()
    if is_float:
        return np.array(argument, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
    if isinstance(argument, float):
        raise TypeError(f"argument {index}: parameter `{name}` is an integer; got {argument!r}")
    try:
        return int(argument).to_bytes(size, "little", signed=argument < 0)
    except OverflowError:
        text = f"argument {index}: {argument} does not fit the {size} bytes of parameter `{name}`"
        raise OverflowError(text) from None


def whole(name: str, number: Any, least: int, most: int) -> int:
    """An option that must be a whole number of some range."""
    if not isinstance(number, int | np.integer) or isinstance(number, bool):
        raise TypeError(f"{name}: expected a whole number; got {number!r}")
    if not least <= number <= most:
        raise ValueError(f"{name}: expected {least} to {most}; got {number}")
    return int(number)


def three(name: str, size: int | Sequence[int]) -> list[int]:
    """A grid or block of up to three dimensions."""
    sizes = [size] if isinstance(size, int | np.integer) else list(size)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name}: expected one to three sizes; got {len(sizes)}: {size}")
    # A size of zero is the launch's to refuse.
    return [*(whole(name, number, 0, 2**32 - 1) for number in sizes), 1, 1][:3]


def seeded(schedule: str) -> tuple[str, int]:
    """A schedule's name and its seed."""
    word, colon, seed = schedule.partition(":")
    plain = word in ("ascending", "descending", "ahead") and not colon
    if not plain and not (word == "random" and seed.isdecimal() and int(seed) < 2**64):
        text = "use ascending, descending, ahead or random:SEED, such as random:7"
        raise ValueError(f"no schedule `{schedule}`: {text}")
    return word, int(seed or 0)
