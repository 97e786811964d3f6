"""Launches with numpy arrays in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ptx_emulator import _native
from ptx_emulator.arguments import Buffer, lend, seeded, three, value, whole


class Refusal(Exception):
    """The kernel did what a GPU would corrupt, or the launch is impossible.

    `complaint` is a short stable name such as "race" or "out-of-bounds"; the text of the exception
    is the whole sentence with kernel, block, thread, PTX line, CUDA line and addresses.
    """

    def __init__(self, complaint: str, message: str) -> None:
        super().__init__(f"{complaint}: {message}")
        self.complaint = complaint


class Unwritten(NamedTuple):
    """The part of an output that a kernel left out: how many bytes, and the offset of the first."""

    bytes: int
    first: int


@dataclass(frozen=True, repr=False)
class Result:
    """What a launch left: the arrays written, in the order of the arguments, and the counts.

    `arrays` holds one array for each `output` and `inout` argument. `counters` is a dict (see the
    README for its keys), `table` the same for people. `variables` holds the module's `__device__`
    variables as bytes, by their name in the PTX, as the launch left them. `unwritten` names, by
    index of the argument, each `output` of which the kernel left bytes unwritten; empty for a
    kernel that fills its outputs.
    """

    arrays: list[np.ndarray]
    counters: dict[str, Any]
    table: str
    variables: dict[str, bytes] = field(default_factory=dict)
    unwritten: dict[int, Unwritten] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{array.dtype}{list(array.shape)}" for array in self.arrays)
        count = f"{self.counters['warp_instructions']} warp instructions"
        holes = f", unwritten: {self.unwritten}" if self.unwritten else ""
        return f"<Result of {self.counters['kernel']}: {shapes or 'no arrays'}, {count}{holes}>"


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
        barriers: bool = True,
    ) -> Result:
        """Run a kernel over a grid.

        An argument is a numpy array (an input), `output(array)`, `inout(array)`, `window(array,
        offset)`, a numpy scalar of the parameter's exact type, an int or float (made to fit the
        parameter), None (a null pointer) or bytes (a struct). `grid` and `block` are an int or up
        to three; `shared` is dynamic shared memory in bytes.

        schedule: "ascending", "descending", "ahead" or "random:SEED" (warps, diverged lanes and
        blocks). async_timing: "latest" or "earliest". matrix_model: "exact", "sequential", "a100"
        or "h100". blocks: linear indices of the blocks to run, all by default. resident: blocks on
        the GPU at once. races: refuse races on shared memory. barriers: refuse a barrier that some
        threads of its block went round and completed by ending.

        Raises Refusal for the kernel and the launch; TypeError, ValueError or OverflowError for
        arguments and options that are of no use.
        """
        parameters = self._parameters(kernel)
        if len(arguments) != len(parameters):
            counts = f"{len(arguments)} arguments for {len(parameters)} parameters"
            raise Refusal("launch", f"{kernel}: {counts}")
        buffers: list[tuple[int, Buffer]] = []
        native: list[Any] = []
        for index, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            buffer = lend(index, argument)
            if buffer is None:
                native.append(value(index, argument, *parameter))
                continue
            buffers.append((index, buffer))
            content = np.ascontiguousarray(buffer.array).tobytes()
            native.append(
                (
                    f"argument {index}",
                    content,
                    buffer.offset,
                    buffer.defined,
                    not buffer.writable,
                )
            )
        word, seed = seeded(schedule)
        try:
            contents, unwritten, variables, counters, table = self._module.launch(
                kernel,
                native,
                three("grid", grid),
                three("block", block),
                whole("shared", shared, 0, 2**31 - 1),
                word,
                seed,
                async_timing,
                matrix_model,
                whole("workers", workers, 0, 1024),
                whole("instruction_limit", instruction_limit, 1, 2**63),
                None if blocks is None else [whole("blocks", at, 0, 2**63) for at in blocks],
                whole("resident", resident, 1, 2**31),
                races,
                barriers,
            )
        except _native.NativeRefusal as refusal:
            raise Refusal(*refusal.args) from None
        arrays = [
            np.frombuffer(content, dtype=buffer.array.dtype).reshape(buffer.array.shape).copy()
            for content, (_, buffer) in zip(contents, buffers, strict=True)
            if buffer.writable
        ]
        left_out = {
            index: Unwritten(*part)
            for (index, _), part in zip(buffers, unwritten, strict=True)
            if part is not None
        }
        return Result(arrays, json.loads(counters), table, dict(variables), left_out)

    def _parameters(self, kernel: str) -> list[tuple[str, int, bool]]:
        try:
            return self._module.parameters(kernel)
        except _native.NativeRefusal as refusal:
            raise Refusal(*refusal.args) from None
