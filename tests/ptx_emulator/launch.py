"""Launches with numpy arrays in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_emulator import _native


class Refusal(Exception):
    """The kernel did what a GPU would corrupt, or the launch is impossible.

    `complaint` is a short stable name such as "race" or "out-of-bounds"; the text of the exception
    is the whole sentence with kernel, block, thread, PTX line, CUDA line and addresses.
    """

    def __init__(self, complaint: str, message: str) -> None:
        super().__init__(f"{complaint}: {message}")
        self.complaint = complaint


@dataclass(frozen=True)
class Buffer:
    """An array lent to a kernel, and what the kernel may do with it."""

    array: np.ndarray
    writable: bool
    defined: bool
    offset: int = 0


def output(array: np.ndarray, offset: int = 0) -> Buffer:
    """A buffer that the kernel fills; reading it before writing is refused."""
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


@dataclass(frozen=True)
class Result:
    """What a launch left: the arrays written, in the order of the arguments, and the counts.

    `arrays` holds one array for each `output` and `inout` argument. `counters` is a dict (see the
    README for its keys), `table` the same for people. `variables` holds the module's `__device__`
    variables as bytes.
    """

    arrays: list[np.ndarray]
    counters: dict[str, Any]
    table: str
    variables: dict[str, bytes] = field(default_factory=dict)


def _three(size: int | Sequence[int]) -> list[int]:
    sizes = [size] if isinstance(size, int | np.integer) else list(size)
    return [*map(int, sizes), 1, 1][:3]


class Module:
    """A module of PTX. Raises Refusal when the text is not understood."""

    def __init__(self, ptx: str) -> None:
        try:
            self._module = _native.Module(ptx)
        except _native.NativeRefusal as refusal:
            raise Refusal(*refusal.args) from None
        self.ptx = ptx

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels."""
        return self._module.kernels()

    def launch(
        self,
        kernel: str,
        arguments: Sequence[Any],
        *,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared: int = 0,
        schedule: str = "ascending",
        async_timing: str = "latest",
        matrix_model: str = "exact",
        workers: int = 0,
        instruction_limit: int = 2_000_000_000,
        blocks: Sequence[int] | None = None,
        resident: int = 128,
        races: bool = True,
    ) -> Result:
        """Run a kernel over a grid.

        An argument is a numpy array (an input), `output(array)`, `inout(array)`, `window(array,
        offset)`, a numpy scalar of the parameter's exact type, an int or float (made to fit the
        parameter), None (a null pointer) or bytes (a struct). `grid` and `block` are an int or up
        to three; `shared` is dynamic shared memory in bytes.

        schedule: "ascending", "descending", "ahead" or "random:SEED" (warps, diverged lanes and
        blocks). async_timing: "latest" or "earliest". matrix_model: "exact", "sequential", "a100"
        or "h100". blocks: linear indices of the blocks to run, all by default. resident: blocks on
        the GPU at once. races: refuse races on shared memory.

        Raises Refusal.
        """
        parameters = self._parameters(kernel)
        if len(arguments) != len(parameters):
            counts = f"{len(arguments)} arguments for {len(parameters)} parameters"
            raise Refusal("launch", f"{kernel}: {counts}")
        buffers: list[Buffer] = []
        native: list[Any] = []
        for index, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            if isinstance(argument, np.ndarray) and argument.ndim:
                argument = Buffer(argument, writable=False, defined=True)
            if isinstance(argument, Buffer):
                buffers.append(argument)
                content = np.ascontiguousarray(argument.array).tobytes()
                native.append(
                    (
                        f"argument {index}",
                        content,
                        argument.offset,
                        argument.defined,
                        not argument.writable,
                    )
                )
            else:
                native.append(_value(argument, *parameter))
        word, _, seed = schedule.partition(":")
        try:
            contents, variables, counters, table = self._module.launch(
                kernel,
                native,
                _three(grid),
                _three(block),
                shared,
                word,
                int(seed or 0),
                async_timing,
                matrix_model,
                workers,
                instruction_limit,
                None if blocks is None else list(map(int, blocks)),
                resident,
                races,
            )
        except _native.NativeRefusal as refusal:
            raise Refusal(*refusal.args) from None
        arrays = [
            np.frombuffer(content, dtype=buffer.array.dtype).reshape(buffer.array.shape).copy()
            for content, buffer in zip(contents, buffers, strict=True)
            if buffer.writable
        ]
        return Result(arrays, json.loads(counters), table, dict(variables))

    def _parameters(self, kernel: str) -> list[tuple[str, int, bool]]:
        try:
            return self._module.parameters(kernel)
        except _native.NativeRefusal as refusal:
            raise Refusal(*refusal.args) from None


def _value(argument: Any, name: str, size: int, is_float: bool) -> bytes:
    """The bytes of a value passed by copy."""
    if argument is None:
        return bytes(size)
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, int | float):
        if isinstance(argument, float) and not is_float:
            raise TypeError(f"parameter `{name}` is an integer; got {argument!r}")
        if is_float:
            return np.array(argument, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
        return int(argument).to_bytes(size, "little", signed=argument < 0)
    return np.asarray(argument).tobytes()
