"""Float weight → `PackedWeight`, and back: NF4 with optional double quantization.

The bytes are those of bitsandbytes' `nf4` type: `PackedWeight.to_bitsandbytes` and
`from_bitsandbytes` convert without touching a code. Format: QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from qlora_rs import _rust
from qlora_rs.errors import QloraError
from qlora_rs.ops import BLOCK_SIZES, DEVICES, check_block_size, check_weight

NESTED_BLOCK = 256
CPU = torch.device("cpu")
# nested_absmax, nested_offset, nested_map
_Nested: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
_DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@functools.cache
def levels() -> Tensor:
    """The 16 NF4 levels, float32."""
    return torch.tensor(_rust.levels(), dtype=torch.float32)


@functools.cache
def dynamic_map(device: torch.device = CPU) -> Tensor:
    """The 256 values that a double-quantized absmax can take before scaling, float32.

    One tensor for each device, never changed: a CUDA graph may not copy it from the CPU.
    """
    return torch.tensor(_rust.dynamic_map(), dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False, repr=False)
class PackedWeight:
    """A weight matrix in NF4: two codes per byte, one absmax per block.

    codes: uint8 [(out * in + 1) // 2, 1], the first weight of a byte in its high nibble.
    absmax: float32 [blocks], or uint8 [blocks] when double-quantized; then nested_absmax is
    float32 [ceil(blocks / 256)], nested_offset float32 [] and nested_map float32 [256].
    shape: (out_features, in_features). dtype: that of the float weight. block_size: weights per
    absmax, counted along the flattened matrix.

    Its repr gives shape, format, bytes and device, and no values.

    Made by `quantize` or `from_bitsandbytes`; never changed afterwards.

    >>> packed = quantize(torch.eye(64))
    >>> packed.shape, packed.nbytes
    (torch.Size([64, 64]), 3144)
    >>> bool((packed.dequantize() == torch.eye(64)).all())
    True
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_map: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    def __repr__(self) -> str:
        size = (
            f"{self.nbytes / 1e3:,.1f} KB" if self.nbytes < 1e6 else f"{self.nbytes / 1e6:,.1f} MB"
        )
        return (
            f"PackedWeight({list(self.shape)}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, {size}, {self.device})"
        )

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        count = self.shape.numel()
        blocks = -(-count // self.block_size)
        nested = self.nested_absmax is not None
        expected: list[tuple[str, Tensor | None, torch.dtype, int]] = [
            ("codes", self.codes, torch.uint8, (count + 1) // 2),
            ("absmax", self.absmax, torch.uint8 if nested else torch.float32, blocks),
        ]
        if nested:
            groups = -(-blocks // NESTED_BLOCK)
            expected += [
                ("nested_absmax", self.nested_absmax, torch.float32, groups),
                ("nested_offset", self.nested_offset, torch.float32, 1),
                ("nested_map", self.nested_map, torch.float32, 256),
            ]
        for name, tensor, dtype, length in expected:
            if tensor is None or tensor.dtype != dtype or tensor.numel() != length:
                found = "None" if tensor is None else f"{tensor.numel()} of {tensor.dtype}"
                raise QloraError(
                    f"{name} of a {list(self.shape)} weight in blocks of {self.block_size} must "
                    f"hold {length} elements of {dtype}, got {found}"
                )

    @property
    def double_quant(self) -> bool:
        """Whether absmax is itself quantized to 8 bits."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: 4.127 bits per weight with double quantization, 4.5 without,
        plus 1 KiB for the map."""
        return sum(t.nbytes for t in self._tensors() if t is not None)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        nested = (self.nested_absmax, self.nested_offset, self.nested_map)
        return (self.codes, self.absmax, *nested)

    def arguments(self) -> tuple:
        """The eight arguments by which `torch.ops.qlora_rs.*` take a packed weight."""
        return (*self._tensors(), *self.shape, self.block_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix [out, in]; allocates all of it.

        dtype: float32, float16, bfloat16 or float64; by default the original weight's. Values are
        level * absmax in float32, rounded once.
        """
        return torch.ops.qlora_rs.dequantize(*self.arguments(), dtype or self.dtype)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same bytes on another device.

        Raises QloraError for a GPU that torch does not find.
        """
        wanted, found = torch.device(device), torch.cuda.device_count()
        if wanted.type == "cuda" and (wanted.index or 0) >= found:
            raise QloraError(
                f"the weight cannot go to {device}: torch finds {found} NVIDIA GPUs (the first is "
                "cuda:0). `qlora-rs doctor` says what is missing; on the CPU all works without one"
            )
        return self._with_tensors(*(None if t is None else t.to(device) for t in self._tensors()))

    def _with_tensors(
        self,
        codes: Tensor | None,
        absmax: Tensor | None,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        nested_map: Tensor | None,
    ) -> PackedWeight:
        assert codes is not None
        assert absmax is not None
        nested = (nested_absmax, nested_offset, nested_map)
        return PackedWeight(codes, absmax, *nested, self.shape, self.dtype, self.block_size)

    def to_bitsandbytes(self, prefix: str) -> dict[str, Tensor]:
        """bitsandbytes' state-dict entries for a weight called `prefix`, e.g. "layer.weight"."""
        state: dict = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        entries = {
            prefix: self.codes,
            f"{prefix}.absmax": self.absmax,
            # A copy: tensors of a file may not share memory.
            f"{prefix}.quant_map": levels().to(self.device, copy=True),
        }
        if self.nested_absmax is not None:
            assert self.nested_offset is not None
            assert self.nested_map is not None
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset.item() if self.device.type != "meta" else 0.0,
            }
            entries[f"{prefix}.nested_absmax"] = self.nested_absmax
            entries[f"{prefix}.nested_quant_map"] = self.nested_map
        text = bytearray(json.dumps(state).encode())
        entries[f"{prefix}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(
            text, dtype=torch.uint8
        )
        return entries

    @staticmethod
    def from_bitsandbytes(entries: dict[str, Tensor], prefix: str) -> PackedWeight:
        """Read what `to_bitsandbytes` or bitsandbytes itself wrote for the weight `prefix`.

        Raises QloraError when entries are missing, of another type than NF4, or do not fit.
        """
        return _from_bitsandbytes(entries, prefix)


def _from_bitsandbytes(entries: dict[str, Tensor], prefix: str) -> PackedWeight:
    def entry(suffix: str) -> Tensor:
        value = entries.get(prefix + suffix)
        if value is None:
            raise QloraError(
                f"{prefix + suffix} is missing: {prefix} is not a weight that bitsandbytes saved "
                "as NF4"
            )
        if not isinstance(value, Tensor):
            raise QloraError(f"{prefix + suffix} must be a tensor, got {type(value).__name__}")
        return value.detach().contiguous()

    def statistic(suffix: str) -> Tensor:
        value = entry(suffix)
        if value.is_floating_point() and value.device.type != "meta":
            bad = ~torch.isfinite(value.flatten())
            if bad.any():
                raise QloraError(
                    f"{prefix + suffix} holds {int(bad.sum())} NaN or infinite value(s), the first "
                    f"at index {int(bad.nonzero()[0])}; the file is damaged"
                )
        return value

    if f"{prefix}.quant_state.bitsandbytes__fp4" in entries:
        raise QloraError(f"{prefix} is FP4; only NF4 is supported, so quantize the float weight")
    state = _read_state(entry(".quant_state.bitsandbytes__nf4"), prefix)
    found = entry(".quant_map")
    if found.device.type != "meta" and not torch.equal(found.to("cpu", torch.float32), levels()):
        raise QloraError(f"{prefix}.quant_map is not the NF4 table; its codes cannot be read")
    codes = entry("")
    if codes.dim() == 0:
        raise QloraError(f"{prefix} must hold packed codes, got a single number")
    if codes.dtype != torch.uint8:
        # bnb_4bit_quant_storage: the same bytes seen as another dtype.
        codes = codes.view(torch.uint8)
    nested: _Nested = (None, None, None)
    if "nested_offset" in state:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
        table = statistic(".nested_quant_map").to(torch.float32)
        nested = (statistic(".nested_absmax"), offset, table)
    shape = torch.Size(state["shape"])
    dtype = _DTYPE_NAMES[state["dtype"]]
    absmax = statistic(".absmax")
    return PackedWeight(codes.reshape(-1, 1), absmax, *nested, shape, dtype, state["blocksize"])


def _read_state(packed: Tensor, prefix: str) -> dict:
    """The JSON that describes a weight, every field of it checked."""
    try:
        state = json.loads(bytes(packed.cpu().to(torch.uint8).flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise QloraError(f"the quant_state of {prefix} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise QloraError(f"the quant_state of {prefix} is no JSON object: {state!r}")
    nested = any(field.startswith("nested_") for field in state)
    fields = {
        "quant_type": lambda value: value == "nf4",
        "blocksize": lambda value: type(value) is int and value in BLOCK_SIZES,
        "dtype": lambda value: isinstance(value, str) and value in _DTYPE_NAMES,
        "shape": _is_shape,
    }
    if nested:
        fields["nested_blocksize"] = lambda value: value == NESTED_BLOCK
        fields["nested_offset"] = _is_float32
    for field, is_valid in fields.items():
        if field not in state:
            raise QloraError(f"the quant_state of {prefix} lacks {field}: {state}")
        if not is_valid(state[field]):
            raise QloraError(
                f"the quant_state of {prefix} has {field}={state[field]!r}, which no NF4 matrix has"
            )
    return state


def _is_shape(value: object) -> bool:
    """Two sizes whose product, in bits, still fits in 64."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and 0 <= size < 1 << 56 for size in value)
        and value[0] * value[1] < 1 << 56
    )


def _is_float32(value: object) -> bool:
    return (
        type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max  # type: ignore[arg-type]
    )


def quantize(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> PackedWeight:
    """Pack a float matrix into NF4: 4.127 bits per weight, 4.5 without double quantization.

    weight: [out, in], float32, float16 or bfloat16, finite, any strides, on the CPU or a GPU. It is
    not modified. block_size: 32 to 4096, a power of two.
    Raises QloraError for another dtype, shape or block size, and for NaN or infinite weights, with
    their count and first index. Allocates the output and, while double-quantizing, 4 bytes per
    block.

    >>> packed = quantize(torch.eye(64), double_quant=False)
    >>> packed.absmax.tolist() == [1.0] * 64
    True
    """
    if not isinstance(weight, Tensor):
        raise QloraError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    check_weight(weight, block_size, double_quant)
    if weight.device.type not in DEVICES:
        raise QloraError(f'weight is on {weight.device}; move it to the CPU first with .to("cpu")')
    weight = weight.detach()
    codes, absmax, *nested = torch.ops.qlora_rs.quantize(weight, block_size, double_quant)
    parts: _Nested = (None, None, None)
    if double_quant:
        # A copy for each weight: files and loaders take tensors that share memory for tied ones.
        parts = (nested[0], nested[1], dynamic_map(codes.device).clone())
    return PackedWeight(codes, absmax, *parts, weight.shape, weight.dtype, block_size)
